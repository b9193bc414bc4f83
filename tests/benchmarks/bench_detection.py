"""The two speeds of chapter 04: kernel densities against scikit-learn, thinned networks against plain predictions.

Same images, networks, batches and threads in one process, with oneDNN on (scikit-learn's density has one thread only).
A round runs each contender once, every round in another order; the first round, which compiles, is not counted (that
of the density has few queries). Medians are shown.

    density  Closeness.log_density, and score_samples of scikit-learn's KernelDensity, on last hidden activations of
             noisy test images; all points are of one class, so that every query is compared with every point
    dropout  T predictions by uncertainty.sample, and T plain predictions by the compiled network, of the same images

Usage: python tests/benchmarks/bench_detection.py [--help].
"""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
from functools import partial

import numpy as np
from common import parser, report, rounds, verdicts
from sklearn.neighbors import KernelDensity

from helpers import closeness, data, models, training, uncertainty

NETWORKS = {"after every layer": 0.5, "before the last layer": 0.0}  # where dropout is; its rate behind convolutions
TARGETS = {
    "density, scikit-learn / ours": (">=", 20.0),
    "density, largest relative difference": ("<=", 1e-5),
    **{f"dropout {place}, sample / plain": ("<=", 0.4) for place in NETWORKS},
}


def arguments():
    options = parser(__doc__)
    options.add_argument("--queries", type=int, default=10000, help="images whose density is asked")
    options.add_argument("--points", type=int, default=6000, help="training images, all of one class")
    options.add_argument("--bandwidth", type=float, default=1.7, help="sigma of the kernel")
    options.add_argument("--density-repeats", type=int, default=1, help="counted rounds of the density")
    options.add_argument("--draws", type=int, default=50, help="T, passes with dropout")
    return options.parse_args()


def noisy_activations(model, x, n, seed):
    """Last hidden activations (n, d) of images drawn from `x` with a little noise, so that no two are alike."""
    rng = np.random.default_rng(seed)
    images = x[rng.integers(0, len(x), n)] + rng.normal(0, 0.05, (n, *x.shape[1:]))
    return closeness.activations(model, images.clip(0, 1).astype("float32"))


def measure_density(points, queries, bandwidth, repeats):
    """Seconds and scores per second, and the largest relative difference of the log densities."""
    near, one_class = closeness.Closeness((points,), bandwidth), np.zeros(len(queries), int)
    tree = KernelDensity(bandwidth=bandwidth / np.sqrt(2)).fit(points)  # its kernel is exp(-d^2 / (2 h^2)) ...
    normalisation = points.shape[1] / 2 * np.log(np.pi * bandwidth**2)  # ... divided by its integral
    scores = {"ours": lambda n: near.log_density(queries[:n], one_class[:n]),
              "scikit-learn": lambda n: tree.score_samples(queries[:n]) + normalisation}
    first, calls = ({name: partial(score, n) for name, score in scores.items()} for n in (500, len(queries)))
    table, found = rounds(calls, repeats, "density", first)
    table["scores/s"] = len(queries) / table["seconds"]
    return table, np.abs(found["ours"] / found["scikit-learn"] - 1).max()


def measure_dropout(networks, x, draws, repeats):
    """Seconds of `draws` predictions of all images, sampled and plain, for every network."""
    calls = {}
    for place, model in networks.items():
        calls[f"{place}, sample"] = partial(uncertainty.sample, model, x, draws=draws, batch_size=len(x))
        calls[f"{place}, plain"] = lambda model=model: [models.predict(model, x, len(x)) for _ in range(draws)]
    table, _ = rounds(calls, repeats, "dropout")
    table["predictions/s"] = len(x) * draws / table["seconds"]
    return table


def main():
    options = arguments()
    dataset = data.load(options.data).take(n_test=options.images)
    shape, classes = dataset.x_train.shape[1:], len(dataset.class_names)
    networks = {place: models.two_conv(shape, classes, strided=False, batch_norm=False, conv_dropout=rate)
                for place, rate in NETWORKS.items()}
    chosen = networks["after every layer"]  # the chapter's
    training.fit(chosen, dataset.x_train, dataset.y_train, epochs=options.epochs, batch_size=64, label="training")
    points = noisy_activations(chosen, dataset.x_train, options.points, 0)
    queries = noisy_activations(chosen, dataset.x_test, options.queries, 1)
    density, difference = measure_density(points, queries, options.bandwidth, options.density_repeats)
    dropout = measure_dropout(networks, dataset.x_test, options.draws, options.repeats)
    measured = {f"dropout {place}, sample / plain": dropout["seconds"][f"{place}, sample"]
                / dropout["seconds"][f"{place}, plain"] for place in NETWORKS}
    measured["density, scikit-learn / ours"] = density["seconds"]["scikit-learn"] / density["seconds"]["ours"]
    measured["density, largest relative difference"] = difference
    tables = {"density": density, "dropout": dropout, "targets": verdicts(measured, TARGETS)}
    report("detection", options, dataset, tables)


if __name__ == "__main__":
    main()
