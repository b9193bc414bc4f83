"""PGD of the helpers against a bare compiled loop, Foolbox, CleverHans and ART, side by side in one process.

Same network, images, batches, step sizes, threads, and oneDNN on for all. Every library is given the network as one
compiled function, the fastest form for each of them (Foolbox and ART are slower on the Keras object). A round runs
each contender once, every round in another order; the first round, which compiles, is not counted (that of the curve
has the smallest eps alone: the rate has compiled the rest). Medians are shown.

    rate   a fixed number of steps on all images: gradients per second
    curve  accuracy at every eps of a grid, counting an image as beaten once a smaller eps has beaten it

Usage: python tests/benchmarks/bench_attacks.py [--help]. The peers: requirements.in beside this file.
"""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
from functools import partial

import art.attacks.evasion
import foolbox
import numpy as np
import tensorflow as tf
from art.estimators.classification import TensorFlowV2Classifier
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent
from common import parser, report, rounds, verdicts

from helpers import attacks, data, evaluation, models, training, units
from helpers.threat import ThreatModel

PEERS = {"Foolbox": "foolbox", "CleverHans": "cleverhans", "ART": "adversarial-robustness-toolbox"}  # distributions
TARGETS = {
    "rate, ours / bare loop": (">=", 0.95),
    "rate, ours / best peer": (">=", 1.0),
    "curve, best peer / ours": (">=", 3.0),
    "curve, accuracy above that peer's": ("<=", 0.0),
}


def arguments():
    options = parser(__doc__)
    options.set_defaults(repeats=9)  # the rates differ by a few per cent: fewer rounds do not show it
    options.add_argument("--steps", type=int, default=20, help="PGD steps of the rate")
    options.add_argument("--curve-steps", type=int, default=40, help="PGD steps at each eps of the curve")
    options.add_argument("--eps", type=float, default=0.1, help="eps of the rate")
    options.add_argument("--grid", type=float, nargs="+", default=[0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3])
    options.add_argument("--curve-repeats", type=int, default=2, help="counted rounds of the curve")
    return options.parse_args()


def bare_loop(network):
    """The least that PGD needs, compiled: what no library can be much faster than."""

    @models.own_graph  # without it the loop is by chance as fast as this or a quarter slower
    def gradient(x_adv, y):
        with tf.GradientTape() as tape:
            tape.watch(x_adv)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, network(x_adv))
        return tape.gradient(loss, x_adv)

    @tf.function(reduce_retracing=True)
    def loop(x, y, eps, step_size, steps):
        x_adv = tf.clip_by_value(x + tf.random.uniform(tf.shape(x), -eps, eps), 0.0, 1.0)
        for _ in tf.range(steps):
            x_adv = x_adv + step_size * tf.sign(gradient(x_adv, y))
            x_adv = tf.clip_by_value(tf.clip_by_value(x_adv, x - eps, x + eps), 0.0, 1.0)
        return x_adv

    return lambda x, y, eps, step_size, steps: loop(x, y, *map(tf.constant, (eps, step_size, steps)))


def peer_loops(network, shape, classes):
    """PGD of each library as function(x, y, eps, step_size, steps) -> images."""
    wrapped = foolbox.TensorFlowModel(network, bounds=(0, 1))
    classifier = TensorFlowV2Classifier(
        model=lambda x, training=False: network(x),
        nb_classes=classes,
        input_shape=shape,
        loss_object=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0, 1),
    )

    def with_foolbox(x, y, eps, step_size, steps):
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
        return attack.run(wrapped, tf.constant(x), tf.constant(y), epsilon=eps)

    def with_cleverhans(x, y, eps, step_size, steps):
        limits = {"clip_min": 0.0, "clip_max": 1.0, "rand_init": True}
        return projected_gradient_descent(network, tf.constant(x), eps, step_size, steps, np.inf, y=y, **limits)

    def with_art(x, y, eps, step_size, steps):
        settings = {"eps": eps, "eps_step": step_size, "max_iter": steps, "num_random_init": 1, "batch_size": len(x)}
        return art.attacks.evasion.ProjectedGradientDescent(classifier, **settings, verbose=False).generate(x, y)

    return {"Foolbox": with_foolbox, "CleverHans": with_cleverhans, "ART": with_art}


