"""PGD of the helpers against a bare compiled loop, Foolbox, CleverHans and ART, side by side in one process.

Same network, images, batches, step sizes, threads, and oneDNN on for all. Every library is given the network as one
compiled function, the fastest form for each of them (Foolbox and ART are slower on the Keras object). A round runs
each contender once, every round in another order; the first round, which compiles, is not counted. Medians are shown.

    rate   a fixed number of steps on all images: gradients per second
    curve  accuracy at every eps of a grid, counting an image as beaten once a smaller eps has beaten it

Usage: python tests/benchmarks/bench.py [--help]. The peers: requirements.in beside this file.
"""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
import argparse
import json
import time
from functools import partial
from pathlib import Path

import art.attacks.evasion
import foolbox
import numpy as np
import pandas as pd
import tensorflow as tf
from art.estimators.classification import TensorFlowV2Classifier
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent
from tqdm import tqdm

from helpers import attacks, data, evaluation, files, models, records, training, units
from helpers.threat import ThreatModel

PEERS = {"Foolbox": "foolbox", "CleverHans": "cleverhans", "ART": "adversarial-robustness-toolbox"}  # distributions
TARGETS = {"rate, ours / bare loop": 0.95, "rate, ours / best peer": 1.0, "curve, best peer / ours": 3.0}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="data set of helpers.data (default: digits, no download)")
    parser.add_argument("--images", type=int, default=200, help="images attacked, in one batch")
    parser.add_argument("--steps", type=int, default=20, help="PGD steps of the rate")
    parser.add_argument("--curve-steps", type=int, default=40, help="PGD steps at each eps of the curve")
    parser.add_argument("--eps", type=float, default=0.1, help="eps of the rate")
    parser.add_argument("--grid", type=float, nargs="+", default=[0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training before the network is attacked")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds of the rate")
    parser.add_argument("--curve-repeats", type=int, default=3, help="counted rounds of the curve")
    parser.add_argument("--output", type=Path, default=Path("_build/bench.json"))
    return parser.parse_args()


def bare_loop(network):
    """The least that PGD needs, compiled: what no library can be much faster than."""

    @tf.function(reduce_retracing=True)
    def loop(x, y, eps, step_size, steps):
        x_adv = tf.clip_by_value(x + tf.random.uniform(tf.shape(x), -eps, eps), 0.0, 1.0)
        for _ in tf.range(steps):
            with tf.GradientTape() as tape:
                tape.watch(x_adv)
                loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, network(x_adv))
            x_adv = x_adv + step_size * tf.sign(tape.gradient(loss, x_adv))
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
        return attacks.pgd(model, x, y, threat, steps=steps, step_size=step_size, batch_size=len(x))

    return {"ours": ours, "bare loop": bare_loop(network), **peer_loops(network, shape, classes)}


def rounds(functions, repeats, label):
    """Median seconds and last result of each function, run in interleaved order after a round of warm-up."""
    seconds, results, names = {name: [] for name in functions}, {}, list(functions)
    for turn in tqdm(range(repeats + 1), desc=label):
        for name in np.roll(names, turn):
            start = time.perf_counter()
            results[name] = np.asarray(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return pd.DataFrame({"seconds": {name: float(np.median(times[1:])) for name, times in seconds.items()}}), results


def measure_rate(model, x, y, attackers, eps, steps, repeats):
    """Gradients per second at a fixed number of steps, and the accuracy that is left."""
    calls = {name: partial(attack, x, y, eps, 2.5 * eps / steps, steps) for name, attack in attackers.items()}
    table, images = rounds(calls, repeats, "rate")
    table["gradients/s"] = len(x) * steps / table["seconds"]
    table["accuracy"] = {name: float(evaluation.correct(model, result, y).mean()) for name, result in images.items()}
    return table


def measure_curve(model, x, y, attackers, grid, steps, repeats):
    """Seconds for the whole curve, and its accuracies; every contender's curve is the worst case over smaller eps."""

    def plain(attack):
        rows = [evaluation.correct(model, x, y)]
        for eps in grid:
            result = np.asarray(attack(x, y, eps, 2.5 * eps / steps, steps))
            rows.append(rows[-1] & evaluation.correct(model, result, y))
        return np.array(rows[1:])

    calls = {name: partial(plain, attack) for name, attack in attackers.items()}
    # Ours starts each eps from the last one's result and needs fewer steps for it; the accuracies are compared below.
    calls["ours"] = partial(evaluation.security_curve, model, x, y, grid, steps=steps * 3 // 5, batch_size=len(x))
    table, standing = rounds(calls, repeats, "curve")
    for column, eps in enumerate(grid):
        table[f"{eps:g}"] = {name: float(rows[column].mean()) for name, rows in standing.items()}
    return table


def verdicts(rate, curve):
    """The ratios of `TARGETS`, and whether ours is nowhere less accurate an attack than the best peer."""
    speed, seconds, accuracy = rate["gradients/s"], curve["seconds"], curve.drop(columns="seconds")
    ratios = {
        "rate, ours / bare loop": speed["ours"] / speed["bare loop"],
        "rate, ours / best peer": speed["ours"] / speed[list(PEERS)].max(),
        "curve, best peer / ours": seconds[list(PEERS)].min() / seconds["ours"],
    }
    table = pd.DataFrame({"measured": ratios, "target": TARGETS})
    table["met"] = table["measured"] >= table["target"]
    excess = float((accuracy.loc["ours"] - accuracy.loc[list(PEERS)].min()).max())
    table.loc["curve, accuracy above the best peer's"] = [excess, 0.0, excess <= 0]
    return table


def main():
    options = arguments()
    dataset = data.load(options.data).take(n_test=options.images)
    provenance = records.Record.start("00_benchmark", "paper", {dataset.name: dataset.provenance()}).provenance
    shape, classes = dataset.x_train.shape[1:], len(dataset.class_names)
    model = models.deep_conv(shape, classes)
    training.fit(model, dataset.x_train, dataset.y_train, epochs=options.epochs, batch_size=128, label="training")
    x, y = dataset.x_test, dataset.y_test
    attackers = contenders(model, shape, classes)
    rate = measure_rate(model, x, y, attackers, options.eps, options.steps, options.repeats)
    curve = measure_curve(model, x, y, attackers, options.grid, options.curve_steps, options.curve_repeats)
    summary = verdicts(rate, curve)
    for title, table in (("rate", rate), ("curve: accuracy by eps", curve), ("targets", summary)):
        print(f"\n{title}\n{table.to_string(float_format='{:.3f}'.format)}")
    report = {
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "provenance": provenance.model_dump() | {"peers": units.versions(*PEERS.values())},
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or provenance.cpu_count,
        "rate": rate.to_dict("index"),
        "curve": curve.to_dict("index"),
        "targets": summary.to_dict("index"),
    }
    with files.atomic(options.output) as path:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
