"""Executing chapters: what fails says where, and leaves nothing that looks finished."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import FIGURE, RECORD, command, commit
from joblib import cpu_count

from helpers import execution
from helpers.book import Book, BookError
from helpers.execution import Failure, execute, failures, status
from helpers.records import Record


def test_a_long_line_is_taken_in_at_once(tiny):
    book, started = tiny(RECORD, "print('x' * 500_000, end='\\r')\nprint('y' * 500_000)"), time.monotonic()
    execute(book, book.chapters())
    assert time.monotonic() - started < 60  # nbclient's own pattern takes minutes, the square of the length
    (output,) = nbformat.read(book.run("02_tiny")[0], 4).cells[-1].outputs
    assert output.text == "y" * 500_000 + "\n"


def test_a_chapter_leaves_its_notebook_record_and_status(tiny):
    book = tiny(RECORD)
    execute(book, book.chapters())
    executed, record = book.run("02_tiny")
    assert nbformat.read(executed, 4).cells[-1].execution_count
    assert Record.load(record).profile == "smoke"
    assert {path.name for path in executed.parent.iterdir()} == {"02_tiny.ipynb", "02_tiny.log"}
    assert status(book) == [Record.load(record)]


def test_chapters_need_no_code_of_their_own_and_run_side_by_side(tiny):
    book = tiny(RECORD)
    tiny(RECORD.replace("02", "04").replace("sec4.train_accuracy", "sec51.mnist_accuracy"), name="04_tiny")
    execute(book, book.chapters())
    assert [run.chapter for run in status(book)] == ["02_tiny", "04_tiny"]
    assert book.chapters("04") == ["04_tiny"]


def test_a_failing_cell_is_named_and_no_earlier_output_stays(tiny):
    book = tiny(RECORD)
    execute(book, book.chapters())
    tiny("x = 1", RECORD, "# a comment\n\nnumbers = [1]\nnumbers[x]")
    with pytest.raises(BookError, match=r"02_tiny, profile smoke: cell 5 `# a comment`: IndexError: list index out"):
        execute(book, book.chapters())
    assert not any(path.exists() for path in book.run("02_tiny"))
    assert {path.name for path in book.run("02_tiny")[0].parent.iterdir()} == {"02_tiny.log", "02_tiny.failed.json"}
    (failure,) = failures(book)
    reason = "IndexError: list index out of range"
    assert failure == Failure("02_tiny", "smoke", failure.ended, "cell 5 `# a comment`", reason)
    assert not status(book)
    tiny(RECORD)
    execute(book, book.chapters())
    assert not failures(book) and len(status(book)) == 1


def test_a_paper_run_goes_on_from_the_units_that_the_repository_keeps(tiny, tmp_path):
    log = tmp_path / "log"
    unit = (f"def unit(x):\n    open({str(log)!r}, 'a').write('x')\n    return {{'y': x}}\n"
            "units.run(unit, [{'x': 1}], folder=files.output('units', '02_tiny'), n_jobs=1)")
    every = ("from helpers.records import Record, claims\nrecord = Record.start('02_tiny', PROFILE, {})\n"
             "[record.claim(id, None, 'not tried') for id in claims() if id[:2] == '02']\nrecord.save()")
    book = tiny("from helpers import files, units", unit, every, profile="paper")
    with pytest.raises(BookError, match="02_tiny: no finished unit"):
        execution.keep(book, "02_tiny")
    execute(book, book.chapters())
    archive, number = execution.keep(book, "02_tiny")
    shutil.rmtree(book.output)
    execute(book, book.chapters())
    assert number == 1 and log.read_text() == "x", "computed again"
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(BookError, match="02_tiny.tar.xz is damaged"):
        execute(book, book.chapters())


def test_one_failing_chapter_does_not_hide_the_other(tiny):
    book = tiny("raise KeyError('first')")
    tiny("raise KeyError('second')", name="04_tiny")
    with pytest.raises(BookError, match="(?s)02_tiny.*first.*04_tiny.*second"):
        execute(book, book.chapters())


SPIN = "import time\nend = time.process_time() + 30\nwhile time.process_time() < end:\n    pass"


@pytest.mark.parametrize("spin", [SPIN, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"],
                         ids=["kernel", "child"])
def test_a_chapter_is_stopped_by_its_own_processor_time(tiny, monkeypatch, spin):
    monkeypatch.setitem(execution.LIMITS, "smoke", 6 / cpu_count())
    book = tiny("x = 1", spin, RECORD)
    with pytest.raises(BookError, match=r"02_tiny, .*cell 4 `import .*`: limit reached \(6 s of the processor\)"):
        execute(book, book.chapters())
    assert not book.run("02_tiny")[0].exists()


def test_a_chapter_that_hangs_is_stopped_and_one_that_is_slow_is_not(tiny, monkeypatch):
    monkeypatch.setattr(execution, "STALLED", 8)
    book = tiny("import time; time.sleep(100)", RECORD)
    tiny(SPIN.replace("30", "12"), RECORD.replace("02", "04").replace("sec4.train_accuracy", "sec51.mnist_accuracy"),
         name="04_tiny")
    with pytest.raises(BookError, match=r"^02_tiny, .*cell 3 `import time.*`: hung: 8 s without use of .*log\)$"):
        execute(book, book.chapters())
    assert [run.chapter for run in status(book)] == ["04_tiny"]


def test_a_chapter_s_process_that_is_killed_is_named_and_hides_no_other(tiny):
    book = tiny("import os, signal", "os.kill(os.getppid(), signal.SIGKILL)")
    tiny(RECORD.replace("02", "04").replace("sec4.train_accuracy", "sec51.mnist_accuracy"), name="04_tiny")
    with pytest.raises(BookError, match=r"^02_tiny, profile smoke: no cell: its process ended with exit code -9"):
        execute(book, book.chapters())
    assert [run.chapter for run in status(book)] == ["04_tiny"]


def test_a_kernel_that_dies_is_named(tiny):
    book = tiny("import os", "os._exit(1)")
    with pytest.raises(BookError, match=r"02_tiny, profile smoke: cell 4 `os._exit\(1\)`: DeadKernelError"):
        execute(book, book.chapters())


def test_a_chapter_without_a_record_fails(tiny):
    book = tiny("x = 1")
    with pytest.raises(BookError, match="without saving its record, .*02_tiny/smoke.json"):
        execute(book, book.chapters())
    assert not book.run("02_tiny")[0].exists()


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL, "everything"])
def test_killing_the_command_ends_kernel_and_workers_and_leaves_nothing_half_written(tiny, tmp_path, kill):
    pids = tmp_path / "pids"
    book = tiny("import os, pathlib, time, joblib", f"""def work(n):
    with open({str(pids)!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{os.getppid()}} ")
    time.sleep(100)
joblib.Parallel(2)(joblib.delayed(work)(n) for n in range(2))""")
    running = subprocess.Popen([sys.executable, "-m", "helpers", "run"], cwd=book.root, start_new_session=True,
                               env=os.environ | {"HELPERS_OUTPUT": str(book.output)})
    deadline = time.monotonic() + 100
    while not (pids.exists() and len(pids.read_text().split()) == 4) and time.monotonic() < deadline:
        time.sleep(0.1)
    started = {int(pid) for pid in pids.read_text().split()}
    assert len(started) == 3 and started <= set(psutil.pids())
    os.killpg(running.pid, signal.SIGTERM) if kill == "everything" else running.send_signal(kill)
    assert running.wait(20)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in started & set(psutil.pids())], timeout=20)
    assert not alive
    assert not any(path.exists() for path in book.run("02_tiny"))


def test_a_killed_run_goes_on_where_it_stopped_and_ends_with_the_record_of_one_that_was_not_killed(tiny, tmp_path):
    started, go = tmp_path / "started", tmp_path / "go"
    book = tiny("import os, time\nfrom pathlib import Path\nimport numpy as np\nfrom helpers import files, units", f"""
def work(seed):
    with open({str(started)!r}, "a") as file:
        file.write(f"{{seed}} ")
    while seed and not Path({str(go)!r}).exists():
        time.sleep(0.1)
    return {{"values": np.random.default_rng(seed).random(3)}}
found = units.run(work, [dict(seed=seed) for seed in range(3)], folder=files.output("units"), n_jobs=1)
values = np.array([unit["values"] for unit in found])""", RECORD.replace("[0.9, 0.91, 0.92]", "values[:, 0]").replace(
        "record.save()", "record.table('t', [dict(v=float(v)) for v in values.ravel()])\n"
                         "record.curve('c', [0, 1, 2], dict(v=values))\nrecord.save()"))
    running = subprocess.Popen([sys.executable, "-m", "helpers", "run"], cwd=book.root,
                               env=os.environ | {"HELPERS_OUTPUT": str(book.output)})
    deadline = time.monotonic() + 100
    while not (started.exists() and started.read_text() == "0 1 ") and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    assert running.wait(20) and not psutil.wait_procs(kernel, timeout=20)[1] and not book.run("02_tiny")[1].exists()
    go.touch()
    whole = Book(book.root, tmp_path / "whole")
    for one in (book, whole):
        execute(one, one.chapters())
    assert started.read_text() == "0 1 1 2 0 1 2 "
    killed, never = (Record.load(one.run("02_tiny")[1]) for one in (book, whole))
    assert killed.claims and killed.tables and killed.curves
    assert all(getattr(killed, part) == getattr(never, part) for part in ("claims", "tables", "curves"))


def test_a_container_s_share_of_the_cores_counts(tiny, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # as joblib finds it in a control group, too
    book = tiny("import os", "assert os.environ['TF_NUM_INTRAOP_THREADS'] == '1'", RECORD)
    execute(book, book.chapters())


def test_the_kernel_is_this_python_whatever_the_user_has_installed(tiny, tmp_path):
    kernel = tmp_path / "home/.local/share/jupyter/kernels/python3/kernel.json"
    startup = tmp_path / "home/.ipython/profile_default/startup/00-broken.py"
    for path, text in [(kernel, '{"argv": ["false"], "display_name": "", "language": ""}'), (startup, "1 / 0")]:
        path.parent.mkdir(parents=True)
        path.write_text(text)
    book = tiny("import sys", f"assert sys.executable == {sys.executable!r}", RECORD)
    notebook = book.source("02_tiny")
    notebook.metadata.kernelspec.name = "conda-env-of-the-author"
    nbformat.write(notebook, book.root / "notebooks/02_tiny.ipynb")
    done = command("run", cwd=book.root, HELPERS_OUTPUT=str(book.output), HOME=str(tmp_path / "home"),
                   JUPYTER_PATH=str(kernel.parents[2]), JUPYTER_PREFER_ENV_PATH="0")
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError" not in book.run("02_tiny")[0].read_text() + done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["book", "--profile", "papr"], "'papr' is not one of 'smoke', 'quick', 'paper'"),
    (["book", "--show", "all"], "'all' is not one of 'auto', 'run'"),
    (["run", "--chapter", "07"], "chapter: got '07', expected the start of one of 02_tiny"),
    (["bok"], "No such command 'bok'"),
])
def test_bad_arguments(tiny, arguments, message):
    done = command(*arguments, cwd=tiny(RECORD).root)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    done = command("run", cwd=tiny(RECORD).root, HELPERS_OUTPUT=str(tmp_path / "file"))
    assert done.returncode == 1 and f"{tmp_path / 'file'}" in done.stderr and "Traceback" not in done.stderr


def test_outside_a_checkout(tmp_path):
    done = command("book", cwd=tmp_path)
    assert done.returncode == 1 and f"no _config.yml in {tmp_path}" in done.stderr


def test_a_missing_file_of_the_book_is_named(tiny):
    book = tiny(RECORD)
    (book.root / "_toc.yml").unlink()
    done = command("book", cwd=book.root, HELPERS_OUTPUT=str(book.output))
    assert done.returncode == 1 and "_toc.yml" in done.stderr and "Traceback" not in done.stderr


def test_help_names_the_commands(tmp_path):
    text = command("--help", cwd=tmp_path).stdout
    assert all(word in text for word in ("book", "run", "paper", "status", "HELPERS_DATA", "HELPERS_OUTPUT"))


def test_a_failing_chapter_fails_the_command(tiny):
    book = tiny("1 / 0")
    done = command("book", cwd=book.root, HELPERS_OUTPUT=str(book.output))
    assert done.returncode == 1
    assert "02_tiny, profile smoke: cell 3 `1 / 0`: ZeroDivisionError: division by zero" in done.stderr
    assert "Traceback" not in done.stderr and f"The book is at {book.output / 'html/index.html'}" in done.stdout


def start(book, *arguments, **environment):
    """A command that runs while the test goes on."""
    return subprocess.Popen([sys.executable, "-m", "helpers", *arguments], cwd=book.root, text=True,
                            env=os.environ | {"HELPERS_OUTPUT": str(book.output)} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_commands_in_one_folder_take_turns(tiny):
    book = tiny(RECORD)
    said = [command.communicate() for command in [start(book, "book") for _ in range(2)]]
    assert all(f"The book is at {book.output / 'html/index.html'}" in out for out, _ in said)
    assert sum(f"another command is at work in {book.output}: waiting" in error for _, error in said) == 1
    assert all("Error" not in error for _, error in said)


def test_a_command_that_was_killed_keeps_no_other_waiting(tiny, tmp_path):
    started = tmp_path / "started"
    book = tiny(f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(100)")
    first = start(book, "run")
    while not started.exists() and first.poll() is None:
        time.sleep(0.1)
    tiny(RECORD)
    second = start(book, "run")
    assert "waiting for its end" in second.stderr.readline()
    first.kill()
    assert second.wait(60) == 0 and first.wait() and [run.chapter for run in status(book)] == ["02_tiny"]


def test_kernels_that_start_at_once_cannot_take_the_same_port(tiny, tmp_path, monkeypatch):
    long = tmp_path / ("temporary" * 12)  # a socket's name may have 100 characters
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    book = tiny("import json\nfrom ipykernel.connect import get_connection_info",
                "assert json.loads(get_connection_info())['transport'] == 'ipc'", RECORD)
    execute(book, book.chapters())


def test_without_a_terminal_progress_is_a_line_a_cell(tiny):
    book = tiny("x = 1", RECORD)
    done = command("run", cwd=book.root, HELPERS_OUTPUT=str(book.output))
    lines = [line for line in done.stderr.splitlines() if "[smoke]" in line]
    assert [re.fullmatch(r"02_tiny \[smoke\]: cell (\d) of 5, \d+ s", line)[1] for line in lines] == [*"012345"]


@pytest.mark.parametrize("variables", [
    {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"HOME": "/proc"}],
    ids=["no locale", "read-only home"])
def test_below_an_odd_path_in_an_odd_environment(tiny, variables):
    book = tiny(RECORD, FIGURE, "print('ε')", folder="a folder with ä, [b] and 'quote")
    commit(book)
    done = command("book", "--show", "run", cwd=book.root, **variables)
    assert done.returncode == 0, done.stderr


def test_a_user_without_a_home(tiny):
    """Neither HOME nor an entry in the list of users, as in many containers."""
    book = tiny("from pathlib import Path", "Path.home()", RECORD)
    nobody = ("import pwd, runpy, sys\ndef nobody(_): raise KeyError\npwd.getpwuid = nobody\n"
              "sys.argv[1:] = ['book']\nrunpy.run_module('helpers', run_name='__main__', alter_sys=True)")
    variables = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", nobody], cwd=book.root, capture_output=True, text=True,
                          env=variables | {"HELPERS_OUTPUT": str(book.output)})
    assert done.returncode == 0, done.stderr
