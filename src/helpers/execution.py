"""Executing chapters with papermill: `execute`, and what it left, `status` and `failures`.

    notebooks/ ─ execute ─► output/executed/, output/results/

Each is made under another name and then renamed: nothing half written is found under its own name.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import nbformat
import psutil
from joblib import cpu_count

from helpers.book import Book, BookError
from helpers.files import atomic
from helpers.records import Record
from helpers.tracing import changed
from helpers.units import PACKAGES, handed_on, kept, pack, unpack, versions

# Processor seconds of a chapter, for each core of the machine. Time on the clock would measure its other work as well.
LIMITS = {"smoke": 600, "quick": 2400, "paper": 24 * 3600}
STALLED = 900  # seconds; a chapter at work uses more than a thousandth of a processor, one that sleeps less
# Without the ^, as nbclient has it, a search takes the square of a line's length, and nothing can interrupt it.
OVERWRITTEN = re.compile(r"^.*\r(?=[^\n])", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """The last run of a chapter on this machine, which failed: when it ended (UTC), in which cell, and the error."""

    chapter: str
    profile: str
    ended: str
    cell: str
    error: str

    def __str__(self):
        return f"{self.chapter}, profile {self.profile}: {self.cell}: {self.error}"


def execute(book: Book, chapters: list[str], seed: int = 0) -> None:
    """Run chapters with papermill, each in a process of its own: in profile smoke a core each, else few at once.

    In profile paper units that `keep` put into the repository count as finished here.
    `seed` is their parameter SEED. Raises BookError with the name, cell and error of every chapter that failed. Such a
    chapter leaves neither notebook nor record, but a note of its failure, which its next run removes.
    """
    for chapter in chapters if book.profile == "paper" else ():
        _restore(book, chapter)
    cores = cpu_count()
    jobs = max(1, min(len(chapters), cores if book.profile == "smoke" else cores // 4))  # other units use all cores
    stalled = math.inf if os.environ.get("HELPERS_CLUSTER") else STALLED  # a cluster works while the chapter waits
    limits, waiting, running = (LIMITS[book.profile] * cores, stalled), [*chapters], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = _start(book, chapter := waiting.pop(0), seed, limits, cores // jobs)
                running[process.sentinel] = process, chapter
            for sentinel in connection.wait(running):
                _ended(book, *running.pop(sentinel))
    finally:
        for process, _ in running.values():
            process.terminate()
    failed = [failure for failure in failures(book) if failure.profile == book.profile and failure.chapter in chapters]
    if failed:
        logs = (book.run(failure.chapter)[0].with_suffix(".log") for failure in failed)
        raise BookError("\n".join(f"{failure} (log: {log})" for failure, log in zip(failed, logs, strict=True)))


def status(book: Book) -> list[Record]:
    """Records of the last run of each chapter and profile on this machine, but for those that failed."""
    runs = [Record.load(path) for path in sorted(book.output.glob("results/*/[!.]*.json"))]
    return [run for run in runs if book.run(run.chapter, run.profile)[0].exists()]


def cost(book: Book, chapter: str) -> dict[str, dict]:
    """Return what a run of the chapter would compute again of the units that are kept for it, by their function.

    Each has the number of `units` kept, how many run `again`, their `seconds`, and the code that is another today:
    names of helpers, and of the notebook. A unit whose function has changed runs again whatever its arguments.
    """
    found = {}
    for unit, why in _units(book, chapter):
        row = found.setdefault(unit["function"], {"units": 0, "again": 0, "seconds": 0.0, "changed": set()})
        row["units"], row["changed"] = row["units"] + 1, row["changed"] | set(why)
        if why:
            row["again"], row["seconds"] = row["again"] + 1, row["seconds"] + unit["seconds"]
    return found


def keep(book: Book, chapter: str, networks: bool = False) -> tuple[Path, int]:
    """Put the results of the chapter's finished units, those that the code as it is still finds, below book/units.

    From there a run in profile paper goes on, on whatever machine. networks : those that the results name go along,
    and defences, as far as they are there. Returns the file, and how many units it has. Raises BookError where there
    is none.
    """
    paths = [unit["path"] for unit, why in _units(book, chapter) if not why]
    if not paths:
        raise BookError(f"{chapter}: no finished unit of this code in {book.output / 'units' / chapter}")
    archive = _archive(book, chapter)
    pack(archive, book.output / "units" / chapter, paths, handed_on(paths, book.output) if networks else ())
    return archive, len(paths)


def _restore(book, chapter):
    """Put what `keep` has put into the repository where a run looks for finished units."""
    if (archive := _archive(book, chapter)).exists():
        try:
            unpack(archive, book.output / "units" / chapter, book.output)
        except ValueError as error:
            raise BookError(str(error)) from error


def _archive(book, chapter):
    return book.root / f"book/units/{chapter}.tar.xz"


def _units(book, chapter):
    """Yield what each kept unit was made with, and the names of what is another today, for which it runs again."""
    source, today, known = book.code(chapter), versions(*PACKAGES), {}
    for unit in kept(book.output / "units" / chapter):
        code = tuple(unit["code"].items())  # the same for all units of a run of one function
        if code not in known:
            known[code] = changed(unit["code"], source) if code else ["(kept by an earlier layout)"]
        yield unit, known[code] + [name for name, version in unit["versions"].items() if today[name] != version]


def failures(book: Book) -> list[Failure]:
    """The last runs of chapters on this machine that failed."""
    notes = sorted(book.output.glob("executed/*/*.failed.json"))
    return [Failure(**json.loads(note.read_text(encoding="utf-8"))) for note in notes]


def _start(book, chapter, seed, limits, threads):
    target, record = book.run(chapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in (target, record, _note(book, chapter)):
        path.unlink(missing_ok=True)  # or a failed run would leave an earlier one's output in its place
    process = get_context("spawn").Process(target=_execute, args=(book, chapter, seed, limits, threads), daemon=True)
    process.start()
    return process


def _ended(book, process, chapter):
    process.join()
    if process.exitcode and not _note(book, chapter).exists():
        _fail(book, chapter, "no cell", f"its process ended with exit code {process.exitcode}")


def _note(book, chapter):
    """Where a failure is noted, beside the log."""
    return book.run(chapter)[0].with_suffix(".failed.json")


def _fail(book, chapter, cell, error):
    failure = Failure(chapter, book.profile, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", cell, error)
    with atomic(_note(book, chapter)) as partial:
        partial.write_text(json.dumps(asdict(failure), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _execute(book, chapter, seed, limits, threads):
    """Body of a chapter's process."""
    (target, record), log = book.run(chapter), book.run(chapter)[0].with_suffix(".log")
    with _workplace() as folder, open(log, "w", encoding="utf-8") as libraries:
        sys.stderr = os.fdopen(os.dup(2), "w")  # the progress stays; what the kernel's libraries say is kept apart
        os.dup2(libraries.fileno(), 2)
        watch = _Watch(*limits)
        watch.start()
        try:
            _papermill(book, chapter, seed, folder, threads)
            if not record.exists():
                raise BookError(f"the notebook ended without saving its record, {record}")
            with atomic(target) as partial:
                shutil.copyfile(folder / "run.ipynb", partial)
        except Exception as error:
            record.unlink(missing_ok=True)
            cell, reason = _where(book.source(chapter), folder / "run.ipynb", error)
            _fail(book, chapter, cell, watch.why or reason)


