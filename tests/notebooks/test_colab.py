"""A chapter as a reader on Colab runs it: alone, outside the checkout, without the helpers.

What stands in for Colab: a new virtual environment that sees only what the helpers ask for, TensorFlow, a kernel and
the build back end (all linked from this environment, so that nothing is downloaded), an empty `google.colab`, and
this checkout as the git repository behind the public address. pip builds without isolation for the same reason.
One chapter runs from nothing; the others go on from the units of the smoke run, which the installed helpers must know.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.fixture
def colab(tmp_path):
    """Python of an environment like Colab's."""
    run(sys.executable, "-m", "venv", tmp_path / "colab")
    python = tmp_path / "colab" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    stub, packages = tmp_path / "stub", tmp_path / "packages"
    (stub / "google" / "colab").mkdir(parents=True)
    (stub / "google" / "colab" / "__init__.py").touch()
    packages.mkdir()
    needed = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"], "ipykernel", "hatchling"])
    link(needed.values(), packages)
    (site / "colab.pth").write_text(f"{stub}\n{packages}\n", encoding="utf-8")
    return python


@pytest.fixture
def remote(tmp_path):
    """This checkout, uncommitted changes included, as a git repository with the ref of the launch buttons."""
    folder = tmp_path / "remote"
    hidden = shutil.ignore_patterns(".*", "_build", "executed", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=hidden)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    run(*git, "init", "--quiet", "--initial-branch", REPOSITORY["branch"], cwd=folder)
    run(*git, "add", "--all", cwd=folder)
    run(*git, "commit", "--quiet", "--message", "The checkout under test", cwd=folder)
    return folder


@pytest.fixture
def environment(tmp_path, colab, remote):
    """Environment variables: the kernel is Colab's, the repository's address leads to the local one."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [str(colab), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HELPERS_", "PYTHON", "GIT_"))}
    return clean | {
        "HOME": str(tmp_path / "home"),
        "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads the variable of a --no-... flag as the flag's opposite
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{remote.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY["url"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_installs_the_helpers_and_runs_alone(chapter, tmp_path, site, colab, remote, environment):
    work = tmp_path / "work"
    work.mkdir()
    if chapter.stem != FROM_NOTHING:
        for folder in ("networks", "defences", f"units/{chapter.stem}"):
            shutil.copytree(site.output / folder, work / "_build" / folder)
    units = set(work.rglob("*.npz"))
    shutil.copy(chapter, work)
    freeze = [colab, "-m", "pip", "freeze", "--all"]
    before = set(run(*freeze, env=environment).splitlines())
    installed = {canonicalize_name(line.split("==")[0]) for line in before}
    assert {"tensorflow", "tensorflow-cpu"} & installed and "numpy" in installed
    assert PROJECT["name"] not in "".join(before), "the helpers are there before the set-up cell ran"

    papermill = [sys.executable, "-m", "papermill", "--kernel", "python3", "--parameters", "PROFILE", "smoke"]
    run(*papermill, chapter.name, "executed.ipynb", cwd=work, env=environment)

    commit = run("git", "rev-parse", "HEAD", cwd=remote)
    after = set(run(*freeze, env=environment).splitlines())
    assert after - before == {f"{PROJECT['name']} @ git+{REPOSITORY['url']}@{commit}"}
    assert before <= after, "the set-up cell replaced packages"
    imported = run(colab, "-c", "import helpers; print(helpers.__file__)", cwd=work, env=environment)
    assert Path(imported).is_relative_to(colab.parents[1])
    record = json.loads((work / "_build" / "results" / chapter.stem / "smoke.json").read_text(encoding="utf-8"))
    assert (record["chapter"], record["profile"]) == (chapter.stem, "smoke")
    assert chapter.stem == FROM_NOTHING or set(work.rglob("*.npz")) == units, "units were computed twice"
