"""Shared by the tests: the book, executed and rendered once, and tiny checkouts that are quick to execute."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.book import Book

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)  # the same examples on every machine
hypothesis.settings.load_profile("steady")

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HELPERS_DATA": ""}
RECORD = """from helpers.records import Record
record = Record.start("02_tiny", PROFILE, {})
record.claim("02.sec4.train_accuracy", [0.9, 0.91, 0.92])
record.save()"""


def command(*arguments, cwd, **environment):
    """Run `python -m helpers ...` in a checkout and return the finished process."""
    return subprocess.run([sys.executable, "-m", "helpers", *arguments], cwd=cwd, env=os.environ | environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The book as readers get it, made by the command that `make book` calls, in an empty home and offline.

    Every chapter runs in profile smoke; a page shows the committed paper run where that is fresh. Where pytest runs in
    several processes, the first that needs the book makes it and the others wait.
    """
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    output, home = shared / "output", tmp_path_factory.mktemp("home")
    with FileLock(shared / "output.lock"):
        if not (output / "html/index.html").exists():
            done = command("book", cwd=ROOT, HELPERS_OUTPUT=str(output), HOME=str(home), **OFFLINE)
            assert done.returncode == 0, done.stdout + done.stderr
    return Book(ROOT, output)


@pytest.fixture
def tiny(tmp_path):
    """Make a checkout with one chapter: call it with the sources of the code cells; a second call adds a chapter."""

    def make(*sources, name="02_tiny", **settings):
        root = tmp_path / "checkout"
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
