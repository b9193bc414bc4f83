"""A chapter as a reader on Colab runs it: alone, outside the checkout, without the helpers.

What stands in for Colab: a new virtual environment that sees only what the helpers ask for, TensorFlow, a kernel and
the build back end (all linked from this environment, so that nothing is downloaded), an empty `google.colab`, and
this checkout as the git repository behind the public address. pip builds without isolation for the same reason.
The environment is made once, and the set-up cell, the same in all chapters, installs into it once. One chapter runs
from nothing; the others go on from the units of their smoke runs, which the installed helpers must know. Behind the
last cell the reader runs the code of the solutions.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import papermill
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.execution import failures

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
FROM_NOTHING = "02_mixed_batch_adversarial_training"
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, cwd=None, env=None):
    """Run a command and give what it prints; fail with everything that it wrote."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def closure(lines):
    """Installed distributions that the requirements need, their own requirements included, by name; no extras."""
    found, todo = {}, [Requirement(line) for line in lines]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and name not in found:
            found[name] = distribution(name)
            todo += [Requirement(line) for line in found[name].requires or []]
    return found


def link(distributions, folder):
    """Make the distributions importable from a folder, and nothing else: neither the helpers nor a .pth file."""
    for found in distributions:
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))


def environment_of(folder):
    """Make an environment like Colab's in a folder and return its Python."""
    run(sys.executable, "-m", "venv", folder)
    python, packages = folder / "bin" / "python", folder / "packages"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    packages.mkdir()
    needed = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"], "ipykernel", "hatchling"])
    link(needed.values(), packages)
    (site / "colab.pth").write_text(f"{packages}\n", encoding="utf-8")
    return python


def remote(folder):
    """This checkout, uncommitted changes included, as a git repository with the ref of the launch buttons."""
    hidden = shutil.ignore_patterns(".*", "_build", "executed", "__pycache__", "node_modules")
    shutil.copytree(ROOT, folder, ignore=hidden)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    run(*git, "init", "--quiet", "--initial-branch", REPOSITORY["branch"], cwd=folder)
    run(*git, "add", "--all", cwd=folder)
    run(*git, "commit", "--quiet", "--message", "The checkout under test", cwd=folder)
    return run("git", "rev-parse", "HEAD", cwd=folder)


def variables(base):
    """Environment variables: the kernel is Colab's, the repository's address leads to the local one."""
    kernel = base / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [str(base / "venv/bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HELPERS_", "PYTHON", "GIT_"))}
    return clean | {
        "HOME": str(base / "home"),
        "JUPYTER_PATH": str(base / "jupyter"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads the variable of a --no-... flag as the flag's opposite
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{(base / 'remote').as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY["url"],
    }


def solutions(notebook):
    """The code of a chapter's solutions: what its text has in fences of Python."""
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^```python\n(.*?)^```$", texts, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="session")
def colab(shared):
    """Folder with Colab's environment, in which the set-up cell has run, and what pip listed before and after."""
    base = shared / "colab"
    with FileLock(shared / "colab.lock"):
        if not (base / "installed.json").exists():
            python, environment = environment_of(base / "venv"), variables(base)
            commit, freeze = remote(base / "remote"), [python, "-m", "pip", "freeze", "--all"]
            (base / "stub/google/colab").mkdir(parents=True)
            (base / "stub/google/colab/__init__.py").touch()
            first = nbformat.read(CHAPTERS[0], 4)
            first.cells = next([cell] for cell in first.cells if cell.cell_type == "code")
            nbformat.write(first, base / "first.ipynb")
            before = run(*freeze, env=environment).splitlines()
            papermill("first.ipynb", base, environment | {"PYTHONPATH": str(base / "stub")})
            after = run(*freeze, env=environment).splitlines()
            (base / "installed.json").write_text(json.dumps([commit, before, after]), encoding="utf-8")
    return base


@pytest.mark.slow
def test_the_set_up_cell_installs_the_helpers_and_leaves_the_rest_alone(colab):
    commit, before, after = json.loads((colab / "installed.json").read_text(encoding="utf-8"))
    installed = {canonicalize_name(line.split("==")[0]) for line in before}
    assert {"tensorflow", "tensorflow-cpu"} & installed and "numpy" in installed
    assert PROJECT["name"] not in "".join(before), "the helpers were there before the set-up cell ran"
    assert set(after) - set(before) == {f"{PROJECT['name']} @ git+{REPOSITORY['url']}@{commit}"}
    assert set(before) <= set(after), "the set-up cell replaced packages"


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_alone_with_the_installed_helpers(chapter, tmp_path, smoke, colab):
    if chapter.stem != FROM_NOTHING:
        made = smoke(chapter.stem)
        if failures(made):
            pytest.skip("its smoke run failed, which is a test of its own")
        shutil.copytree(made.output / f"units/{chapter.stem}", tmp_path / f"_build/units/{chapter.stem}")
        for folder in {"networks", "defences"} & {path.name for path in made.output.iterdir()}:
            shutil.copytree(made.output / folder, tmp_path / "_build" / folder)
    units = set(tmp_path.rglob("*.npz"))
    notebook = nbformat.read(chapter, 4)
    notebook.cells += map(nbformat.v4.new_code_cell, solutions(notebook))
    nbformat.write(notebook, tmp_path / chapter.name)
    papermill(chapter.name, tmp_path, variables(colab))
    imported = run(colab / "venv/bin/python", "-c", "import helpers; print(helpers.__file__)", env=variables(colab))
    assert Path(imported).is_relative_to(colab / "venv")
    record = json.loads((tmp_path / "_build" / "results" / chapter.stem / "smoke.json").read_text(encoding="utf-8"))
    assert (record["chapter"], record["profile"]) == (chapter.stem, "smoke")
    assert chapter.stem == FROM_NOTHING or set(tmp_path.rglob("*.npz")) == units, "units were computed twice"
