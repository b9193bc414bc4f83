"""Units of a long run: each result is kept as soon as it is there, so that a killed run goes on where it stopped."""

import ast
import dis
import hashlib
import inspect
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from textwrap import dedent
from types import CodeType

import numpy as np
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

from helpers import files

PACKAGES = ("numpy", "scipy", "scikit-learn", "scikit-image", "tensorflow", "keras")  # which may change a result
_EARLIER = {}  # path of a unit: seconds, shared among the cores, that an earlier run spent on it
NO_COMPUTE = {"__init__", "__main__", "address", "book", "cli", "execution", "figures", "files", "primer", "profiles",
              "records", "report", "site", "units"}


def run(function, grid, *, folder, n_jobs=None, label="", data=None) -> list[dict] | dict[object, dict]:
    """Return `function(**kwargs)` for each `kwargs` of `grid`, in order; what `folder` holds already is not run again.

    Where `grid` is a mapping, key -> kwargs, so is what comes back, key -> result; the keys may be anything.
    `function` is a plain function of plain JSON values, from a module or a notebook, and returns a dictionary of
    numbers, strings, lists and arrays, to which the "seconds" it took are added. Each result is kept in
    `folder/<function>/<key>.npz`. The key covers the arguments; the code (not its comments) of the function, of what it
    uses from its own module, and of the helper modules that these use and import in turn; the versions of
    `PACKAGES`; and `data`, a plain value such as a data set's `sha256`.
    `n_jobs` processes of one thread each compute; None means one per core, or a single one where a GPU is.
    Raises TypeError for arguments, results and global variables that are not such values, ValueError for `n_jobs` < 1.
    """
    jobs = n_jobs if n_jobs is not None else 1 if shutil.which("nvidia-smi") else cpu_count()
    if jobs < 1:
        raise ValueError(f"n_jobs: got {n_jobs}, expected None or at least 1")
    base = [_code(function), versions(*PACKAGES), data]
    units = [(Path(folder) / function.__name__ / f"{_key(function, kwargs, base)}.npz", kwargs)
             for kwargs in (grid.values() if isinstance(grid, Mapping) else grid)]
    results, jobs = {path: _load(path) for path, _ in units}, max(1, min(jobs, len(units)))
    for path, result in results.items():
        _EARLIER.setdefault(path, result["seconds"] / jobs if result else 0.0)
    todo = {path: kwargs for path, kwargs in units if results[path] is None}
    threads = 1 if jobs > 1 else None  # also for the last unit of a resumed run: the number of threads changes sums
    with warnings.catch_warnings(), parallel_config("loky", inner_max_num_threads=threads):
        warnings.filterwarnings("ignore", "A worker stopped")  # joblib replaces one that TensorFlow has made large
        done = Parallel(jobs, return_as="generator_unordered", batch_size=1)(
            delayed(_compute)(function, kwargs, path, threads) for path, kwargs in todo.items())
        for path in tqdm(done, label or function.__name__, len(results), initial=len(results) - len(todo), unit="unit",
                         file=sys.stdout, ncols=80):
            results[path] = _load(path)
    found = [results[path] for path, _ in units]
    return dict(zip(grid, found, strict=True)) if isinstance(grid, Mapping) else found


def earlier_seconds() -> float:
    """Return how long the units took that this process found finished, shared among as many cores as it uses."""
    return sum(_EARLIER.values())


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; TensorFlow may be there as tensorflow-cpu."""
    return {name: next((found.version for label in (name, f"{name}-cpu")
                        for found in metadata.distributions(name=label)), "unknown") for name in packages}


def _compute(function, kwargs, path, threads):
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
    index = {name: None if f"array.{name}" in arrays else _json(f"result {name!r}", value)
             for name, value in result.items()}  # names every member, so that a lost one is noticed
    with files.atomic(path) as temporary:
        np.savez(temporary, index=json.dumps(index), **arrays)
    return path


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
    arguments = {name: _json(f"argument {name!r}", value) for name, value in bound.arguments.items()}
    return hashlib.sha256(_json("data", [base, arguments]).encode()).hexdigest()


def _json(what, value):
    try:
        return json.dumps(value, default=np.generic.item)
    except TypeError as error:
        raise TypeError(f"{what}: got {value!r:.80}, expected numbers, strings, lists, or None") from error


def _code(function):
    """Return the code that `function` runs, without comments, and the constants of its module that it uses."""
    if not inspect.isfunction(function) or not function.__name__.isidentifier() or function.__closure__:
        raise TypeError(f"function: got {function!r}, expected a plain function with a name and without a closure")
    found, todo, modules = {}, {function.__name__: function}, set()
    while todo:
        label, value = todo.popitem()
        value, uses = inspect.unwrap(value), {}  # what a tf.function or a class method holds
        if not hasattr(value, "__name__"):
            found[label] = _json(f"global variable {label!r} of {function.__name__}", value)
            continue
        modules.add(getattr(value, "__module__", None) or value.__name__)
        if getattr(value, "__module__", None) != function.__module__:
            continue
        if inspect.isfunction(value):
            found[label], known = _bare(inspect.getsource(value)), value.__globals__
            modules |= _imported(found[label])
            uses = {name: known[name] for name in _global_names(value.__code__) & known.keys()}
        elif inspect.isclass(value):
            found[label] = [base.__qualname__ for base in value.__mro__]
            modules |= {base.__module__ for base in value.__mro__}
            uses = _members(value)
        todo |= {name: used for name, used in uses.items() if name not in found}
    return [function.__module__, function.__qualname__, sorted(found.items()), _helpers(modules)]


def _members(kind):
    """Return what a class and its bases in the same module hold: functions, those of properties, and plain values."""
    body = {f"{base.__qualname__}.{name}": member for base in reversed(kind.__mro__)
            if base.__module__ == kind.__module__ for name, member in vars(base).items()}
    ends = {f"{name}.{end}": getattr(member, end, None) for name, member in body.items()
            for end in ("fget", "fset", "fdel", "func")}  # of a property, or a functools.cached_property
    return {name: end for name, end in ends.items() if end} | {
        name: member for name, member in body.items() if inspect.isfunction(inspect.unwrap(member))
        or not hasattr(member, "__get__") and not name.endswith(("__", "._abc_impl"))}


def _helpers(modules):
    """Return the code of the helpers among `modules` and of what they import, but for those that compute nothing."""
    found, todo = {}, set(modules)
    while todo:
        package, _, name = todo.pop().partition(".")
        if package == "helpers":  # the package itself may stand for any of its modules
            for path in Path(__file__).parent.glob(f"{name.partition('.')[0] or '*'}.py"):
                if path.stem not in NO_COMPUTE | found.keys():
                    found[path.stem] = _bare(path.read_text(encoding="utf-8"))
                    todo |= _imported(found[path.stem])
    return sorted(found.items())


def _imported(source):
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".") for node in nodes for alias in node.names}


def _global_names(code):
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _bare(source):
    tree = ast.parse(dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
