"""The book's checkout: its chapters, and where their runs are kept, on this machine and in the repository."""

from dataclasses import dataclass
from pathlib import Path

import nbformat


class BookError(RuntimeError):
    """The book cannot be made; the message says which chapter, where and why."""


@dataclass(frozen=True)
class Book:
    """A checkout (`root`), the folder for whatever is made from it (`output`), the profile, and what the pages show.

    `show`: "auto" shows a chapter's committed paper-profile copy while it is fresh (its code cells equal the source's)
    and this machine's run otherwise; "run" always shows the run.
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
        """The notebook as written, without outputs."""
        return nbformat.read(self.root / f"notebooks/{chapter}.ipynb", 4)

    def run(self, chapter: str, profile: str = "") -> tuple[Path, Path]:
        """Executed notebook and record of this machine's run."""
        name = profile or self.profile
        return self.output / f"executed/{name}/{chapter}.ipynb", self.output / f"results/{chapter}/{name}.json"

    def committed(self, chapter: str) -> tuple[Path, Path]:
        """Executed notebook and record of the paper-profile run that the repository keeps."""
        return self.root / f"book/executed/{chapter}.ipynb", self.root / f"book/results/{chapter}/paper.json"
