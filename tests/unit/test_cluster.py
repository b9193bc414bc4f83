"""Units on a Dask cluster: a real scheduler and workers in folders of their own with an empty home, also killed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import conftest
import nbformat
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from helpers import cluster, data, files, units

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from helpers import units

def unit(seed, slow=0.2, kill=""):
    time.sleep(slow)
    if kill and not Path(kill).exists():
        Path(kill).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"values": np.random.default_rng(seed).normal(size=2000), "mean": seed / 3}

if __name__ == "__main__":
    kill = {"kill": sys.argv[1]} if sys.argv[1:] else {}
    try:
        units.run(unit, [{"seed": seed} | (kill if seed == 2 else {}) for seed in range(8)], folder="kept")
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


def draws(seed, offset=0.5):
    """Values of several types, and who has computed them."""
    rng = np.random.default_rng(seed)
    return {"normal": rng.normal(size=(50, 3)), "float32": rng.random(5, np.float32), "sum": seed + offset,
            "words": np.array(["a", "bc"]), "nested": {"a": [1, None, "ε"]}}


THREADS = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"]


def surroundings(number):
    pools = [pool["num_threads"] for pool in threadpool_info()]
    time.sleep(0.1)
    return {"pid": os.getpid(), "folder": os.getcwd(), "pools": pools} | {
        name: os.environ[name] for name in ["HOME", *THREADS]}


def store(content, kind, **about):
    """As `models.save` and `rejection.save` do it: a file that is named after what it holds."""
    path = files.output(kind, hashlib.sha256(content).hexdigest() + (".npz" if about else ".keras"))
    with files.atomic(path) as temporary:
        np.savez(temporary, about=np.array(json.dumps(about))) if about else temporary.write_bytes(content)
    return path.name


def train(seed):
    beside = store(b"network of the defence %d" % seed, "defences")  # which alone names it
    return {"network": store(b"network %d".ljust(11_000_000) % seed, "networks"),
            "defence": store(b"defence %d" % seed, "defences", network=beside)}


def attack(network, defence, number):
    time.sleep(0.1)
    with np.load(files.output("defences", defence)) as members:
        beside = json.loads(members["about"].item())["network"]
    read = [files.output(*place).read_text() for place in (("networks", network), ("defences", beside))]
    return {"read": [text.strip() for text in read], "pid": os.getpid()}


def fails(x):
    raise RuntimeError(f"no result for {x}")


def kills_the_nanny(pid):
    os.killpg(pid, signal.SIGKILL)


def kills():
    os.kill(os.getpid(), signal.SIGKILL)


def start(folder, *command, **environment):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "a") as log:
        return subprocess.Popen([sys.executable, *command], cwd=folder, start_new_session=True, stdout=log, stderr=log,
                                env=os.environ | environment)


def end(process):
    """Kill a process with its children, as a machine that loses its power."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


class Cluster:
    """A scheduler and workers, each in a folder of its own below `folder`."""

    def __init__(self, folder, stack, n=2, **environment):
        self.folder, self.stack, about = folder, stack, folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
                                    "--port", "0", "--no-dashboard", "--scheduler-file", str(about), **environment)
        until(about.exists)
        self.address = json.loads(about.read_text())["address"]
        self.workers = [self.worker(f"worker{i}") for i in range(n)]
        if n:
            self.wait(n)

    def start(self, name, *command, **environment):
        process = start(self.folder / name, *command, **environment)
        self.stack.callback(end, process)
        return process

    def worker(self, name, threads=1, **environment):
        home = self.folder / name / "home"
        home.mkdir(parents=True)
        return self.start(name, "-m", "distributed.cli.dask_worker", self.address, "--name", name, "--no-dashboard",
                          "--nthreads", str(threads), "--local-directory", "dask",
                          **conftest.OFFLINE | {"HOME": str(home), "HELPERS_OUTPUT": "_build"} | environment
                          | dict.fromkeys(THREADS, "2"))

    def wait(self, n):
        from distributed import Client

        with Client(self.address, timeout=120, set_as_default=False) as client:
            client.wait_for_workers(n, timeout=120)


