"""Units on a Dask cluster, whose workers share no folder with this process, the client; it alone keeps what they find.

    results ─► every worker is looked at ─► a unit goes to one, and after it the files that this one lacks
            ◄─ what the unit returns, and the networks and defences that it has saved

Dask's own client hands the units out. joblib's back end for Dask (1.6) waits for ever for a unit that has ended its
worker's process too often, and leaves no room for a unit to come back and ask for a file.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from helpers import files

_WAIT = 30  # seconds for a scheduler or a worker to appear


class ClusterError(RuntimeError):
    """A cluster that cannot compute units, or no longer can; what it has finished is kept."""


def results(address, function, work, todo, *, ask, data=None, at_once=None) -> Iterator[tuple]:
    """Yield (key, what `work(arguments, threads)` returned, units so far by worker) for key -> arguments of `todo`.

    They come as they end, when the files that they name are here. `work` calls `function`, which travels by value with
    what else it needs of its module. ask : `units.versions` and the packages. data : as in `units.run`. at_once : so
    many units at most; None: as many as there are workers.
    Raises ClusterError where Dask is missing, no scheduler or no worker answers, a worker is not like this process
    (all such are named, before any unit runs), the scheduler goes, or a unit has ended its worker too often.
    """
    running, ended, waiting, shares = {}, SimpleQueue(), iter(todo), Counter()
    with _connected(address) as client:
        ask = *ask, _datasets(data)
        wanted, work = _check_workers(client, address, ask), _by_value(function, work)
        warnings.filterwarnings("ignore", "Sending large graph")  # a network; the caller restores the filters

        def submit(key, lacking=()):
            contents = {place: files.output(place).read_bytes() for place in lacking}
            future = client.submit(_unit, work, todo[key], files.named(todo[key]), contents, ask, wanted, pure=False,
                                   priority=len(contents))
            running[future.key] = key, future
            future.add_done_callback(ended.put)

        for key in islice(waiting, at_once):
            submit(key)
        while running:
            try:
                future = ended.get(timeout=_WAIT)
            except Empty:
                _wait_for_one(client, address)
                continue
            key, _ = running.pop(future.key)
            found = _outcome(future, address, f"{function.__name__}({todo[key]})")
            if isinstance(found, list):
                submit(key, lacking=found)
                continue
            members, saved, worker = found
            for place, content in saved.items():
                _write(place, content)
            shares[worker] += 1
            yield key, members, shares
            for key in islice(waiting, 1):
                submit(key)


def _connected(address):
    try:
        from distributed import Client
    except ImportError as error:
        raise ClusterError(f"HELPERS_CLUSTER is {address}, which needs the package distributed ({error})") from error
    logging.getLogger("distributed.client").setLevel("CRITICAL")  # what it would say of a lost scheduler, we do
    try:
        return Client(address, timeout=_WAIT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(f"HELPERS_CLUSTER: no scheduler answers at {address} ({error})") from error


def _by_value(function, work):
    import cloudpickle

    if not function.__module__.startswith("helpers."):
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return cloudpickle.dumps(work)


def _outcome(future, address, unit):
    from distributed import KilledWorker

    if future.status == "cancelled":
        raise ClusterError(f"the scheduler at {address} has gone: what is finished is kept, run again")
    try:
        return future.result()
    except KilledWorker as error:
        raise ClusterError(f"the unit {unit} has ended its worker's process again and again, at last that of "
                           f"{error.last_worker.address}: has it too little memory?") from error


def _wait_for_one(client, address):
    try:
        client.wait_for_workers(1, timeout=_WAIT)
    except TimeoutError as error:
        raise ClusterError(f"the scheduler at {address} has had no worker for {_WAIT} s: start some") from error


def _check_workers(client, address, ask):
    """Return what every worker has to be like; raise ClusterError that names those that are not, or where none is."""
    _wait_for_one(client, address)
    wanted, taken, refused = _state(*ask), {}, []
    for worker, found in client.run(_look, ask, wanted, on_error="return").items():
        if isinstance(found, BaseException):
            found = [f"worker {worker}: {found}; expected the code of the helpers that the client has"], None
        reasons, seat = found
        refused += reasons
        machine, visible = seat or (None, "")
        devices, others = set(visible.split(",")) - {""}, taken.setdefault(machine, set())
        if devices & others or (devices and others and "all" in devices | others):
            refused.append(f"worker {worker}: shares a GPU with another worker, expected one worker for each GPU")
        others |= devices
    if refused:
        raise ClusterError("\n".join(refused))
    return wanted


def _look(ask, wanted, dask_worker):
    """Return why a worker is refused, in one sentence or none, and the GPU that it sits at, or None."""
    found, threads = _state(*ask), dask_worker.state.nthreads
    wrong = [f"{what} is {found.get(what)}, expected {value}" for what, value in wanted.items()
             if found.get(what) != value]
    wrong += [f"it has {threads} threads, expected --nthreads 1: a process computes one unit"] if threads != 1 else []
    return [f"worker {dask_worker.name}: {'; '.join(wrong)}"] if wrong else [], gpu()


def _state(versions, packages, datasets):
    """Return what has to be the same in all processes, by name."""
    state = {**_software(versions, packages)}
    for name in datasets:
        try:
            state[f"data set {name}"] = _content(name)
        except (OSError, ValueError) as error:
            state[f"data set {name}"] = f"missing: {str(error).partition(' (')[0]}"
    return state


@cache  # as it was when this process loaded it
def _software(versions, packages):
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    return {"Python": ".".join(platform.python_version_tuple()[:2]), **versions(*packages),
            "code of the helpers": hashlib.sha256(source.encode()).hexdigest()[:12]}


@cache
def _content(name):
    from helpers import data  # takes seconds

    found, digest = data.load(name), hashlib.sha256()
    for part in (found.x_train, found.y_train, found.x_test, found.y_test):
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:12]


def _datasets(value):
    """Return the data sets that `value` names, by their names or checksums."""
    if value is None:
        return ()
    from helpers import data

    text = json.dumps(value)
    return tuple(name for name in data.NAMES if any(f'"{word}"' in text for word in (name, *data.checksums(name))))


def gpu() -> tuple[str, str] | None:
    """Return the machine and the GPUs that this process may use, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return (platform.node(), visible) if shutil.which("nvidia-smi") and visible not in ("", "-1") else None


def _unit(work, arguments, places, contents, ask, wanted):
    """Return what `work` returns, what it has saved, and who this worker is, or the list of `places` that it lacks."""
    import cloudpickle
    from distributed import get_worker
    from threadpoolctl import threadpool_limits

    if reasons := _look(ask, wanted, worker := get_worker())[0]:  # it has come late
        raise ClusterError(*reasons)
    for place, content in contents.items():
        _write(place, content)
    if lacking := [place for place in places if not files.output(place).exists()]:
        return lacking
    if threads := None if gpu() else 1:  # as `units.run` has it on one machine
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    with threadpool_limits(threads):
        found = cloudpickle.loads(work)(arguments, threads)
    saved = {place: files.output(place).read_bytes() for place in files.named(found) if place not in places}
    return found, saved, worker.address


def _write(place, content):
    if not (path := files.output(place)).exists():
        with files.atomic(path) as temporary:
            temporary.write_bytes(content)
