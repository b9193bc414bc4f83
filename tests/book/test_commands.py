"""The Makefile and CI's script: what they list, ask for, set up once and print."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FAKE_PYTHON = """#!/bin/sh
echo "python $*" >> "$LOG"
echo "$HELPERS_DATA" > "$LOG.data"
case "$*" in
  *version_info*) exec {real} -c "import sys; sys.version_info = {version}; $2" ;;
  *--version*) echo "Python {version}" ;;
  *ensurepip*) exit {no_venv} ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
"""


def make(*arguments, cwd, **environment):
    """Run make as from a shell, also when these tests were started by make."""
    outer = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(["make", *arguments], cwd=cwd, env=outer | environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile alone, and a way to run it with a Python that only notes what it is asked to do."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments, version=(3, 12), no_venv=0, **environment):
        python = tmp_path / "fake-python"
        python.write_text(FAKE_PYTHON.format(real=sys.executable, version=version, no_venv=no_venv))
        python.chmod(0o755)
        log = tmp_path / "log"
        log.write_text("")
        done = make(f"PYTHON={python}", *arguments, cwd=tmp_path, LOG=str(log), **environment)
        return done, log.read_text().splitlines()

    return run


def test_make_lists_its_targets():
    listed = make(cwd=ROOT).stdout.splitlines()
    assert [line.split()[1] for line in listed] == [
        "help", "book", "site", "test", "paper", "arena", "bench", "soak", "lint", "address", "clean"]


def test_set_up_is_from_the_lock_with_hashes_and_done_once(checkout, tmp_path):
    done, log = checkout("book")
    assert done.returncode == 0, done.stderr
    lock, package = (line for line in log if "-m pip install" in line)
    assert "--require-hashes --requirement requirements.lock" in lock
    assert "--no-deps --no-build-isolation --editable ." in package
    assert log[-1] == "python -m helpers book --profile smoke --show auto"
    assert checkout("book", "PROFILE=quick", "SHOW=run", "CHAPTER=02 04")[1] == [
        "python -m helpers book --profile quick --show run --chapter 02 --chapter 04"]
    os.utime(tmp_path / "requirements.lock", (4e9, 4e9))
    assert any("requirements.lock" in line for line in checkout("test")[1])


def test_make_arena_takes_a_file_and_options(checkout):
    assert checkout("arena", "DEFENCE=my defence.py", "ARENA=--norm l2 --eps 1.5")[1][-1] == (
        "python -m helpers arena my defence.py --norm l2 --eps 1.5")


def test_the_folder_of_the_data_may_be_relative_and_have_a_space(checkout, tmp_path):
    for given, meant in [("my data", tmp_path / "my data"), ("/my data", "/my data")]:
        checkout("book", HELPERS_DATA=given)
        assert (tmp_path / "log.data").read_text() == f"{meant}\n"


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0)])
def test_another_python_is_refused_with_what_to_do(checkout, tmp_path, version):
    done, _ = checkout("book", version=version)
    assert done.returncode and f"Python 3.11, 3.12 or 3.13 is needed; {tmp_path}/fake-python is Python" in done.stdout
    assert str(version) in done.stdout and "make PYTHON=python3.12" in done.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 13, 9)])
def test_supported_pythons_are_taken(checkout, version):
    assert checkout("book", version=version)[0].returncode == 0


def test_a_python_without_venv_is_refused_with_what_to_do(checkout, tmp_path):
    done, log = checkout("test", no_venv=1)
    assert done.returncode and "apt install python3-venv" in done.stdout and not (tmp_path / ".venv").exists()


def test_clean_keeps_the_units_of_long_runs_and_the_files_that_they_name(checkout, tmp_path):
    kept = [".lock", "defences", "networks", "units"]  # the lock: another command may hold it
    for name in (*kept, "html", "stage"):
        (tmp_path / "_build" / name).mkdir(parents=True)
    assert checkout("clean")[0].returncode == 0
    assert sorted(path.name for path in (tmp_path / "_build").iterdir()) == kept
    shutil.rmtree(tmp_path / "_build")
    assert checkout("clean")[0].returncode == 0


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("fails", ["", "npm", "test", "book"])
def test_ci_runs_the_tests_then_the_book_on_real_data_and_ends_with_the_closing_line(tmp_path, data, fails):
    (tmp_path / "bin").mkdir()
    (tmp_path / "checkout/.ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / "checkout/.ci")
    if data:
        (tmp_path / "shared/data").mkdir(parents=True)
    fake = tmp_path / "bin/make"
    said = 'echo "$PWD: $* data=$HELPERS_DATA"; [ "$1" = book ] || echo "= 7 passed in 1s ="'
    fake.write_text(f'#!/bin/sh\n{said}\n[ "$1" != "{fails}" ]\n')
    (tmp_path / "bin/npm").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/npm.log\n[ "npm" != "{fails}" ]\n')
    (tmp_path / "bin/chromium").touch()
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HELPERS_DATA": ""}
    done = subprocess.run([tmp_path / "checkout/.ci/run"], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (tmp_path / "npm.log").read_text().startswith("ci --prefix tests/book")
    if fails == "npm":
        assert not lines and done.returncode
        return
    mirror = f"data={tmp_path}/shared/data" if data else "data="
    assert lines[:2] == [f"{tmp_path}/checkout: test {mirror}", "= 7 passed in 1s ="]
    assert lines[-1] == lines[1] or fails == "book"
    quick = [line.split()[3] for line in lines if ": book PROFILE=quick CHAPTER=" in line and line.endswith(mirror)]
    every = sorted(f"CHAPTER={path.name[:2]}" for path in ROOT.glob("notebooks/[0-9]*.ipynb"))
    assert sorted(quick) == ([] if not data or fails == "test" else every if fails != "book" else quick[:1])
    assert (done.returncode == 0) == (not fails or fails == "book" and not data)