def _papermill(book, chapter, seed, folder, threads):
    own = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    os.environ.update({name: str(book.output / "jupyter") for name in own}, HELPERS_OUTPUT=str(book.output))
    os.environ.update(JUPYTER_PATH="", TF_NUM_INTRAOP_THREADS=str(threads))
    import nbclient.client
    import papermill  # after its settings: this interpreter's kernel, whatever else the user has installed
    from traitlets.config import Config

    nbclient.client._RGX_CARRIAGERETURN = OVERWRITTEN
    form = {"bar_format": f"{chapter} [{book.profile}]: cell {{n_fmt}} of {{total_fmt}}, {{elapsed_s:.0f}} s"}
    lines = {"file": _Lines(sys.stderr), "mininterval": 0, "miniters": 1, "leave": False}
    papermill.execute_notebook(
        book.root / f"notebooks/{chapter}.ipynb", folder / "run.ipynb", {"PROFILE": book.profile, "SEED": seed},
        kernel_name="python3", cwd=book.root / "notebooks", coalesce_streams=True,
        progress_bar=form | ({} if sys.stderr.isatty() else lines),
        start_timeout=STALLED, iopub_timeout=STALLED,  # `_Watch` ends what hangs; these would measure the neighbours
        # sockets with names: of two kernels that start at once, both may find the same TCP port free
        config=Config(KernelManager={"transport": "ipc", "ip": str(folder / "kernel")}))


class _Lines:
    """What tqdm writes to where there is no terminal: a line of its own for each that would overwrite the last one."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        if line := text.strip():
            print(line, file=self.file, flush=True)

    def flush(self):
        """Nothing: each line is flushed."""


class _Watch(threading.Thread):
    """Ends the kernel and its workers when they have used `limit` s of the processor, or none for `stalled` s."""

    def __init__(self, limit, stalled):
        super().__init__(daemon=True)
        self.limit, self.stalled, self.why = limit, stalled, ""

    def run(self):
        mark, still = 0, 0
        while True:
            time.sleep(1)
            used, paused = _look_at_children()
            idle = 0 <= used - mark < max(0.1, self.stalled / 1000)  # below 0: a worker has gone with what it used
            mark, still = (mark, still + 1) if used and idle and not paused else (used, 0)
            if used > self.limit:
                self.why = f"limit reached ({self.limit:g} s of the processor)"
            elif still > self.stalled:  # looks, and not the clock: that goes on while this process is paused
                self.why = f"hung: {self.stalled:g} s without use of the processor"
            if self.why:
                _kill_children()


def _look_at_children():
    """Processor seconds of this process's children and theirs, ended ones included, and whether one is paused."""
    used, paused = 0, False
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            used += sum(process.cpu_times()[:4])  # user, system, and both of the children that it has waited for
            paused |= process.status() == psutil.STATUS_STOPPED
    return used, paused


@contextmanager
def _workplace():
    """A folder that goes when the process ends. Sockets go there: their names may have 100 characters at most."""
    short = None if len(tempfile.gettempdir()) < 60 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="book-", dir=short) as folder:
        def end(*_):
            """End this process with its kernel and the kernel's workers, which would go on without the command."""
            _kill_children()
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        threading.Thread(target=lambda: end(parent_process().join()), daemon=True).start()
        yield Path(folder)


def _kill_children():
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def _where(source, ran, error):
    """Cell (numbered as in the source) with its first line, and the error, from the notebook that papermill left."""
    if isinstance(error, BookError):
        return "after the last cell", str(error)
    cells = nbformat.read(ran, 4).cells if ran.exists() and ran.stat().st_size else []
    tried = [cell for cell in cells if cell.cell_type == "code" and cell.metadata.papermill.start_time]
    if not tried:
        return "before the first cell", repr(error)
    reasons = [f"{output.ename}: {output.evalue}" for output in tried[-1].outputs if output.output_type == "error"]
    number = {cell.id: n for n, cell in enumerate(source.cells, 1)}.get(tried[-1].id, "of parameters")
    return f"cell {number} `{tried[-1].source.strip().splitlines()[0]}`", (reasons or [repr(error)])[0]
