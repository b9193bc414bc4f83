"""Neural rejection of the helpers against the plain way, side by side in one process.

    fit    ten one-vs-rest RBF-SVMs on layer 5: scikit-learn's SVC on the features, a class after the other, against one
           matrix of distances for all; same C, gamma and tolerance, and the decision values on new images compared
    step   one gradient step of the attack on the whole DNR against one on the bare network
    large  (with --large) DNR with the paper's C and gamma on that many images: seconds and the largest memory

Usage: python tests/benchmarks/bench_rejection.py [--help]. MNIST is downloaded, or read from the folder HELPERS_DATA.
"""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.svm import SVC
from tqdm import tqdm

from helpers import adaptive, attacks, data, evaluation, files, models, records, rejection, training
from helpers import svm as svms
from helpers.threat import ThreatModel

TARGETS = {"fit, plain / ours": (50, ">="), "fit, largest difference of decision values": (1e-4, "<="),
           "step, DNR / bare network": (4, "<="), "large, seconds": (600, "<="), "large, GB": (16, "<=")}  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="data set of helpers.data (digits needs no download)")
    parser.add_argument("--train", type=int, default=10000, help="images that the network is trained on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=3000, help="images that the SVMs of `fit` are fitted on")
    parser.add_argument("--dnr", type=int, default=8000, help="images that the DNR of `step` is fitted on")
    parser.add_argument("--C", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=200, help="images attacked, in one batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=int, default=0, help="images of `large`, which takes minutes; 0 leaves it out")
    parser.add_argument("--output", type=Path, default=Path("_build/bench-rejection.json"))
    return parser.parse_args()


def measure_fit(h, y, new, C, gamma, repeats):
    """Seconds of both ways, and by how much their decision values differ on the features `new`."""
    start = time.perf_counter()
    plain = [SVC(C=C, gamma=gamma, tol=1e-4, cache_size=1000).fit(h, y == k) for k in tqdm(range(10), desc="plain")]
    seconds = {"plain": time.perf_counter() - start, "ours": []}
    for _ in tqdm(range(repeats), desc="ours"):
        start = time.perf_counter()
        gram = svms.kernel(svms.squared_distances(h), gamma)
        svm = svms.SVM.of(h, *svms.duals(gram, y, C), gamma, C)
        seconds["ours"].append(time.perf_counter() - start)
    theirs = np.stack([one.decision_function(new) for one in plain], axis=1)
    difference = np.abs(svm.scores(tf.constant(new, tf.float64))[0] - theirs).max()
    return seconds["plain"], float(np.median(seconds["ours"])), float(difference), len(svm.vectors)


def measure_step(defence, x, y, steps, repeats):
    """Median milliseconds of a gradient of the bare network and of the defence, in interleaved order."""
    threat, aware = ThreatModel("l2", 0.5), adaptive.evasion(10)
    options = dict(steps=steps, step_size=1e-3, batch_size=len(x))
    calls = {"bare network": lambda: attacks.pgd(defence.network, x, y, threat, losses=("margin",), **options),
             "DNR": lambda: attacks.pgd(defence.logits, x, y, threat, losses=(aware,), goal=aware, **options)}
    seconds = {name: [] for name in calls}
    for turn in tqdm(range(repeats + 1), desc="step"):
        for name in list(calls)[:: (-1) ** turn]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * float(np.median(each[1:])) / steps / len(x) for name, each in seconds.items()}


def main():
    options = arguments()
    d = data.load(options.data).take(max(options.train, options.samples, options.dnr, options.large), 1000)
    provenance = records.Record.start("00_benchmark", "paper", {d.name: d.provenance()}).provenance
    network = models.deep_conv(d.x_train.shape[1:], len(d.class_names))
    training.fit(network, d.x_train[: options.train], d.y_train[: options.train], epochs=options.epochs, batch_size=128,
                 label="training")
    x, y, n = d.x_train, d.y_train, options.samples
    (h,), (new,) = (rejection.features(network, images, (5,)) for images in (x[:n], d.x_test[:500]))
    plain, ours, difference, vectors = measure_fit(h, y[:n], new, options.C, options.gamma, options.repeats)
    found = {"fit, plain / ours": plain / ours, "fit, largest difference of decision values": difference}
    dnr = rejection.fit(network, x[: options.dnr], y[: options.dnr], C=options.C, gamma=options.gamma)
    correct = evaluation.correct(network, d.x_test, d.y_test)
    few = np.flatnonzero(correct)[: options.images]
    step = measure_step(dnr, d.x_test[few], d.y_test[few], options.steps, options.repeats)
    found["step, DNR / bare network"] = step["DNR"] / step["bare network"]
    if options.large:
        start = time.perf_counter()
        rejection.fit(network, x[: options.large], y[: options.large], label="large")
        found["large, seconds"] = time.perf_counter() - start
        found["large, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    table = pd.DataFrame({"measured": found, "target": {name: TARGETS[name][0] for name in found}})
    table["met"] = [value >= TARGETS[name][0] if TARGETS[name][1] == ">=" else value <= TARGETS[name][0]
                    for name, value in found.items()]
    details = {"plain_seconds": plain, "our_seconds": ours, "vectors_fit": vectors, "ms_per_gradient": step,
               "vectors_dnr": [len(svm.vectors) for svm in dnr.svms]}
    print(f"\n{table.to_string(float_format='{:.4g}'.format)}\n{json.dumps(details)}")
    report = {"settings": {name: value for name, value in vars(options).items() if name != "output"},
              "provenance": provenance.model_dump(), "details": details, "targets": table.to_dict("index")}
    with files.atomic(options.output) as path:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
