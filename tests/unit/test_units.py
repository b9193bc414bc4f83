"""Units: what a file keeps, what makes a unit run again, and runs that are killed."""

import ast
import importlib
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

from helpers import execution, tracing, units
from helpers.book import Book, BookError


def square(x, log, offset=0):
    with open(log, "a") as file:
        file.write(f"{x}\n")
    return {"value": x * x + offset, "array": np.arange(x), "name": f"square of {x}"}


def everything():
    return {"float": 0.1 + 0.2, "int": 2**60, "bool": True, "text": "ε = 0.1", "none": None, "nan": math.nan,
            "floats": [0.1, 1e-300, -0.0], "nested": {"a": [1, [True, "x"]]}, "empty list": [], "empty text": "",
            "file": 1, "allow_pickle": 2, "index": 3, "array.x": np.ones(1), "": 4, "float32": np.float32(0.1),
            "array": np.float32([[0.1, 0.2]]), "labels": np.arange(3), "mask": np.array([True]),
            "words": np.array(["a", "bc"]), "empty": np.empty((0, 3)), "scalar": np.array(1.5), "int64": np.int64(3),
            "float32s": [np.float32(0.5)], "bool_": np.bool_(False)}


def grows(number):
    time.sleep(1.1)  # joblib looks at most once a second
    sys.grown = np.ones(6 * 10**7 if number > 1 else 0)  # 480 MB, after a first unit that joblib compares with
    return {"number": number, "pid": os.getpid()}


def forgets_to_return():
    everything()


def sleeps(seconds):
    time.sleep(seconds)
    return {"slept": True}


def nothing():
    return {}


def environment(number):
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"number": number, "pid": os.getpid(), "threads": [os.environ.get(name) for name in names]}


def fails(x):
    raise RuntimeError(f"no result for {x}")


def gives(kind):
    return {"a": {"set": {1}, "objects": np.array([{}]), "module": units, "list": [object()]}[kind]}


ARRAY = np.ones(2)


def uses_an_array():
    return {"a": ARRAY.sum()}


def equal(one, other):
    """Same keys in the same order, same types, same values, but for the seconds, which come last."""
    def exact(value):
        return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)

    assert list(one)[-1] == "seconds" and 0 <= one["seconds"] < 60
    return [(key, type(value), exact(value)) for key, value in one.items() if key != "seconds"] == [
        (key, type(value), exact(value)) for key, value in other.items() if key != "seconds"]


def calls(log):
    return sorted(map(int, log.read_text().split())) if log.exists() else []


# ── what a file keeps ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_come_in_the_order_of_the_grid_and_are_run_once(tmp_path):
    log = tmp_path / "log"
    grid = [{"x": x, "log": str(log)} for x in (3, 1, 2, 3)]
    found = units.run(square, iter(grid), folder=tmp_path, n_jobs=1)
    assert [result["value"] for result in found] == [9, 1, 4, 9]
    assert calls(log) == [1, 2, 3]
    again = units.run(square, grid[::-1], folder=tmp_path, n_jobs=1)
    assert all(map(equal, again, found[::-1]))
    assert calls(log) == [1, 2, 3]
    assert len(list((tmp_path / "square").iterdir())) == 3
    assert units.run(square, [], folder=tmp_path) == []


def test_a_mapping_of_units_gives_a_mapping_of_results(tmp_path):
    log = tmp_path / "log"
    grid = {key: {"x": x, "log": str(log)} for key, x in ((("a", 3), 3), (None, 1), (0.5, 3))}
    found = units.run(square, grid, folder=tmp_path, n_jobs=1)
    assert list(found) == list(grid) and [one["value"] for one in found.values()] == [9, 1, 9]
    again = units.run(square, list(grid.values()), folder=tmp_path, n_jobs=1)
    assert all(map(equal, again, found.values()))
    assert calls(log) == [1, 3], "the keys of the mapping are no part of a unit's"
    assert units.run(square, {}, folder=tmp_path) == {}


def test_each_type_comes_back_as_it_went_the_first_time_and_later(tmp_path):
    expected = everything() | {"float32": float(np.float32(0.1)), "int64": 3, "float32s": [0.5], "bool_": False}
    for _ in range(2):
        [found] = units.run(everything, [{}], folder=tmp_path, n_jobs=1)
        assert equal(found, expected)
        assert equal(*units.run(nothing, [{}], folder=tmp_path, n_jobs=1), {})
    with np.load(next((tmp_path / "everything").iterdir()), allow_pickle=False) as members:
        assert len(members.files) == 2 + sum(isinstance(value, np.ndarray) for value in expected.values())


