"""Shared by the tests: the rendered book, its chapters run once, and tiny checkouts that are quick to execute."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import nbformat
import pytest
from filelock import FileLock
from joblib import cpu_count
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.book import Book
from helpers.records import Record

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)  # the same examples on every machine
hypothesis.settings.load_profile("steady")

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HELPERS_DATA": ""}
RECORD = """from helpers.records import Record
record = Record.start("02_tiny", PROFILE, {})
record.claim("02.sec4.train_accuracy", [0.9, 0.91, 0.92])
record.save()"""

FIGURE = """from IPython.display import display
pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
about = {"alt": 'It falls: from "0.9" to 0.1 # really', "caption": "A **caption**."}
display({"image/png": pixel}, raw=True, metadata={"image/png": about})
display({"text/markdown": "Text after the figure."}, raw=True)"""
PAPERMILL = """import sys, tempfile, papermill
from traitlets.config import Config
with tempfile.TemporaryDirectory() as folder:
    sockets = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})
    papermill.execute_notebook(sys.argv[1], "executed.ipynb", {"PROFILE": "smoke"}, kernel_name="python3",
                               progress_bar=False, start_timeout=600, iopub_timeout=600, config=sockets)"""


def papermill(notebook, cwd, environment):
    """Execute a notebook in profile smoke by papermill alone, to executed.ipynb in the folder `cwd`."""
    done = subprocess.run([sys.executable, "-c", PAPERMILL, notebook], cwd=cwd, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, f"{notebook}:\n{done.stdout}\n{done.stderr}"


def command(*arguments, cwd, **environment):
    """Run `python -m helpers ...` in a checkout and return the finished process."""
    return subprocess.run([sys.executable, "-m", "helpers", *arguments], cwd=cwd, env=os.environ | environment,
                          capture_output=True, text=True)


def pytest_collection_modifyitems(config, items):
    """Put a part of the slow tests at the start of each worker's share: none is left for the end."""
    slow, fast = ([item for item in items if bool(item.get_closest_marker("slow")) == mark] for mark in (True, False))
    slow.sort(key=lambda item: "test_smoke" not in item.nodeid)  # others go on from these runs, and would wait for them
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    ends = [len(fast) * n // workers for n in range(workers + 1)]
    items[:] = [item for n in range(workers) for item in slow[n::workers] + fast[ends[n]:ends[n + 1]]]


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder of this session, the same in all processes of pytest."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def site(shared):
    """The book as the repository keeps it, rendered by `make site`'s command, offline and in an empty home.

    The first process of pytest that needs it makes it, and the others wait.
    """
    book = Book(ROOT, shared / "site", show="committed")
    with FileLock(shared / "site.lock"):
        if not (book.output / "html/index.html").exists():
            done = command("site", cwd=ROOT, HELPERS_OUTPUT=str(book.output), HOME=str(shared / "home"), **OFFLINE)
            assert done.returncode == 0, done.stdout + done.stderr
    return book


def lacking(what):
    """Fail in CI, where everything is installed; skip with a warning on a machine that lacks it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed, and CI needs it: see .ci/run")
    warnings.warn(f"NO BROWSER TEST WAS RUN: {what} is not installed (see .ci/run)", stacklevel=2)
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window, for the tests of a module."""
    from playwright.sync_api import sync_playwright  # which no other test needs

    names = ("chromium", "chromium-browser", "google-chrome")
    if not (path := next(filter(None, map(shutil.which, names)), None)):
        lacking("Chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def smoke(shared, testrun_workers):
    """Run a chapter in profile smoke: offline, from nothing, in an empty home; the first test that asks does it."""

    def run(chapter):
        book = Book(ROOT, shared / "smoke" / chapter)
        with FileLock(shared / f"{chapter}.lock"):
            if not book.output.exists():
                cores = max(1, cpu_count() // testrun_workers)
                command("run", "--chapter", chapter, cwd=ROOT, HELPERS_OUTPUT=str(book.output),
                        HOME=str(shared / "home"), LOKY_MAX_CPU_COUNT=str(cores), **OFFLINE)
        return book

    return run


@pytest.fixture(scope="session")
def testrun_workers(request):
    """How many processes pytest has."""
    return getattr(request.config, "workerinput", {}).get("workercount", 1)


def commit(book, printed="the paper run", profile="paper"):
    """Give a tiny checkout a committed copy with one printed line, and a record that says `profile`."""
    executed, record = book.committed("02_tiny")
    notebook = book.source("02_tiny")
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text=printed)]
    executed.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, executed)
    found = Record.start("02_tiny", profile, {})
    found.provenance.seconds = 4035.0
    found.claim("02.sec4.test_accuracy", [0.9893, 0.9890, 0.9894], note="as printed")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(found.model_dump_json())
    return found


@pytest.fixture
def tiny(tmp_path):
    """Make a checkout with one chapter: call it with the sources of the code cells; a second call adds a chapter."""

    def make(*sources, name="02_tiny", folder=".", **settings):
        root = tmp_path / folder / "checkout"
        if not root.exists():
            (root / "notebooks").mkdir(parents=True)
            (root / "book").mkdir()
            shutil.copy(ROOT / "_config.yml", root)
            for path in [ROOT / "book/claims.yml", ROOT / "book/left.yml", *ROOT.glob("book/*.jinja")]:
                shutil.copy(path, root / "book")
            for page in ("index.md.jinja", "reading_results.md"):
                (root / "book" / page).write_text(f"# {page}\n")
            (root / "book/references.bib").touch()
        cells = [new_markdown_cell("# Tiny chapter", id="title")]
        parameters = new_code_cell('PROFILE = "quick"', id="parameters", metadata={"tags": ["parameters"]})
        cells += [parameters, *(new_code_cell(source, id=f"c{n}") for n, source in enumerate(sources))]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), root / f"notebooks/{name}.ipynb")
        files = ["book/reading_results", *(f"notebooks/{path.stem}" for path in root.glob("notebooks/*.ipynb")),
                 "book/ledger", "book/status"]
        toc = "format: jb-book\nroot: book/index\nchapters:\n" + "".join(f"  - file: {file}\n" for file in files)
        (root / "_toc.yml").write_text(toc)
        return Book(root, tmp_path / "output", **settings)

    return make
