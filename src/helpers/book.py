"""The book's checkout: its chapters, where runs of them are kept, here and in the repository, and what is fresh."""

from dataclasses import dataclass
from pathlib import Path

import nbformat

from helpers.provenance import helpers_sha256
from helpers.records import Record


class BookError(RuntimeError):
    """The book cannot be made; the message says which chapter, where and why."""


@dataclass(frozen=True)
class Book:
    """A checkout (`root`), the folder for whatever is made from it (`output`), the profile, and what the pages show.

    `show`: "committed" shows a chapter's paper-profile copy in the repository, and where there is none the notebook
    without results; "auto" shows the copy, and where there is none this machine's run; "run" shows the run, and where
    there is none the copy. A page that is not fresh says so.
    """

    root: Path
    output: Path
    profile: str = "smoke"
    show: str = "auto"

    def chapters(self, *prefixes: str) -> list[str]:
        """Chapters whose name starts with one of `prefixes` (without any: all); ValueError when a prefix fits none."""
        names = sorted(path.stem for path in self.root.glob("notebooks/[0-9]*.ipynb"))
        for prefix in prefixes or [""]:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"chapter: got {prefix!r}, expected the start of one of {', '.join(names) or 'none'}")
        return [name for name in names if name.startswith(prefixes or "")]

    def source(self, chapter: str):
        """The notebook as written, without outputs; Colab keeps a cell's id in its metadata."""
        notebook = nbformat.read(self.root / f"notebooks/{chapter}.ipynb", 4)
        notebook.nbformat_minor = max(5, notebook.nbformat_minor)
        for n, cell in enumerate(notebook.cells):
            cell.setdefault("id", cell.metadata.get("id", f"cell-{n}"))
        return notebook

    def code(self, chapter: str) -> str:
        """The notebook's code as one text, without the set-up cell, whose magic command is no Python."""
        return "\n".join(cell.source for cell in code_cells(self.source(chapter)) if cell.id != "setup")

    def run(self, chapter: str, profile: str = "") -> tuple[Path, Path]:
        """Executed notebook and record of this machine's run."""
        name = profile or self.profile
        return self.output / f"executed/{name}/{chapter}.ipynb", self.output / f"results/{chapter}/{name}.json"

    def committed(self, chapter: str) -> tuple[Path, Path]:
        """Executed notebook and record of the paper-profile run that the repository keeps."""
        return self.root / f"book/executed/{chapter}.ipynb", self.root / f"book/results/{chapter}/paper.json"

    def shown(self, chapter: str) -> tuple[Path, Path] | None:
        """Executed notebook and record that the chapter's page is about; None where it shows no results."""
        committed, run = self.committed(chapter), self.run(chapter)
        choices = {"committed": [committed], "auto": [committed, run], "run": [run, committed]}[self.show]
        return next((pair for pair in choices if all(path.exists() for path in pair)), None)

    def as_written(self, executed: Path, chapter: str) -> bool:
        """Whether there is such a copy of a chapter, and it has the code that the notebook has today."""
        return executed.exists() and same_code(nbformat.read(executed, 4), self.source(chapter))

    def changed(self, executed: Path, record: Path) -> list[str]:
        """What has changed since a run, in sentences; nothing has: it is fresh."""
        ran = Record.load(record)
        code, about = self.as_written(executed, ran.chapter), ran.provenance
        computed = about.helpers_sha256 == helpers_sha256(about.helpers)
        same = {"The notebook's code has changed since this run.": code,
                "Its numbers were computed with earlier helpers.": computed}
        return [sentence for sentence, is_so in same.items() if not is_so]


def same_code(one, other) -> bool:
    """Whether two notebooks have the same code cells, but for the one that papermill injects."""
    sources = [[cell.source for cell in code_cells(notebook)] for notebook in (one, other)]
    return sources[0] == sources[1]


def code_cells(notebook) -> list:
    """A notebook's code cells, without the one that papermill injects."""
    return [cell for cell in written(notebook) if cell.cell_type == "code"]


def written(notebook) -> list:
    """A notebook's cells, without the one that papermill injects."""
    return [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
