"""Executing chapters with papermill: `execute`, `status`.

    notebooks/ ─ execute ─► output/executed/, output/results/

Each is made under another name and then renamed: nothing half written is found under its own name.
"""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process

import nbformat
import psutil
from joblib import cpu_count

from helpers.book import Book, BookError
from helpers.files import atomic
from helpers.records import Record

LIMITS = {"smoke": (300, 600), "quick": (1200, 2400), "paper": (12 * 3600, 24 * 3600)}  # seconds: a cell, a chapter


def execute(book: Book, chapters: list[str]) -> None:
    """Run chapters with papermill, each in a process of its own: in profile smoke a core each, else few at once.

    Raises BookError with the name, cell and error of every chapter that failed: such a chapter leaves no output.
    """
    cores = cpu_count()
    jobs = max(1, min(len(chapters), cores if book.profile == "smoke" else cores // 4))  # other units use all cores
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {name: pool.submit(_execute, book, name, LIMITS[book.profile], cores // jobs) for name in chapters}
    errors = {name: future.exception() for name, future in futures.items() if future.exception()}
    if errors:
        raise BookError("\n".join(f"{name}, profile {book.profile}: {error}" for name, error in errors.items()))


def status(book: Book) -> list[Record]:
    """Records of the last run of each chapter and profile on this machine."""
    runs = [Record.load(path) for path in sorted(book.output.glob("results/*/*.json"))]
    return [run for run in runs if book.run(run.chapter, run.profile)[0].exists()]


def _execute(book, chapter, limits, threads):
    """Body of a chapter's process."""
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=lambda: _end(parent_process().join()), daemon=True).start()
    own = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    os.environ.update({name: str(book.output / "jupyter") for name in own}, HELPERS_OUTPUT=str(book.output))
    os.environ.update(JUPYTER_PATH="", TF_NUM_INTRAOP_THREADS=str(threads))
    import papermill  # after its settings: this interpreter's kernel, whatever else the user has installed

    (target, record), start = book.run(chapter), time.monotonic()
    target.unlink(missing_ok=True)  # or a failed run would leave an earlier one's output in its place
    record.unlink(missing_ok=True)
    bar = {"desc": f"{chapter} [{book.profile}]", "bar_format": "{desc}: cell {n_fmt} of {total_fmt}, {elapsed}"}
    with atomic(target) as partial, open(target.with_suffix(".log"), "w") as log:
        sys.stderr = os.fdopen(os.dup(2), "w")  # the progress line stays; what the kernel's libraries say is kept apart
        os.dup2(log.fileno(), 2)
        try:
            papermill.execute_notebook(
                book.root / f"notebooks/{chapter}.ipynb", partial, {"PROFILE": book.profile}, kernel_name="python3",
                progress_bar=bar, cwd=book.root / "notebooks", coalesce_streams=True,
                timeout_func=lambda cell: max(1, min(limits[0], start + limits[1] - time.monotonic())))
        except Exception as error:
            record.unlink(missing_ok=True)
            raise BookError(f"{_failure(book.source(chapter), partial, error, limits)} (log: {log.name})") from None
        if not record.exists():
            raise BookError(f"the notebook ended without saving its record, {record}")


def _end(*_):
    """End this process with its kernel and the kernel's own workers, which would go on without the command."""
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


def _failure(source, partial, error, limits):
    """Cell (numbered as in the source), its first line, and the error, from the notebook that papermill left behind."""
    ran = nbformat.read(partial, 4).cells if partial.stat().st_size else []
    tried = [cell for cell in ran if cell.cell_type == "code" and cell.metadata.papermill.start_time]
    if not tried:
        return f"before the first cell: {error!r}"
    reasons = [f"{output.ename}: {output.evalue}" for output in tried[-1].outputs if output.output_type == "error"]
    if type(error).__name__ == "CellTimeoutError":  # which interrupts the cell, and that is an error of the cell, too
        reasons = ["time limit reached ({} s a cell, {} s a chapter)".format(*limits)]
    number = {cell.id: n for n, cell in enumerate(source.cells, 1)}.get(tried[-1].id, "of parameters")
    return f"cell {number} `{tried[-1].source.strip().splitlines()[0]}`: {(reasons or [repr(error)])[0]}"
