"""Units of a long run: each result is kept as soon as it is there, so that a killed run goes on where it stopped."""

import hashlib
import heapq
import inspect
import io
import json
import lzma
import os
import re
import sys
import tarfile
import time
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

from helpers import cluster, files, tracing
from helpers.tracing import plain

PACKAGES = ("numpy", "scipy", "scikit-learn", "scikit-image", "tensorflow", "keras")  # which may change a result
_EARLIER = {}  # path of a unit: seconds, shared among the cores, that an earlier run spent on it
_HANDED_ON = ("defences", "networks")  # folders of what units save for others
_TAKEN = {}  # function of units: path: seconds, for all that this process has asked for
_AT_ONCE = {}  # function of units: the most processes that have computed it


def run(function, grid, *, folder, n_jobs=None, label="", data=None) -> list[dict] | dict[object, dict]:
    """Return `function(**kwargs)` for each `kwargs` of `grid`, in order; what `folder` holds already is not run again.

    Where `grid` is a mapping, key -> kwargs, so is what comes back, key -> result; the keys may be anything.
    `function` is a plain function of plain JSON values, from a module or a notebook, and returns a dictionary of
    numbers, strings, lists and arrays, to which the "seconds" it took are added. Each result is kept in
    `folder/<function>/<key>.npz`. The key covers the arguments; the code that the function runs (`tracing.code`); the
    versions of `PACKAGES`; and `data`, a plain value such as a data set's `sha256`.
    `n_jobs` processes of one thread each compute; None means one per core, or a single one where a GPU is. Where
    HELPERS_CLUSTER is the address of a Dask scheduler, its workers compute, at most `n_jobs` of them at a time.
    Raises TypeError for arguments, results and global variables that are not such values, ValueError for `n_jobs` < 1,
    `cluster.ClusterError` for what a cluster lacks.
    """
    jobs = n_jobs if n_jobs is not None else 1 if cluster.gpu() else cpu_count()
    if jobs < 1:
        raise ValueError(f"n_jobs: got {n_jobs}, expected None or at least 1")
    if not inspect.isfunction(function) or not function.__name__.isidentifier() or function.__closure__:
        raise TypeError(f"function: got {function!r}, expected a plain function with a name and without a closure")
    code, used = tracing.code(function), versions(*PACKAGES)
    base = [function.__module__, function.__qualname__, sorted(code.items()), used, data]
    about = {"function": function.__name__, "code": tracing.digests(code), "versions": used}
    units = [(Path(folder) / function.__name__ / f"{_key(function, kwargs, base)}.npz", kwargs)
             for kwargs in (grid.values() if isinstance(grid, Mapping) else grid)]
    results, jobs = {path: _load(path) for path, _ in units}, max(1, min(jobs, len(units)))
    for path, result in results.items():
        _EARLIER.setdefault(path, result["seconds"] / jobs if result else 0.0)
    todo = {path: kwargs for path, kwargs in units if results[path] is None}
    threads = 1 if jobs > 1 else None  # also for the last unit of a resumed run: the number of threads changes sums
    with warnings.catch_warnings(), parallel_config("loky", inner_max_num_threads=threads):
        warnings.filterwarnings("ignore", "A worker stopped")  # joblib replaces one that TensorFlow has made large
        if todo and (address := os.environ.get("HELPERS_CLUSTER")):
            done = _on_cluster(address, function, todo, about, data, n_jobs)
        else:  # how many a cluster computes at the same time it does not say
            _AT_ONCE[function.__name__] = max(jobs, _AT_ONCE.get(function.__name__, 1))
            done = Parallel(jobs, return_as="generator_unordered", batch_size=1)(
                delayed(_compute)(function, about, kwargs, path, threads) for path, kwargs in todo.items())
        bar = tqdm(done, label or function.__name__, len(results), initial=len(results) - len(todo), unit="unit",
                   file=sys.stdout, ncols=80)
        for path, workers in bar:
            results[path] = _load(path)
            bar.set_postfix_str(workers, refresh=False)
    found = [results[path] for path, _ in units]
    _TAKEN.setdefault(function.__name__, {}).update((path, result["seconds"]) for path, result in results.items())
    return dict(zip(grid, found, strict=True)) if isinstance(grid, Mapping) else found


def kept(folder: str | Path) -> list[dict]:
    """Return what the units of a chapter were made with: function, arguments, code, versions and seconds, newest last.

    Of several with the same function and arguments it is the newest; what a unit of an earlier layout lacks is empty.
    Each has the `path` of its file as well.
    """
    newest = {}
    for path in sorted(Path(folder).glob("*/[!.]*.npz"), key=lambda path: path.stat().st_mtime):
        try:
            with np.load(path, allow_pickle=False) as members:
                seconds = json.loads(json.loads(members["index"].item())["seconds"])
                about = json.loads(members["about"].item()) if "about" in members else {
                    "function": path.parent.name, "arguments": path.stem, "code": {}, "versions": {}}
        except Exception as error:  # whatever goes wrong, it is the file that is wrong: a run computes it again
            warnings.warn(f"{path} is corrupt ({error}): left out", stacklevel=2)
            continue
        name = about["function"], json.dumps(about["arguments"], sort_keys=True)
        newest.pop(name, None)  # to the end
        newest[name] = about | {"seconds": seconds, "path": path}
    return list(newest.values())