@pytest.mark.parametrize("kind", ["set", "objects", "module", "list"])
def test_a_result_that_no_file_can_hold_is_refused(tmp_path, kind):
    with pytest.raises(TypeError, match="result 'a': got .*, expected numbers, strings"):
        units.run(gives, [{"kind": kind}], folder=tmp_path, n_jobs=1)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_unit_returns_a_dictionary(tmp_path):
    with pytest.raises(TypeError, match="function: got None, expected that forgets_to_return returns a dictionary"):
        units.run(forgets_to_return, [{}], folder=tmp_path, n_jobs=1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_unit_is_named_and_the_others_are_kept(tmp_path, jobs):
    with pytest.raises(RuntimeError, match="no result for 1") as caught:
        units.run(fails, [{"x": 1}, {"x": 1}], folder=tmp_path, n_jobs=jobs)
    assert "in the unit fails({'x': 1})" in getattr(caught.value, "__notes__", [])
    assert not list(tmp_path.rglob("*.npz"))


def test_every_damaged_byte_is_noticed(tmp_path):
    [expected] = units.run(square, [{"x": 3, "log": str(tmp_path / "log")}], folder=tmp_path, n_jobs=1)
    path = next((tmp_path / "square").iterdir())
    content, noticed = path.read_bytes(), 0
    flipped = (content[:at] + bytes([byte ^ bit]) + content[at + 1:]
               for at, byte in enumerate(content) for bit in (1, 128))
    for one in itertools.chain(flipped, (content[:i] for i in range(0, len(content), 7))):
        path.write_bytes(one)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = units._load(path)
        if found is None:
            noticed += 1
            assert str(path) in str(caught[0].message) and "corrupt" in str(caught[0].message)
            assert not path.exists()
        else:
            assert equal(found, expected)  # a date or a flag that nobody reads
    assert noticed > len(content)


def test_a_damaged_header_is_noticed_where_the_checksum_comes_late(tmp_path):
    units.run(square, [{"x": 10000, "log": str(tmp_path / "log")}], folder=tmp_path, n_jobs=1)
    path = next((tmp_path / "square").iterdir())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(10000,)", b"(1000 ,)"))
    assert path.read_bytes() != content
    with pytest.warns(UserWarning, match="wrong checksum"):
        assert units._load(path) is None


def test_a_corrupt_file_is_named_and_computed_again(tmp_path):
    log = tmp_path / "log"
    grid = [{"x": x, "log": str(log)} for x in (1, 2)]
    expected = units.run(square, grid, folder=tmp_path, n_jobs=1)
    spoilt = sorted((tmp_path / "square").iterdir())[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-30])
    with pytest.warns(UserWarning, match=f"{spoilt} is corrupt .*: computed again"):
        assert all(map(equal, units.run(square, grid, folder=tmp_path, n_jobs=1), expected))
    assert len(calls(log)) == 3


def test_no_pickle_is_loaded(tmp_path):
    [expected] = units.run(nothing, [{}], folder=tmp_path, n_jobs=1)
    path = next((tmp_path / "nothing").iterdir())
    np.savez(path, index='{"a": null}', **{"array.a": np.array([{"a": 1}], dtype=object)})
    with pytest.warns(UserWarning, match="corrupt .*allow_pickle=False"):
        assert equal(*units.run(nothing, [{}], folder=tmp_path, n_jobs=1), expected)


def test_the_seconds_of_an_earlier_run_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_EARLIER", {})
    grid = [{"seconds": 0.1}, {"seconds": 0.2}]
    first = units.run(sleeps, grid, folder=tmp_path, n_jobs=1)
    units.run(sleeps, grid, folder=tmp_path, n_jobs=1)
    assert units.earlier_seconds() == 0, "this run's clock has counted them"
    assert [0.1 <= result["seconds"] < 5 and result["slept"] is True for result in first] == [True, True]
    monkeypatch.setattr(units, "_EARLIER", {})
    for _ in range(2):
        assert units.run(sleeps, grid, folder=tmp_path, n_jobs=1) == first
        assert units.earlier_seconds() == sum(result["seconds"] for result in first)
    monkeypatch.setattr(units, "_EARLIER", {})
    units.run(sleeps, grid, folder=tmp_path, n_jobs=2)
    assert units.earlier_seconds() == sum(result["seconds"] for result in first) / 2
    monkeypatch.setattr(units, "_EARLIER", {})
    units.run(sleeps, grid[:1], folder=tmp_path, n_jobs=2)
    assert units.earlier_seconds() == first[0]["seconds"], "one unit runs alone"


