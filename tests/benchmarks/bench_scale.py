"""What a Dask cluster costs and gains, measured with a scheduler and workers on this machine.

    workers   seconds of the same units on so many workers, and in processes of this machine without a cluster
    overhead  milliseconds that a unit costs besides what it computes, from units that do nothing
    plan      hours of the units that are kept for each chapter on 1, 8 and 64 workers: chapter after chapter, function
              after function, and of these the longest first

Usage: python tests/benchmarks/bench_scale.py [--help]. It needs the extra `cluster`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from common import parser, report, verdicts
from distributed import Client

from helpers import data, files, units

TARGETS = {"overhead, ms a unit": ("<=", 50)}
WORKERS = 1, 8, 64


def arguments():
    options = parser(__doc__)
    options.add_argument("--units", type=int, default=40, help="units of `workers`")
    options.add_argument("--seconds", type=float, default=0.5, help="of one such unit")
    options.add_argument("--empty", type=int, default=300, help="units of `overhead`")
    options.add_argument("--kept", default=str(files.output("units")), help="folder of the chapters' units")
    return options.parse_args()


def work(number, seconds):
    """A unit that keeps one core busy for so many of its own seconds."""
    norms, ends = [], time.process_time() + seconds
    while time.process_time() < ends:
        norms.append(np.linalg.norm(np.random.default_rng(len(norms)).normal(size=(100, 100))))
    return {"draws": len(norms), "number": number}


def nothing(number):
    return {}


@contextmanager
def cluster(workers):
    """Set HELPERS_CLUSTER to a scheduler with so many workers."""
    with tempfile.TemporaryDirectory() as folder:
        def start(*arguments):
            with open(Path(folder, "log"), "a") as log:
                return subprocess.Popen([sys.executable, "-m", *arguments, "--no-dashboard"], stdout=log, stderr=log)

        about = Path(folder, "scheduler.json")
        started = [start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file",
                         str(about))]
        while not about.exists():
            time.sleep(0.1)
        os.environ["HELPERS_CLUSTER"] = address = json.loads(about.read_text())["address"]
        started += [start("distributed.cli.dask_worker", address, "--nthreads", "1", "--local-directory", folder)
                    for _ in range(workers)]
        try:
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(workers, timeout=120)
            yield
        finally:
            for process in started[::-1]:
                process.terminate()
                process.wait(30)
            del os.environ["HELPERS_CLUSTER"]


def measure(function, grid, jobs=None):
    """Seconds of units, after one that starts processes and is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        units.run(function, [dict.fromkeys(grid[0], -1)], folder=Path(folder, "first"), n_jobs=jobs)
        start = time.perf_counter()
        units.run(function, grid, folder=folder, n_jobs=jobs)
        return time.perf_counter() - start


def plan(folder, overhead):
    """Hours of each chapter's kept units by the number of workers; a function waits for the one before."""
    rows = {}
    for chapter in sorted(folder.glob("*")):
        kept = pd.DataFrame(units.kept(chapter), columns=["function", "seconds"])
        stages = {name: group + overhead for name, group in kept.groupby("function", sort=False)["seconds"]}
        hours = {str(n): units.makespan(stages, n) / 3600 for n in WORKERS}
        rows[chapter.name] = {"units": len(kept)} | hours | {"longest unit": kept["seconds"].max() / 3600}
    table = pd.DataFrame.from_dict(rows, orient="index")
    if rows:
        table.loc["all"] = [*table.sum()[:-1], table["longest unit"].max()]
    return table


def main():
    options, rows = arguments(), {}
    grid = [{"number": number, "seconds": options.seconds} for number in range(options.units)]
    for jobs in (1, 2):
        rows[f"{jobs} without a cluster"] = {"seconds": measure(work, grid, jobs)}
        with cluster(jobs):
            rows[f"{jobs} of a cluster"] = {"seconds": measure(work, grid)}
            if jobs == 1:
                empty = measure(nothing, [{"number": number} for number in range(options.empty)]) / options.empty
    report("scale", options, data.load("digits"), {
        "workers": pd.DataFrame.from_dict(rows, orient="index"),
        "hours of the units kept, on so many workers": plan(Path(options.kept), empty),
        "targets": verdicts({"overhead, ms a unit": 1000 * empty}, TARGETS)})


if __name__ == "__main__":
    main()