def pack(archive: str | Path, folder: str | Path, paths, files_of=()) -> None:
    """Write the files `paths` of units in `folder` to `archive`, a compressed tar file; the same give the same bytes.

    files_of : networks and defences, as `handed_on` finds them; without them they stay where they are.
    """
    members = {path.relative_to(folder).as_posix(): path for path in paths}
    members |= {f"{path.parent.name}/{path.name}": path for path in files_of}
    with files.atomic(archive) as temporary, tarfile.open(temporary, "w:xz") as tar:
        for name, path in sorted(members.items()):
            about = tarfile.TarInfo(name)
            about.size = path.stat().st_size
            with open(path, "rb") as content:
                tar.addfile(about, content)


def handed_on(paths, output: str | Path) -> list[Path]:
    """Return the networks and defences below `output` that results of units, files `paths`, name."""
    indices = []
    for path in paths:
        with np.load(path, allow_pickle=False) as members:
            indices.append(members["index"].item())
    return [Path(output, place) for place in files.named(indices, output)]


def unpack(archive: str | Path, folder: str | Path, output: str | Path) -> None:
    """Put the units of `archive` into `folder`, and networks and defences below `output`, but for those that are there.

    Raises ValueError, which names `archive`, where it is damaged or holds anything else.
    """
    try:
        content = lzma.decompress(Path(archive).read_bytes())  # whole: its checksum comes last
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                if not (member.isfile() and re.fullmatch(r"\w+/[0-9a-f]{64}\.(npz|keras)", member.name)):
                    raise ValueError(f"{member.name!r} in it is not a unit")
                place = output if member.name.partition("/")[0] in _HANDED_ON else folder
                if not (path := Path(place, member.name)).exists():
                    with files.atomic(path) as temporary:
                        temporary.write_bytes(tar.extractfile(member).read())
    except (ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise ValueError(f"{archive} is damaged: {error}; get it from the repository again") from error


def earlier_seconds() -> float:
    """Return how long the units took that this process found finished, shared among as many cores as it uses."""
    return sum(_EARLIER.values())


def taken() -> dict[str, list[float]]:
    """Return the seconds that each unit took which this process has asked for, function -> units, longest first."""
    return {name: sorted((round(each, 1) for each in units.values()), reverse=True) for name, units in _TAKEN.items()}


def at_once() -> dict[str, int]:
    """Return how many units this machine computed at the same time at most, function -> processes."""
    return dict(_AT_ONCE)


def makespan(seconds: Mapping[str, Iterable[float]], workers: int) -> float:
    """Return how many seconds units take on so many `workers`: function after function, of each the longest first.

    seconds : of each unit, by function, as `taken` has them.
    """
    ends = 0.0
    for units in seconds.values():
        busy = [0.0] * workers
        for each in sorted(units, reverse=True):  # to the worker that is free first
            heapq.heapreplace(busy, busy[0] + each)
        ends += max(busy)
    return ends


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; TensorFlow may be there as tensorflow-cpu."""
    return {name: next((found.version for label in (name, f"{name}-cpu")
                        for found in metadata.distributions(name=label)), "unknown") for name in packages}


def _on_cluster(address, function, todo, about, data, at_once):
    """Yield (path, units done by each worker) of `todo`, path -> arguments, as they are finished and kept."""
    for path, members, shares in cluster.results(address, function, partial(_members, function, about), todo,
                                                 ask=(versions, PACKAGES), data=data, at_once=at_once):
        _keep(path, members)
        each = shares.values()
        yield path, f"by worker: {' '.join(map(str, each)) if len(each) < 5 else f'{min(each)} to {max(each)}'}"


def _compute(function, about, kwargs, path, threads):
    _keep(path, _members(function, about, kwargs, threads))
    return path, ""


def _members(function, about, kwargs, threads):
    """Return what is kept of a unit: arrays, and text."""
    if threads:  # read when TensorFlow first computes
        os.environ.update(TF_NUM_INTRAOP_THREADS=str(threads), TF_NUM_INTEROP_THREADS=str(threads))
    started = time.perf_counter()
    try:
        result = function(**kwargs)
        if not isinstance(result, dict):
            raise TypeError(f"function: got {result!r:.80}, expected that {function.__name__} returns a dictionary")
    except Exception as error:
        error.add_note(f"in the unit {function.__name__}({kwargs})")
        raise
    result = {**result, "seconds": time.perf_counter() - started}
    arrays = {f"array.{name}": value for name, value in result.items()
              if isinstance(value, np.ndarray) and not value.dtype.hasobject}
    index = {name: None if f"array.{name}" in arrays else plain(f"result {name!r}", value)
             for name, value in result.items()}  # names every member, so that a lost one is noticed
    return {"index": json.dumps(index), "about": plain("about", about | {"arguments": kwargs}), **arrays}


def _keep(path, members):
    with files.atomic(path) as temporary:
        np.savez(temporary, **members)


def _load(path):
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as members:
            if members.zip.testzip():  # with a damaged header NumPy may read too little to notice the checksum
                raise ValueError("wrong checksum")
            index = json.loads(members["index"].item())
            return {name: json.loads(text) if text else members[f"array.{name}"] for name, text in index.items()}
    except Exception as error:  # the bytes are here: whatever goes wrong, it is they that are wrong
        warnings.warn(f"{path} is corrupt ({error}): computed again", stacklevel=3)
        path.unlink()
        return None


def _key(function, kwargs, base):
    bound = inspect.signature(function).bind(**kwargs)
    bound.apply_defaults()
    arguments = {name: plain(f"argument {name!r}", value) for name, value in bound.arguments.items()}
    return hashlib.sha256(plain("data", [base, arguments]).encode()).hexdigest()
