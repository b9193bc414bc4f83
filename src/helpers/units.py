"""Units of a long run: each result is kept as soon as it is there, so that a killed run goes on where it stopped."""

import ast
import dis
import hashlib
import inspect
import json
import os
import shutil
import sys
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from textwrap import dedent
from types import CodeType, SimpleNamespace

import numpy as np
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

from helpers import files

_NO_COMPUTE = {"__init__", "__main__", "book", "cli", "figures", "files", "profiles", "records", "units"}
_CORRUPT = (zipfile.BadZipFile, ValueError, EOFError, KeyError, RuntimeError)  # what np.load raises on a damaged file


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; TensorFlow may be there as tensorflow-cpu."""
    return {name: next((found.version for label in (name, f"{name}-cpu")
                        for found in metadata.distributions(name=label)), "unknown") for name in packages}


def run(function, grid, *, folder, n_jobs=None, label="", data=None) -> list[dict]:
    """Return `function(**kwargs)` for each `kwargs` of `grid`, in order; what `folder` holds already is not run again.

    `function` is a plain function of plain JSON values, from a module or a notebook, and returns a dictionary of
    numbers, strings, lists and arrays. Each result is kept in `folder/<function>/<key>.npz`. The key covers the
    arguments, the code (not its comments) of the function, of what it uses from its own module and of the helpers,
    the versions of NumPy, TensorFlow and Keras, and `data`, a plain value such as a data set's `sha256`.
    `n_jobs` processes of one thread each compute; None means one per core, or a single one where a GPU is.
    Raises TypeError for arguments, results or global variables that are not such values, ValueError for `n_jobs` < 1.
    """
    grid, jobs = list(grid), (1 if shutil.which("nvidia-smi") else cpu_count()) if n_jobs is None else n_jobs
    if jobs < 1:
        raise ValueError(f"n_jobs: got {n_jobs!r}, expected None or an integer of 1 or more")
    base = [_code(function), versions("numpy", "tensorflow", "keras"), data]
    paths = [Path(folder) / function.__name__ / f"{_key(function, kwargs, base)}.npz" for kwargs in grid]
    results = {path: _load(path) for path in paths}
    todo = [(function, kwargs, path) for path, kwargs in dict(zip(paths, grid, strict=True)).items()
            if results[path] is None]
    with (tqdm(total=len(results), initial=len(results) - len(todo), desc=label or function.__name__, unit="unit",
               file=_stream(), ncols=80) as bar, parallel_config("loky", inner_max_num_threads=1)):
        if min(jobs, len(grid)) > 1:  # also for the last unit of a resumed run: the number of threads changes sums
            done = Parallel(jobs, return_as="generator_unordered", batch_size=1)(delayed(_worker)(*u) for u in todo)
        else:
            done = (_compute(*unit) for unit in todo)
        for path in done:
            results[path] = _load(path)
            bar.update()
    return [results[path] for path in paths]


def _worker(function, kwargs, path):
    os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")  # read when TensorFlow first computes
    return _compute(function, kwargs, path)


def _compute(function, kwargs, path):
    try:
        result = function(**kwargs)
        arrays = {f"array.{name}": value for name, value in result.items() if isinstance(value, np.ndarray)}
        if any(array.dtype.hasobject for array in arrays.values()):
            raise TypeError("an array of objects cannot be kept without pickle")
        plain = json.dumps({name: None if f"array.{name}" in arrays else value for name, value in result.items()},
                           default=np.generic.item)
    except Exception as error:
        error.add_note(f"in the unit {function.__name__}({kwargs})")
        raise
    with files.atomic(path) as temporary:
        np.savez(temporary, plain=plain, **arrays)
    return path


def _load(path):
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as members:
            if members.zip.testzip():  # with a damaged header NumPy may read too little to notice the checksum
                raise zipfile.BadZipFile("wrong checksum")
            arrays = {name.removeprefix("array."): members[name] for name in members.files if name != "plain"}
            return json.loads(members["plain"].item()) | arrays
    except _CORRUPT as error:
        warnings.warn(f"{path} is corrupt ({error}): computed again", stacklevel=3)
        path.unlink()
        return None


def _key(function, kwargs, base):
    bound = inspect.signature(function).bind(**kwargs)
    bound.apply_defaults()
    return hashlib.sha256(json.dumps([base, bound.arguments], sort_keys=True, allow_nan=False).encode()).hexdigest()


def _code(function):
    """Return what a result hangs on besides its arguments: code without comments, and the notebook's constants."""
    if not inspect.isfunction(function) or not function.__name__.isidentifier() or function.__closure__:
        raise TypeError(f"function: expected a plain named function without a closure, got {function!r}")
    found = {path.stem: _bare(path.read_text(encoding="utf-8")) for path in Path(__file__).parent.glob("*.py")
             if path.stem not in _NO_COMPUTE}
    todo = {} if function.__module__.startswith("helpers.") else {f"{function.__name__}()": function}
    while todo:
        label, item = todo.popitem()
        found[label] = _bare(inspect.getsource(item))
        for name in _global_names(item.__code__) & item.__globals__.keys():
            value = inspect.unwrap(item.__globals__[name])  # a tf.function or another decorated one
            if not hasattr(value, "__name__"):
                found[name] = _constant(name, value)
            elif getattr(value, "__module__", None) == function.__module__:
                members = {name: value} if inspect.isfunction(value) else vars(value)
                todo |= {f"{name}.{key}()": member for key, member in members.items()
                         if inspect.isfunction(member) and f"{name}.{key}()" not in found}
    return [function.__module__, function.__qualname__, found]


def _constant(name, value):
    try:
        return json.dumps(value)
    except TypeError as error:
        raise TypeError(f"function: it uses the global variable {name!r} ({type(value).__name__}), expected constants "
                        "only: pass it, or what it is made from, as an argument") from error


def _global_names(code):
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _bare(source):
    tree = ast.parse(dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _stream():
    """Return where to show progress: in a notebook one line that is written over, so that a saved page reads well."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):
        return sys.stderr
    handle = sys.modules["IPython"].display.display({"text/plain": ""}, raw=True, display_id=True)
    return SimpleNamespace(flush=lambda: None, write=lambda text: text.strip() and handle.update(
        {"text/plain": text.strip()}, raw=True))