def contenders(model, shape, classes):
    """Every PGD under its name, called alike."""
    network = tf.function(models.inference(model), input_signature=[tf.TensorSpec((None, *shape), tf.float32)])

    def ours(x, y, eps, step_size, steps):
        threat = ThreatModel("linf", eps)
        return attacks.pgd(model, x, y, threat, steps=steps, step_size=step_size, batch_size=len(x)).images

    return {"ours": ours, "bare loop": bare_loop(network), **peer_loops(network, shape, classes)}


def measure_rate(model, x, y, attackers, eps, steps, repeats):
    """Gradients per second at a fixed number of steps, and the accuracy that is left."""
    calls = {name: partial(attack, x, y, eps, 2.5 * eps / steps, steps) for name, attack in attackers.items()}
    table, images = rounds(calls, repeats, "rate")
    table["gradients/s"] = len(x) * steps / table["seconds"]
    table["accuracy"] = {name: float(evaluation.correct(model, result, y).mean()) for name, result in images.items()}
    return table


def measure_curve(model, x, y, attackers, grid, steps, repeats):
    """Seconds for the whole curve, and its accuracies; every contender's curve is the worst case over smaller eps."""

    def plain(attack, grid):
        rows = [evaluation.correct(model, x, y)]
        for eps in grid:
            result = np.asarray(attack(x, y, eps, 2.5 * eps / steps, steps))
            rows.append(rows[-1] & evaluation.correct(model, result, y))
        return np.array(rows[1:])

    def ours(grid):
        # Each eps starts from the last one's result and once at random, with another loss: two short runs find more
        # than a long one. The accuracies are compared below.
        return evaluation.survivors(model, grid, x, y, steps=steps * 3 // 10, restarts=2, batch_size=len(x),
                                    losses=("cross-entropy", "margin"))

    curves = {name: partial(plain, attack) for name, attack in attackers.items()} | {"ours": ours}
    first, calls = ({name: partial(curve, part) for name, curve in curves.items()} for part in (grid[:1], grid))
    table, standing = rounds(calls, repeats, "curve", first)
    for column, eps in enumerate(grid):
        table[f"{eps:g}"] = {name: float(rows[column].mean()) for name, rows in standing.items()}
    return table


def ratios(rate, curve):
    """What `TARGETS` are about: speeds, and where ours is a less accurate attack than the best peer."""
    speed, seconds, accuracy = rate["gradients/s"], curve["seconds"], curve.drop(columns="seconds")
    best = seconds[list(PEERS)].idxmin()  # the peer whose seconds and accuracies the curve is compared with
    return {
        "rate, ours / bare loop": speed["ours"] / speed["bare loop"],
        "rate, ours / best peer": speed["ours"] / speed[list(PEERS)].max(),
        "curve, best peer / ours": seconds[best] / seconds["ours"],
        "curve, accuracy above that peer's": (accuracy.loc["ours"] - accuracy.loc[best]).max(),
    }


def main():
    options = arguments()
    dataset = data.load(options.data).take(n_test=options.images)
    shape, classes = dataset.x_train.shape[1:], len(dataset.class_names)
    model = models.deep_conv(shape, classes)
    training.fit(model, dataset.x_train, dataset.y_train, epochs=options.epochs, batch_size=128, label="training")
    x, y = dataset.x_test, dataset.y_test
    attackers = contenders(model, shape, classes)
    rate = measure_rate(model, x, y, attackers, options.eps, options.steps, options.repeats)
    curve = measure_curve(model, x, y, attackers, options.grid, options.curve_steps, options.curve_repeats)
    tables = {"rate": rate, "curve": curve, "targets": verdicts(ratios(rate, curve), TARGETS)}
    report("attacks", options, dataset, tables, peers=units.versions(*PEERS.values()))


if __name__ == "__main__":
    main()
