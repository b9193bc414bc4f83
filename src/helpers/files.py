"""Files that are whole or absent: checksums and atomic writes."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(*paths: str | Path) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a file, or of several files read one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it takes the name `path` when the block succeeds.

    The sibling keeps the suffix of `path`, for writers that go by it. When the block fails or is interrupted the
    sibling is removed and an older file at `path` stays as it was. Missing parent folders are made.
    Raises OSError with `path` in its message when the file system refuses (full disk, no permission).
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:  # on disk before the rename, or a crash could leave an empty file
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are readable by their owner only
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
