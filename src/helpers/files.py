"""Files that are whole or absent: checksums, atomic writes, and files that are named after what they hold."""

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

_NAME = re.compile(r"\b[0-9a-f]{64}\.(?:keras|npz)\b")  # of networks and defences, after what they hold


def output(*parts: str) -> Path:
    """Return a path in the folder of what runs make: HELPERS_OUTPUT, or _build below the current folder."""
    return Path(os.environ.get("HELPERS_OUTPUT", "_build"), *parts)


def named(value, folder: str | Path | None = None) -> list[str]:
    """Return where below `folder` (None: `output()`) the networks and defences lie that `value` names.

    Each is behind those that it names itself; one that is not there is left out.
    """
    folder, names, found = output() if folder is None else Path(folder), _NAME.findall(repr(value)), {}
    for name in names:  # which grow
        for path in sorted(folder.glob(f"*/{name}")):
            found[path.relative_to(folder).as_posix()] = None
            if path.suffix == ".npz":
                with suppress(Exception), np.load(path, allow_pickle=False) as members:  # damaged: its reader says so
                    names += _NAME.findall(str(members["about"]))
    return [*found][::-1]


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: str | Path, expected: str) -> None:
    """Raise ValueError, which names `path`, if its SHA-256 is not `expected`."""
    if (found := sha256(path)) != expected:
        raise ValueError(f"{path} is corrupt, truncated or another file: SHA-256 is {found}, expected {expected}")


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file of NumPy; no pickle is loaded."""
    with np.load(path, allow_pickle=False) as npz:
        return dict(npz)


def kept(path: str | Path, read, digest):
    """Return `read(path)`, whose `digest` is its file name; FileNotFoundError or ValueError name it and what to do."""
    path, again = Path(path), "remove the folder 'units' beside its folder and run again"
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; {again}")
    try:
        if digest(content := read(path)) == path.stem:
            return content
        raise ValueError("its content is not that of its name")
    except Exception as error:  # whatever goes wrong, it is the file that is wrong
        raise ValueError(f"{path} is damaged: {error}; remove it, {again}") from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, with its suffix, to write to; it becomes `path` when the block succeeds.

    When the block fails or is interrupted the sibling is removed, and what stood at `path` before is untouched.
    Missing parent folders are made. Raises OSError, which names `path`, for a full disk or a lack of permission.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # on disk before it gets its name, lest a crash leave it empty
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary) and not path.is_relative_to(error.filename):
            raise  # of another file, that was to be read
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()
