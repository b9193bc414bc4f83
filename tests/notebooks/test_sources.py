"""The committed notebooks are clean sources: no outputs, stable ids, short cells, one set-up cell for all of them."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
LONGEST_CELL, MEDIAN_CELL, LONGEST_LINE = 20, 8, 78  # a page shows 80 columns
MACHINE_PATH = re.compile(r"(?<![\w.~])/(home|root|Users|work|tmp|mnt)/|\b[A-Z]:\\\\")

every_chapter = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def cells(path, kind="code", tag=None):
    """Cells of a notebook of one kind, all of them or those that carry the tag."""
    found = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]
    return [cell for cell in found if tag is None or tag in cell.metadata.get("tags", [])]


def setup(path):
    """Source of the cell that installs the helpers on Colab: the first code cell."""
    return cells(path)[0].source


def run(*command):
    """Run a module of this Python in the repository; fail with what it wrote."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_chapter():
    assert SOURCES


@every_chapter
def test_format_kernel_and_cell_ids(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))  # nbformat would give a cell without an id a new one
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    nbformat.validate(notebook)


@every_chapter
def test_sources_carry_no_outputs(path):
    run("nbstripout", "--keep-id", "--verify", str(path))


@every_chapter
def test_code_cells_are_short_and_no_line_is_cut_off_on_the_page(path):
    long = {cell.id: count for cell in cells(path) if (count := len(cell.source.splitlines())) > LONGEST_CELL}
    assert not long, f"more than {LONGEST_CELL} lines: {long}"
    wide = {cell.id: line for cell in cells(path) for line in cell.source.splitlines() if len(line) > LONGEST_LINE}
    assert not wide, f"more than {LONGEST_LINE} characters: {wide}"
    median = statistics.median(len(cell.source.splitlines()) for cell in cells(path))
    assert median <= MEDIAN_CELL, f"half of the cells have {median} lines or more"


@every_chapter
def test_no_cell_prints_what_a_record_returns(path):
    bare = []
    for cell in cells(path):
        statements = [] if "%pip" in cell.source else ast.parse(cell.source).body  # a magic is no Python
        last = ast.unparse(statements[-1]) if statements else ""
        if last.startswith("record.claim(") and "remove-output" not in cell.metadata.get("tags", []):
            bare.append(cell.id)
    assert not bare, f"a verdict ends these cells, and a page would show it as Python prints it: {bare}"


@every_chapter
def test_every_exercise_has_a_solution_that_is_folded(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    asked = re.findall(r"^:{3,}\{exercise\}\n:label: (\S+)$", text, re.MULTILINE)
    solved = re.findall(r"^:{3,}\{solution\} (\S+)\n:class: dropdown$", text, re.MULTILINE)
    assert asked and asked == solved and len(set(asked)) == len(asked)


@every_chapter
def test_one_cell_of_parameters_with_flat_literals(path):
    (cell,) = cells(path, tag="parameters")
    values = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        (target,) = statement.targets
        values[target.id] = ast.literal_eval(statement.value)
    assert values == {"PROFILE": "quick", "SEED": 0, "OVERRIDES": {}}


@every_chapter
def test_nothing_names_a_place_on_one_machine(path):
    assert not MACHINE_PATH.findall(path.read_text(encoding="utf-8"))


def test_set_up_cell_is_the_same_everywhere():
    assert len({setup(path) for path in SOURCES}) == 1
    assert len(setup(SOURCES[0]).splitlines()) <= 15


def test_set_up_cell_says_what_to_do_where_the_helpers_are_not_there(monkeypatch):
    plain = "\n".join(line for line in setup(SOURCES[0]).splitlines() if "%pip" not in line)
    exec(plain, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="make book.*make address"):
        exec(plain, {})


@every_chapter
def test_set_up_cell_installs_what_the_launch_button_opens(path):
    """Both name the repository of _config.yml, and one ref: chapter and helpers on Colab are of one version."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    assert f'"{REPOSITORY["url"]}"' in setup(path) and f'"git+{{url}}@{REPOSITORY["branch"]}"' in setup(path)


@every_chapter
def test_set_up_cell_leaves_the_packages_of_colab_alone(path):
    (install,) = [line for line in setup(path).splitlines() if "pip" in line]
    assert install.startswith("    %pip install ") and "--no-deps" in install.split()
    assert not re.search(r"tensorflow|keras|numpy|--upgrade|-U\b", install, re.IGNORECASE)


def test_repository_address_is_the_same_in_every_file():
    name = REPOSITORY["url"].rsplit("/", 1)[1]
    mention = re.compile(rf"github\.com/[\w.<>-]+/{name}|[\w.-]+\.github\.io/{name}")
    owner = REPOSITORY["url"].removeprefix("https://").split("/")[1]
    known = {f"github.com/{owner}/{name}", f"{owner.lower()}.github.io/{name}"}
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for file in tracked.stdout.split():
        if (ROOT / file).suffix in {".md", ".yml", ".cff", ".ipynb", ".py", ".toml", ""}:
            found = set(mention.findall((ROOT / file).read_text(encoding="utf-8")))
            assert found <= known, f"{file} names {found - known}; _config.yml says {REPOSITORY['url']}"


@pytest.mark.parametrize("tool", [("ruff", "check", "."), ("codespell_lib",)], ids=["ruff", "codespell"])
def test_lint(tool):
    run(*tool)