def until(condition, seconds=120):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "nothing has happened"
        time.sleep(0.02)


@contextmanager
def a_cluster(folder, *arguments, **environment):
    if not find_spec("distributed"):
        conftest.lacking("Dask")
    with ExitStack() as stack:
        yield Cluster(folder, stack, *arguments, **environment)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with a_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def here(tmp_path, monkeypatch, two):
    """This process as the client of two workers."""
    monkeypatch.setenv("HELPERS_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("HELPERS_CLUSTER", two.address)
    return two


def content(folder):
    """What the units of a folder hold, by their file names, but for the seconds."""
    found = {}
    for path in sorted(folder.glob("*/*.npz")):
        with np.load(path, allow_pickle=False) as members:
            found[path.name] = [(name, members[name].dtype, members[name].tobytes()) for name in members.files
                                if name != "index"]
            index = json.loads(members["index"].item())
            found[path.name].append([(name, text) for name, text in index.items() if name != "seconds"])
    return found


# ── the same as on one machine ────────────────────────────────────────────────────────────────────────────────────────


def test_a_cluster_finds_what_one_machine_finds(tmp_path, here, monkeypatch, capsys):
    grid = [{"seed": seed} for seed in range(9)]
    digits = {"digits": data.load("digits").sha256}
    units.run(draws, grid, folder=tmp_path / "cluster", data=digits)
    line = capsys.readouterr().out.rsplit("\r", 1)[-1]
    assert "9/9" in line and "by worker: " in line
    assert sum(map(int, line.split("by worker: ")[1].split("]")[0].split())) == 9
    monkeypatch.delenv("HELPERS_CLUSTER")
    found = units.run(draws, grid, folder=tmp_path / "local", n_jobs=2, data=digits)
    assert content(tmp_path / "cluster") == content(tmp_path / "local") and len(found) == 9
    monkeypatch.setenv("HELPERS_CLUSTER", "tcp://nowhere")
    assert units.run(draws, grid, folder=tmp_path / "cluster", data=digits)[3]["sum"] == 3.5, "nothing is left"
    assert not list(here.folder.rglob("*.npz")), "the client alone keeps units"


def test_workers_take_one_unit_each_with_one_thread_and_an_empty_home(tmp_path, here):
    found = units.run(surroundings, [{"number": n} for n in range(6)], folder=tmp_path)
    assert {one["folder"] for one in found} == {str(here.folder / f"worker{i}") for i in range(2)}
    assert len({one["pid"] for one in found}) == 2 and os.getpid() not in {one["pid"] for one in found}
    for one in found:
        assert set(one["pools"]) <= {1} and one["HOME"] == f"{one['folder']}/home"
        assert {one[name] for name in THREADS} == {"1"}


def test_networks_and_defences_travel_both_ways(tmp_path, here):
    [made] = units.run(train, [{"seed": 1}], folder=tmp_path)
    here_now = {path.name for path in files.output().glob("*/*")}
    assert {made["network"], made["defence"]} < here_now and len(here_now) == 3
    grid = [{"network": made["network"], "defence": made["defence"], "number": n} for n in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as Dask's about what is large
        found = units.run(attack, grid, folder=tmp_path)
    assert all(one["read"] == ["network 1", "network of the defence 1"] for one in found)
    assert len({one["pid"] for one in found}) == 2, "one of the two has got them from here"
    for i in range(2):
        assert {path.name for path in (here.folder / f"worker{i}").glob("_build/*/*")} == here_now


def test_units_at_a_time_are_limited(tmp_path, here):
    started = time.monotonic()
    units.run(surroundings, [{"number": n} for n in range(6)], folder=tmp_path, n_jobs=1)
    assert time.monotonic() - started >= 0.6


def test_a_failing_unit_is_named(tmp_path, here):
    with pytest.raises(RuntimeError, match="no result for 1") as caught:
        units.run(fails, [{"x": 1}], folder=tmp_path)
    assert "in the unit fails({'x': 1})" in caught.value.__notes__


def test_functions_of_a_notebook_run_on_a_cluster(tmp_path, here):
    cells = ["import os\nfrom helpers import units\nRATE = 3\ndef helper(x):\n    return RATE * x\n"
             "def unit(x):\n    return {'y': helper(x), 'folder': os.getcwd()}",
             "found = units.run(unit, [{'x': x} for x in range(4)], folder='kept')",
             f"assert [r['y'] for r in found] == [0, 3, 6, 9]\n"
             f"assert all(r['folder'].startswith({str(here.folder)!r}) for r in found)"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
                                        metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    conftest.papermill(tmp_path / "notebook.ipynb", tmp_path, dict(os.environ))
    assert len(kept(tmp_path)) == 4


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_workers_that_are_not_like_the_client_are_refused_by_name(tmp_path, monkeypatch):
    source, elsewhere = Path(units.__file__).parent, {}
    for name, change in {"older": "# a line more", "none": None}.items():
        elsewhere[name] = tmp_path / name
        shutil.copytree(source, elsewhere[name] / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
        path = elsewhere[name] / "helpers/cluster.py"
        path.write_text(path.read_text() + change) if change else path.unlink()
    elsewhere["scipy"] = tmp_path / "scipy"
    (about := elsewhere["scipy"] / "scipy-0.0.1.dist-info").mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: scipy\nVersion: 0.0.1\n")
    mnist = replace(data.load("digits"), name="mnist")
    monkeypatch.setattr(data, "load", lambda name: mnist)
    before = os.environ.get("PYTHONPATH", "")
    with a_cluster(tmp_path / "cluster") as made:
        monkeypatch.setenv("HELPERS_CLUSTER", made.address)
        for name, path in elsewhere.items():
            made.worker(name, PYTHONPATH=f"{path}{os.pathsep}{before}")
        made.worker("threads", threads=2)
        made.wait(6)
        with pytest.raises(cluster.ClusterError) as caught:
            units.run(draws, [{"seed": 1}], folder=tmp_path / "kept", data=data._SOURCES["mnist"]["sha256"])
    said = str(caught.value).splitlines()
    assert len(said) == 6 and not (tmp_path / "kept").exists()
    for name, what in {"worker0": "data set mnist is missing: data set 'mnist': HELPERS_DATA names no folder",
                       "older": "code of the helpers is ", "scipy": "scipy is 0.0.1, expected ",
                       "threads": "it has 2 threads, expected --nthreads 1"}.items():
        assert [line for line in said if line.startswith(f"worker {name}: ") and what in line], (name, said)
    assert [line for line in said if "No module named 'helpers.cluster'" in line and line.startswith("worker tcp://")]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_WAIT", 1)
    monkeypatch.setenv("HELPERS_CLUSTER", "tcp://127.0.0.1:9")
    with a_cluster(tmp_path / "cluster", 0) as made:
        with pytest.raises(cluster.ClusterError, match="HELPERS_CLUSTER: no scheduler answers at tcp://127.0.0.1:9"):
            units.run(draws, [{"seed": 1}], folder=tmp_path)
        monkeypatch.setenv("HELPERS_CLUSTER", made.address)
        with pytest.raises(cluster.ClusterError, match="the scheduler at .* has had no worker for 1 s"):
            units.run(draws, [{"seed": 1}], folder=tmp_path)


def test_without_dask_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("HELPERS_CLUSTER", "tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(cluster.ClusterError, match="HELPERS_CLUSTER is .* needs the package distributed"):
        units.run(draws, [{"seed": 1}], folder=tmp_path)


def test_dask_is_not_imported_without_a_cluster(tmp_path):
    script = ("import sys\nfrom helpers import units\ndef unit(x):\n    return {'x': x}\n"
              "units.run(unit, [{'x': 1}], folder='kept', n_jobs=1)\nassert 'distributed' not in sys.modules\n")
    (tmp_path / "script.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "HELPERS_CLUSTER"}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize(("seats", "refused"), [
    ((0, 0), True), ((0, 1), False), (("", ""), False), (("0,1", 1), True), ((0, "all"), True), (("all", "all"), True)])
def test_each_gpu_has_one_worker(monkeypatch, seats, refused):
    class Client:
        def wait_for_workers(self, n, timeout):
            pass

        def run(self, look, ask, wanted, on_error):
            found = {}
            for number, seat in enumerate(seats):
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(seat))
                state = type("State", (), {"nthreads": 1})
                found[f"tcp://{number}"] = look(ask, wanted, type("Worker", (), {"state": state, "name": number}))
            return found

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    try:
        cluster._check_workers(Client(), "tcp://", (units.versions, units.PACKAGES, ()))
        assert not refused
    except cluster.ClusterError as error:
        assert refused and "worker tcp://1: shares a GPU" in str(error)


# ── what is killed ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What one machine keeps of the script's units."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "script.py").write_text(SCRIPT)
    assert start(folder, "script.py").wait(120) == 0, (folder / "log").read_text()
    return content(folder / "kept")


def client(folder, address, *arguments):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    return start(folder, "script.py", *arguments, HELPERS_CLUSTER=address)


def kept(folder):
    return [path for path in folder.glob("kept/unit/*.npz") if not path.name.startswith(".")]


def check_that_it_goes_on(folder, address, reference):
    before = {path: path.stat().st_mtime_ns for path in kept(folder)}
    assert 0 < len(before) < 8
    assert client(folder, address).wait(120) == 0, (folder / "log").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a unit that was kept was computed again"
    assert content(folder / "kept") == reference


def test_a_worker_is_killed_in_a_unit(tmp_path):
    with a_cluster(tmp_path) as made:
        process = client(tmp_path / "client", made.address, str(tmp_path / "killed"))
        assert process.wait(120) == 0, (tmp_path / "client/log").read_text()
    assert (tmp_path / "killed").exists()
    (tmp_path / "local").mkdir()
    (tmp_path / "local/script.py").write_text(SCRIPT)
    assert start(tmp_path / "local", "script.py", str(tmp_path / "killed")).wait(120) == 0
    assert content(tmp_path / "client/kept") == content(tmp_path / "local/kept")


def test_a_worker_is_lost_and_the_other_goes_on(tmp_path, reference):
    with a_cluster(tmp_path) as made:
        process = client(tmp_path / "client", made.address)
        until(lambda: len(kept(tmp_path / "client")) > 1)
        end(made.workers[0])
        assert process.wait(120) == 0, (tmp_path / "client/log").read_text()
    assert content(tmp_path / "client/kept") == reference


def test_all_workers_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_WAIT", 2)
    with a_cluster(tmp_path, 1) as made:
        monkeypatch.setenv("HELPERS_CLUSTER", made.address)
        with pytest.raises(cluster.ClusterError, match="the scheduler at .* has had no worker for 2 s"):
            units.run(kills_the_nanny, [{"pid": made.workers[0].pid}], folder=tmp_path / "kept")


def test_a_unit_that_always_kills_its_worker_is_named(tmp_path, monkeypatch):
    with a_cluster(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1") as made:
        monkeypatch.setenv("HELPERS_CLUSTER", made.address)
        with pytest.raises(cluster.ClusterError, match=r"the unit kills\({}\) has ended its worker's process again"):
            units.run(kills, [{}], folder=tmp_path / "kept")


def test_the_scheduler_is_killed(tmp_path, reference):
    with a_cluster(tmp_path / "first") as made:
        process = client(tmp_path / "client", made.address)
        until(lambda: len(kept(tmp_path / "client")) > 1)
        end(made.scheduler)
        assert process.wait(60) == 1
    said = (tmp_path / "client/log").read_text()
    assert said.count("ClusterError: the scheduler at tcp://") == 1 and "Traceback" not in said, said
    with a_cluster(tmp_path / "second") as made:
        check_that_it_goes_on(tmp_path / "client", made.address, reference)


def test_the_client_is_killed(tmp_path, reference):
    with a_cluster(tmp_path) as made:
        process = client(tmp_path / "client", made.address)
        until(lambda: len(kept(tmp_path / "client")) > 1)
        end(process)
        check_that_it_goes_on(tmp_path / "client", made.address, reference)
