"""What the benchmarks share: rounds in interleaved order, verdicts on targets, and a file with each one's last run."""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from helpers import files, records


def parser(description):
    """The options that `make bench` may pass to every benchmark; each adds its own."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default="digits", help="data set of helpers.data (default: digits, no download)")
    options.add_argument("--images", type=int, default=200, help="test images, in one batch")
    options.add_argument("--epochs", type=int, default=10, help="epochs of training before anything is measured")
    options.add_argument("--repeats", type=int, default=3, help="counted rounds")
    options.add_argument("--output", type=Path, default=Path("_build"), help="folder of bench.json")
    return options


def rounds(functions, repeats, label, first=None):
    """Median seconds and last result of each function, each round in another order.

    A round that compiles comes first and is not counted; `first` holds quicker calls for it.
    """
    seconds, results, names = {name: [] for name in functions}, {}, list(functions)
    for turn in tqdm(range(repeats + 1), desc=label):
        for name in np.roll(names, turn):
            start = time.perf_counter()
            results[name] = np.asarray((functions if turn else first or functions)[name]())
            seconds[name].append(time.perf_counter() - start)
    return pd.DataFrame({"seconds": {name: float(np.median(times[1:])) for name, times in seconds.items()}}), results


def verdicts(measured, targets):
    """A table of what was measured against `targets`, name -> (">=" or "<=", limit)."""
    rows = {name: {"measured": float(measured[name]), "relation": relation, "target": limit,
                   "met": bool(measured[name] >= limit if relation == ">=" else measured[name] <= limit)}
            for name, (relation, limit) in targets.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def report(subject, options, dataset, tables, **provenance):
    """Print the `tables`, title -> frame, and write them with their settings and provenance."""
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(float_format='{:.4g}'.format)}")
    made = records.Record.start("00_benchmark", "paper", {dataset.name: dataset.provenance()}).provenance
    content = {
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "provenance": made.model_dump() | provenance,
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or made.cpu_count,
    } | {title: table.to_dict("index") for title, table in tables.items()}
    path = options.output / "bench.json"
    every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(every | {subject: content}, indent=1), encoding="utf-8")
    print(f"\nwritten to {path}")