def test_what_each_unit_took_is_known_once_whether_it_was_computed_or_found(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_TAKEN", {})
    for _ in range(2):
        first = units.run(sleeps, [{"seconds": 0.1}, {"seconds": 0.3}], folder=tmp_path, n_jobs=1)
        assert units.taken() == {"sleeps": [round(result["seconds"], 1) for result in first[::-1]]}
    units.run(nothing, [{}], folder=tmp_path, n_jobs=1)
    assert [*units.taken()] == ["sleeps", "nothing"] and len(units.taken()["nothing"]) == 1


@pytest.mark.parametrize("workers, expected", [(1, 13 + 4), (2, 7 + 2), (3, 5 + 2), (64, 5 + 2)])
def test_a_function_waits_for_the_one_before_and_its_longest_unit_comes_first(workers, expected):
    assert units.makespan({"train": [1, 3, 4, 5], "attack": [2, 2]}, workers) == expected
    assert units.makespan({}, workers) == 0


# ── what makes a unit run again ───────────────────────────────────────────────────────────────────────────────────────

MODULE = '''
"""A chapter's code."""
import functools
import numpy as np
from helpers.files import sha256

STEPS = 10
EPSILONS = [0.1, 0.2]

def helper(x):
    """Double it."""
    return 2 * x  # twice

def unit(x, eps=0.1):
    """Return a number."""
    # a comment
    values = [helper(x) * STEPS for _ in EPSILONS]
    return {"value": float(np.sum(values)) + eps}

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

@functools.cache  # as tf.function, an object that holds the function
def cached(n):
    return n + 100

class Base:
    rate = 5

    def call(self, x):
        return x + 1

    @property
    def reach(self):
        return 6

    @functools.cached_property
    def kept(self):
        return 7

    @classmethod
    def made(cls):
        return cls()

    class Inner:
        depth = 8

class Layer(Base):
    pass

one = lambda x: x - 1
two = lambda x: x - 2

def recursive(n):
    layer = Layer.made()
    return {"even": even(n), "called": layer.call(n), "cached": cached(n), "small": one(two(n)),
            "sum": layer.rate + layer.reach + layer.kept + layer.Inner.depth}

def plot():
    return "red"
'''


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """Write a module's text and return how many files the runs of `unit` and `recursive` have left so far."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"chapter_{time.monotonic_ns()}"
    path = tmp_path / f"{name}.py"

    def run(text, function="unit", folder="kept", **options):
        path.write_text(text)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        grid = options.pop("grid", [{"x": 1}] if function == "unit" else [{"n": 4}])
        units.run(getattr(module, function), grid, folder=tmp_path / folder, n_jobs=1, **options)
        return len(list((tmp_path / folder / function).iterdir()))

    return run


@pytest.mark.parametrize(("old", "new"), [
    ("# a comment", "# another comment, longer"), ('"""Return a number."""', '"""Return\n    a sum."""'),
    ("  # twice", ""), ('    """Return a number."""\n', ""), ('"""Double it."""', "'''Twice.'''"),
    ('    """Double it."""\n', ""),
    ("2 * x", "(2  *  x)"), ("STEPS = 10", "STEPS = 5 + 5"), ('"red"', '"blue"'), ("\ndef unit", "\n\n\ndef unit"),
    ('return "red"', 'return STEPS'),
])
def test_what_changes_no_result_keeps_a_unit(chapter, old, new):
    assert MODULE.count(old) == 1
    assert chapter(MODULE) == 1
    assert chapter(MODULE.replace(old, new)) == 1


@pytest.mark.parametrize(("old", "new"), [
    ("+ eps", "- eps"), ("2 * x", "3 * x"), ("STEPS = 10", "STEPS = 11"), ("[0.1, 0.2]", "[0.1, 0.3]"),
    ("eps=0.1", "eps=0.2"),
])
def test_what_may_change_a_result_runs_a_unit_again(chapter, old, new):
    assert MODULE.count(old) == 1
    assert chapter(MODULE) == 1
    assert chapter(MODULE.replace(old, new)) == 2


@pytest.mark.parametrize(("old", "new", "files"), [
    ("odd(n - 1)", "odd(n - 3)", 2), ("even(n - 1)", "even(n - 3)", 2), ("n + 100", "n + 9", 2), ("2 * x", "x", 1),
    ("x + 1", "x + 2", 2), ("rate = 5", "rate = 4", 2), ("return 6", "return 4", 2), ("return 7", "return 4", 2),
    ("return cls()", "return Layer()", 2), ("depth = 8", "depth = 4", 2), ("x - 1", "x - 3", 2), ("x - 2", "x - 3", 2),
    ("class Layer(Base):", "class Layer(Base, object):", 1), ("class Layer(Base):", "class Layer(Base, Exception):", 2),
])
def test_functions_that_call_each_other_classes_and_decorated_ones_count(chapter, old, new, files):
    assert MODULE.count(old) == 1
    assert chapter(MODULE, "recursive") == 1
    assert chapter(MODULE.replace(old, new), "recursive") == files


def test_arguments_data_and_versions_count(chapter, monkeypatch):
    assert chapter(MODULE, grid=[{"x": 1}]) == 1
    assert chapter(MODULE, grid=[{"x": 1, "eps": 0.1}]) == 1  # the default, written out
    assert chapter(MODULE, grid=[{"eps": 0.1, "x": 1}]) == 1
    assert chapter(MODULE, grid=[{"x": np.int64(1)}]) == 1
    assert chapter(MODULE, grid=[{"x": 2}]) == 2
    assert chapter(MODULE, grid=[{"x": 1}], data="another sha256") == 3
    versions = units.versions
    for files, package in enumerate(["numpy", "scipy", "scikit-learn", "scikit-image", "tensorflow", "keras"], start=4):
        monkeypatch.setattr(units, "versions", lambda *names, new=package: {
            name: "9.9" if name == new else version for name, version in versions(*names).items()})
        assert chapter(MODULE, grid=[{"x": 1}]) == files


@pytest.fixture
def touch(tmp_path, monkeypatch):
    """Change a function, a class or a whole module in a copy of the helpers that the key is made from."""
    package = tmp_path / "helpers"
    shutil.copytree(tracing._FOLDER, package)
    monkeypatch.setattr(tracing, "_FOLDER", package)

    def change(label, statement="extra = 1"):
        module, _, name = label.partition(".")
        tree = ast.parse((package / f"{module}.py").read_text())
        [body] = [node.body for node in tree.body if getattr(node, "name", None) == name] if name else [tree.body]
        body[-1:-1] = ast.parse(statement).body
        (package / f"{module}.py").write_text(ast.unparse(tree))

    return change


FIT = ("training.fit", "training.descend", "training._epoch", "models.predict", "losses.cross_entropy")
OTHER = ("training.Adversary", "svm.kernel")
USES = {  # how a unit comes to use helpers.training: what it hangs on then, and what of that module it does not
    "module": ("from helpers import training", "len(training.__name__)", (*FIT, "training.Adversary"), ("svm.kernel",)),
    "attribute": ("from helpers import training", "training.fit", FIT, OTHER),
    "name": ("from helpers.training import fit", "fit", FIT, OTHER),
    "alias": ("from helpers import training as t", "t.fit", FIT, OTHER),
    "package": ("import helpers.training", "helpers.training.fit", (*FIT, "training.Adversary"), ()),
    "inside": ("", "0\n    from helpers import training\n    y = training.fit", FIT, OTHER),
    "value": ("from helpers import training", "getattr(training, 'fit')", (*FIT, "training.Adversary"),
              ("svm.kernel",)),
    "default": ("from helpers.training import fit\ndef other(how=fit):\n    return how", "other()", FIT, OTHER),
    "closure": ("from helpers.training import fit\ndef make(how):\n    def made():\n        return how\n"
                "    return made\nother = make(fit)", "other()", FIT, OTHER),
    "base class": ("from helpers.training import Adversary\nclass Mine(Adversary):\n    pass", "Mine",
                   ("training.Adversary", "threat.projection", "models.inference"), ("training.fit", "attacks.pgd")),
}


@pytest.mark.parametrize(("imports", "use", "reached", "not_reached"), USES.values(), ids=USES)
def test_the_helpers_that_a_unit_reaches_count(chapter, touch, imports, use, reached, not_reached):
    text = (f"{imports}\ndef helper(x):\n    y = {use}\n    return str(y)[:5]\n"
            "def unit(x):\n    return {'y': helper(x)}\n")
    assert chapter(text) == 1
    touch("training", "'a docstring that moved'")
    for label in ("figures.show", "verdicts.claims", "files.sha256", "units.run", *not_reached):
        touch(label)  # these compute nothing, or not for this unit
    assert chapter(text) == 1
    for files, label in enumerate(reached, start=2):
        touch(label)
        assert chapter(text) == files, label


def test_what_runs_on_import_counts_for_all_who_reach_the_module(chapter, touch):
    text = "from helpers import losses, attacks\ndef unit(x):\n    return {'y': str(attacks.pgd)[:5]}\n"
    assert chapter(text) == 1
    touch("losses", "if True:\n    wrong = None")
    assert chapter(text) == 2
    touch("losses", "new = 1")
    assert chapter(text) == 2
    touch("svm", "if True:\n    kernel = None")
    assert chapter(text) == 2


def test_a_layer_that_keras_finds_by_its_name_counts(chapter, touch):
    text = "from helpers import filters\ndef unit(x):\n    return {'y': str(filters.gaussian)[:5]}\n"
    layer = next(label for label in tracing.reached({("filters", "gaussian")}) if label == "helpers.filters on import")
    assert "register_keras_serializable" in tracing.reached({("filters", "gaussian")})[layer]
    assert chapter(text) == 1
    touch("filters.Filter")
    assert chapter(text) == 2


def test_what_a_default_or_a_closure_holds_counts(chapter):
    text = ("RATE = 0.1\ndef make(k):\n    def made(x):\n        return k * x\n    return made\ntwice = make(2)\n"
            "def helper(x, rate=RATE):\n    return twice(x) * rate\ndef unit(x):\n    return {'y': helper(x)}\n")
    assert chapter(text) == 1
    assert chapter(text.replace("RATE = 0.1", "RATE = 0.2")) == 2
    assert chapter(text.replace("make(2)", "make(3)")) == 3
    assert chapter(text.replace("k * x", "k + x")) == 4


def test_what_units_were_made_with_is_kept_beside_them(chapter, touch, tmp_path):
    text = "from helpers import training\nSTEPS = 3\ndef unit(x):\n    return {'y': str(training.fit)[:STEPS]}\n"
    chapter(text, grid=[{"x": 1}, {"x": 2}])
    first, second = units.kept(tmp_path / "kept")
    assert first["function"] == "unit" and first["arguments"] == {"x": 1} and second["arguments"] == {"x": 2}
    assert first["seconds"] >= 0 and set(first["versions"]) == set(units.PACKAGES)
    assert tracing.changed(first["code"], text) == []
    assert tracing.changed(first["code"], text.replace("= 3", "= 4")) == ["STEPS"]
    assert tracing.changed(first["code"], text.replace("'y'", "'z'")) == ["unit"]
    touch("training.descend")
    assert tracing.changed(first["code"], text) == ["helpers.training.descend"]
    chapter(text, grid=[{"x": 1}])
    assert [unit["arguments"]["x"] for unit in units.kept(tmp_path / "kept")] == [2, 1], "one that is superseded goes"
    for name, content in ((f".{'0' * 64}.npz", b""), (f"{'1' * 64}.npz", b"half")):  # left by a process that was killed
        (first["path"].parent / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{'1' * 64}.npz is corrupt"):
        assert len(units.kept(tmp_path / "kept")) == 2


def test_the_cost_of_a_change_is_known_before_it_is_paid(chapter, touch, tmp_path):
    text = "from helpers import training\ndef unit(x):\n    return {'y': str(training.fit)[:5]}\n"
    chapter(text, grid=[{"x": 1}, {"x": 2}], folder="units/01_toy")
    cells = [nbformat.v4.new_code_cell("%pip install nothing", id="setup"), nbformat.v4.new_code_cell(text)]
    book = Book(tmp_path, tmp_path)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks/01_toy.ipynb")
    assert execution.cost(book, "01_toy") == {"unit": {"units": 2, "again": 0, "seconds": 0, "changed": set()}}
    archive, number = execution.keep(book, "01_toy")
    assert archive == tmp_path / "book/units/01_toy.tar.xz" and number == 2
    touch("training.Adversary")
    assert execution.cost(book, "01_toy")["unit"]["again"] == 0
    touch("training.descend")
    row = execution.cost(book, "01_toy")["unit"]
    assert row.pop("seconds") > 0
    assert row == {"units": 2, "again": 2, "changed": {"helpers.training.descend"}}
    with pytest.raises(BookError, match="01_toy: no finished unit of this code"):
        execution.keep(book, "01_toy")


def test_what_is_packed_on_one_machine_is_finished_on_another(tmp_path):
    grid, here, there = [{"x": x, "log": str(tmp_path / "log")} for x in (2, 3)], tmp_path / "here", tmp_path / "there"
    found = units.run(square, grid, folder=here, n_jobs=1)
    paths = [unit["path"] for unit in units.kept(here)]
    for name, order in (("one", 1), ("two", -1)):
        units.pack(tmp_path / f"{name}.tar.xz", here, paths[::order])
    one, two = ((tmp_path / f"{name}.tar.xz").read_bytes() for name in ("one", "two"))
    assert one == two, "the same units, other bytes"
    for _ in range(2):  # what is there stays
        units.unpack(tmp_path / "one.tar.xz", there, tmp_path)
    for a, b in zip(found, units.run(square, grid, folder=there, n_jobs=1), strict=True):
        equal(a, b)
    assert (tmp_path / "log").read_text() == "2\n3\n", "computed again"


def saves(name):
    return {"network": name, "not": "0" * 64}


def test_networks_that_units_have_made_go_along(tmp_path):
    names = [f"{digit * 64}.keras" for digit in "123"]
    for name in names[:2]:
        path = tmp_path / "here/networks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    units.run(saves, [{"name": name} for name in names[1:]], folder=tmp_path / "here/units", n_jobs=1)
    paths = [unit["path"] for unit in units.kept(tmp_path / "here/units")]
    found = units.handed_on(paths, tmp_path / "here")
    assert [path.name for path in found] == [names[1]], "the one that is named and there"
    units.pack(tmp_path / "one.tar.xz", tmp_path / "here/units", paths, found)
    units.unpack(tmp_path / "one.tar.xz", tmp_path / "there/units", tmp_path / "there")
    assert (tmp_path / "there/networks" / names[1]).read_text() == names[1]
    assert len(list((tmp_path / "there").rglob("*.*"))) == 3


def test_a_damaged_archive_is_named_and_what_is_no_unit_is_refused(tmp_path):
    units.run(square, [{"x": 2, "log": str(tmp_path / "log")}], folder=tmp_path / "here", n_jobs=1)
    archive, (unit,) = tmp_path / "01_toy.tar.xz", units.kept(tmp_path / "here")
    units.pack(archive, tmp_path / "here", [unit["path"]])
    whole = archive.read_bytes()
    for damaged in (whole[:-40], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b"", b"no tar"):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="01_toy.tar.xz is damaged"):
            units.unpack(archive, tmp_path / "there", tmp_path)
    for name in ("../" + "0" * 64 + ".npz", "square/short.npz", "/square/" + "0" * 64 + ".npz"):
        with tarfile.open(archive, "w:xz") as tar:
            tar.addfile(tarfile.TarInfo(name))
        with pytest.raises(ValueError, match="not a unit"):
            units.unpack(archive, tmp_path / "there", tmp_path)
    assert not list(tmp_path.rglob("there/**/*.npz"))


def test_what_a_notebook_imports_is_known_by_name():
    assert tracing.imported("import helpers\nimport numpy") == {"__init__"}
    found = tracing.imported("def late():\n    from helpers import losses as l\nfrom helpers.threat import ThreatModel")
    assert {"__init__", "losses", "threat"} <= found and not {"svm", "rejection", "site"} & found


def test_the_key_is_the_same_in_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from helpers import units\nA, B, C, D, E = range(5)\n"
                      "def unit(x):\n    return {'a': A + B + C + D + E}\n"
                      "units.run(unit, [{'x': 1}], folder='kept', n_jobs=1)\n")
    for seed in "123":
        subprocess.run([sys.executable, script], cwd=tmp_path, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert len(list((tmp_path / "kept/unit").iterdir())) == 1


@pytest.mark.parametrize(("function", "kwargs", "message"), [
    (square, {"x": 1}, "missing a required argument: 'log'"),
    (square, {"x": 1, "log": "", "y": 2}, "unexpected keyword argument 'y'"),
    (square, {"x": np.ones(3), "log": ""}, "argument 'x': got array.*, expected numbers"),
    (square, {"x": 1, "log": Path("log")}, "argument 'log': got .*Path"),
    (lambda x: {}, {"x": 1}, "function: got .*<lambda>"),
    (np.sin, {"x": 1}, "function: got <ufunc 'sin'>"),
    (uses_an_array, {}, r"global variable 'ARRAY' of uses_an_array: got array"),
])
def test_what_cannot_be_a_unit_is_refused_before_it_runs(tmp_path, function, kwargs, message):
    with pytest.raises(TypeError, match=message):
        units.run(function, [kwargs], folder=tmp_path, n_jobs=1)
    assert not list(tmp_path.iterdir())


def test_a_closure_is_refused(tmp_path):
    captured = 3

    def unit():
        return {"a": captured}

    with pytest.raises(TypeError, match="without a closure"):
        units.run(unit, [{}], folder=tmp_path)


@pytest.mark.parametrize("jobs", [0, -1])
def test_the_number_of_processes_is_checked(tmp_path, jobs):
    with pytest.raises(ValueError, match=f"n_jobs: got {jobs}, expected None or at least 1"):
        units.run(nothing, [{}], folder=tmp_path, n_jobs=jobs)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_processes_have_one_thread_each_and_give_the_same(tmp_path):
    grid = [{"number": number} for number in range(4)]
    found = units.run(environment, grid, folder=tmp_path, n_jobs=2)
    assert [result["number"] for result in found] == [0, 1, 2, 3]
    assert all(result["threads"] == ["1"] * 4 and result["pid"] != os.getpid() for result in found)
    assert "TF_NUM_INTRAOP_THREADS" not in os.environ
    log = str(tmp_path / "log")
    one, two = (units.run(square, [{"x": x, "log": log} for x in range(4)], folder=tmp_path / str(jobs), n_jobs=jobs)
                for jobs in (1, 2))
    assert all(map(equal, one, two))


def test_the_last_unit_of_a_resumed_run_runs_like_the_others(tmp_path):
    units.run(environment, [{"number": 0}, {"number": 1}], folder=tmp_path, n_jobs=2)
    [*_, last] = units.run(environment, [{"number": 0}, {"number": 1}, {"number": 2}], folder=tmp_path, n_jobs=2)
    assert last["threads"] == ["1"] * 4


@pytest.mark.parametrize(("gpu", "elsewhere"), [(None, True), ("/usr/bin/nvidia-smi", False)])
def test_units_share_a_gpu_one_after_the_other(tmp_path, monkeypatch, gpu, elsewhere):
    monkeypatch.setattr(shutil, "which", lambda name: gpu)
    monkeypatch.setattr(units, "cpu_count", lambda: 2)
    found = units.run(environment, [{"number": 0}, {"number": 1}], folder=tmp_path)
    assert all((result["pid"] != os.getpid()) == elsewhere for result in found)


def test_a_process_that_has_grown_is_replaced_without_a_word(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = units.run(grows, [{"number": number} for number in range(6)], folder=tmp_path, n_jobs=2)
    assert not caught
    assert [result["number"] for result in found] == list(range(6))
    assert len({result["pid"] for result in found}) > 2


def test_progress_is_one_line(tmp_path, capsys):
    grid = [{"x": x, "log": str(tmp_path / "log")} for x in range(3)]
    units.run(square, grid, folder=tmp_path, n_jobs=1, label="Seeds")
    output = capsys.readouterr()
    assert output.err == "" and output.out.strip().count("\n") == 0
    assert output.out.rsplit("\r", 1)[-1].startswith("Seeds: 100%") and "3/3" in output.out


@pytest.mark.slow
def test_functions_of_a_notebook_run_in_processes_and_follow_edits(tmp_path):
    code = MODULE.replace("@functools.cache ", "")  # neither of which a pickle can send to a process from a notebook
    code = code.replace("@functools.cached_property", "@property")
    cells = [code.replace('return {"value"', 'return {"pid": __import__("os").getpid(), "value"'),
             "import os\nfrom helpers import units\ngrid = [{'x': 1}, {'x': 2}]\n"
             "def count(): return len(os.listdir('kept/unit'))",
             "first = units.run(unit, grid, folder='kept', n_jobs=2)\n"
             "assert [r['value'] for r in first] == [40.1, 80.1] and os.getpid() not in [r['pid'] for r in first]",
             "assert units.run(unit, grid, folder='kept', n_jobs=2) == first and count() == 2",
             "def helper(x):\n    return 2 * x",
             "units.run(unit, grid, folder='kept', n_jobs=2)\nassert count() == 2",
             "def helper(x):\n    return 3 * x",
             "assert units.run(unit, grid, folder='kept', n_jobs=2)[0]['value'] == 60.1 and count() == 4",
             "STEPS = 1",
             "assert units.run(unit, grid, folder='kept', n_jobs=2)[0]['value'] == 6.1 and count() == 6",
             "class Layer(Base):\n    def call(self, x):\n        return x + 2",
             "grid = [{'n': 2}, {'n': 3}]\n"
             "assert units.run(recursive, grid, folder='kept', n_jobs=2)[0]['called'] == 4",
             "class Layer(Base):\n    def call(self, x):\n        return x + 5",
             "assert units.run(recursive, grid, folder='kept', n_jobs=2)[0]['called'] == 7",
             "Base.rate = 6",
             "assert units.run(recursive, grid, folder='kept', n_jobs=2)[0]['sum'] == 27"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    done = papermill.execute_notebook(tmp_path / "notebook.ipynb", tmp_path / "done.ipynb", kernel_name="python3",
                                      cwd=str(tmp_path), progress_bar=False, coalesce_streams=True)
    bars = [output["text"] for output in done.cells[2].outputs]
    assert len(bars) == 1 and bars[0].strip().count("\n") == 0 and bars[0].startswith("unit: 100%"), bars


# ── runs that are killed ──────────────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys, time
import numpy as np
from helpers import units

def unit(seed):
    with open("log", "a") as file:
        file.write(f"{seed}\\n")
    time.sleep(0.15)
    return {"values": np.random.default_rng(seed).normal(size=2000), "mean": seed / 3}

if __name__ == "__main__":
    save = np.savez
    def half(path, **members):
        save(path, **members)
        if len(os.listdir("kept/unit")) > 2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2:]:
        np.savez = half
    found = units.run(unit, [{"seed": seed} for seed in range(6)], folder="kept", n_jobs=int(sys.argv[1]))
    np.save("found.npy", np.stack([np.append(result["values"], result["mean"]) for result in found]))
"""


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(KILLED)
    return subprocess.Popen([sys.executable, "script.py", *arguments], cwd=folder, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def whole_units(folder):
    return [path for path in folder.glob("kept/unit/*.npz") if not path.name.startswith(".")]


def check_that_it_goes_on(folder, jobs):
    before = {path: path.stat().st_mtime_ns for path in whole_units(folder)}
    assert 0 < len(before) < 6
    assert all(units._load(path) for path in before), "a killed run left a damaged unit"
    log = calls(folder / "log")
    assert start(folder, jobs).wait(60) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a whole unit was computed again"
    assert len(whole_units(folder)) == 6
    assert len(calls(folder / "log")) - len(log) == 6 - len(before)
    reference = folder.with_name(f"{folder.name}_reference")
    assert start(reference, jobs).wait(60) == 0
    assert (folder / "found.npy").read_bytes() == (reference / "found.npy").read_bytes()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_killed_in_a_unit_goes_on(tmp_path, jobs):
    process = start(tmp_path / "run", jobs)
    while len(whole_units(tmp_path / "run")) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    process.stderr.close()
    assert not (tmp_path / "run/found.npy").exists()
    check_that_it_goes_on(tmp_path / "run", jobs)


def test_a_run_killed_in_the_middle_of_a_write_goes_on(tmp_path):
    process = start(tmp_path / "run", "1", "half")
    assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    assert len(whole_units(tmp_path / "run")) == 2
    assert len(list((tmp_path / "run/kept/unit").iterdir())) == 3, "the half-written file keeps its temporary name"
    check_that_it_goes_on(tmp_path / "run", "1")
