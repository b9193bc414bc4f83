"""Neural rejection of the helpers against the plain way, side by side in one process.

    fit    ten one-vs-rest RBF-SVMs on layer 5: scikit-learn's SVC on the features, a class after the other, against one
           matrix of distances for all; same C, gamma and tolerance, and the decision values on new images compared
    step   one gradient step of the attack on the whole DNR against one on the bare network
    large  (with --large) DNR with the paper's C and gamma on that many images: seconds and the largest memory

Usage: python tests/benchmarks/bench_rejection.py [--help]. MNIST is downloaded, or read from the folder HELPERS_DATA.
"""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
import resource
import time
from functools import partial

import numpy as np
import pandas as pd
import tensorflow as tf
from common import parser, report, rounds, verdicts
from sklearn.svm import SVC
from tqdm import tqdm

from helpers import attacks, data, evaluation, models, rejection, training
from helpers import svm as svms
from helpers.threat import ThreatModel

TARGETS = {"fit, plain / ours": (">=", 50), "fit, largest difference of decision values": ("<=", 1e-4),
           "step, DNR / bare network": ("<=", 4), "large, seconds": ("<=", 600), "large, GiB": ("<=", 16)}


def arguments():
    options = parser(__doc__)
    options.set_defaults(data="mnist", epochs=3, repeats=5)
    options.add_argument("--train", type=int, default=10000, help="images that the network is trained on")
    options.add_argument("--samples", type=int, default=3000, help="images that the SVMs of `fit` are fitted on")
    options.add_argument("--dnr", type=int, default=8000, help="images that the DNR of `step` is fitted on")
    options.add_argument("--C", type=float, default=1.0)
    options.add_argument("--gamma", type=float, default=1e-3)
    options.add_argument("--steps", type=int, default=10, help="gradient steps of a round")
    options.add_argument("--large", type=int, default=0, help="images of `large`, which takes minutes; 0 leaves it out")
    return options.parse_args()


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
    difference = np.abs(svm.scores(tf.constant(new, tf.float64)) - theirs).max()
    return seconds["plain"], float(np.median(seconds["ours"])), float(difference), len(svm.vectors)


def measure_step(defence, x, y, steps, repeats):
    """Seconds, and milliseconds of a gradient, of the bare network and of the defence."""
    def attack(model, loss, goal=None):
        return attacks.pgd(model, x, y, ThreatModel("l2", 0.5), steps=steps, step_size=1e-3, losses=(loss,), goal=goal,
                           batch_size=len(x)).images

    calls = {"bare network": partial(attack, defence.network, "margin"),
             "DNR": partial(attack, defence, rejection.margin, rejection.margin)}
    table, _ = rounds(calls, repeats, "step")
    table["ms/gradient"] = 1000 * table["seconds"] / steps / len(x)
    return table


def main():
    options = arguments()
    d = data.load(options.data).take(max(options.train, options.samples, options.dnr, options.large), 1000)
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
    found["step, DNR / bare network"] = step["seconds"]["DNR"] / step["seconds"]["bare network"]
    if options.large:
        start = time.perf_counter()
        rejection.fit(network, x[: options.large], y[: options.large], label="large")
        found["large, seconds"] = time.perf_counter() - start
        found["large, GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    fit = pd.DataFrame({"seconds": {"plain": plain, "ours": ours}})
    vectors = pd.DataFrame({"support vectors": {"fit": vectors} | {
        f"DNR, layer {n}": len(svm.vectors) for n, svm in zip(dnr.layers, dnr.svms, strict=True)}})
    targets = verdicts(found, {name: TARGETS[name] for name in found})
    report("rejection", options, d, {"fit": fit, "step": step, "support vectors": vectors, "targets": targets})


if __name__ == "__main__":
    main()
