"""Measuring a classifier and its attacker: accuracy, security curves, intervals and the sanity checks."""

from functools import lru_cache

import numpy as np
import pandas as pd
import scipy.stats
import tensorflow as tf

from helpers import attacks
from helpers.models import as_float64, inference
from helpers.threat import ThreatModel


@lru_cache(maxsize=32)
def _compiled(model):
    return tf.function(inference(model), reduce_retracing=True)


def logits(model, x, batch_size=1000):
    """Logits (n, classes) float32 of images `x` (n, h, w, c) in test mode, in batches."""
    graph = _compiled(model)
    return np.concatenate([graph(tf.constant(x[i : i + batch_size])) for i in range(0, len(x), batch_size)])


def correct(model, x, y):
    """Which images are classified as `y`, (n,) bool."""
    return logits(model, x).argmax(axis=1) == y


def score(model, x, y):
    """{"loss": mean cross-entropy in nats, "accuracy": fraction} in test mode."""
    z = logits(model, x)
    losses = attacks.cross_entropy(z, np.asarray(y, "int64")).numpy()
    return {"loss": float(losses.mean()), "accuracy": float((z.argmax(axis=1) == y).mean())}


def security_curve(model, x, y, grid, *, norm="linf", seed=0, **options):
    """Which images survive PGD at each eps: the worst case over this eps and all smaller ones.

    Only images that still stand are attacked, starting from the result at the last eps; `options` go to
    `attacks.pgd` (steps, restarts, losses ...).

    Parameters
    ----------
    grid : rising eps values in [0, 1] pixel units; 0 means no attack.

    Returns
    -------
    (len(grid), n) bool, True where the image is still classified correctly; its row means are the curve.
    """
    if np.any(np.diff(grid) <= 0):
        raise ValueError(f"grid is {list(grid)}; expected rising eps values")
    standing, start = correct(model, x, y), x.copy()
    rows = []
    for eps in grid:
        left = np.flatnonzero(standing)
        if eps > 0 and left.size:
            threat = ThreatModel(norm, float(eps))
            warm = start[left] if any(e > 0 for e in grid[: len(rows)]) else None
            start[left] = attacks.pgd(model, x[left], y[left], threat, start=warm, compact=True, seed=seed, **options)
            standing[left] = correct(model, start[left], y[left])
        rows.append(standing.copy())
    return np.array(rows)


def difference_interval(a, b, confidence=0.95, seed=0):
    """Paired bootstrap over images: mean of a - b and its interval, for two defences on the same images.

    a, b : (n,) bool or float, e.g. which images each defence classifies correctly. Returns (mean, low, high).
    """
    delta = np.asarray(a, float) - np.asarray(b, float)
    result = scipy.stats.bootstrap(
        (delta,), np.mean, n_resamples=2000, confidence_level=confidence, method="percentile", rng=seed, batch=100
    )
    return float(delta.mean()), float(result.confidence_interval.low), float(result.confidence_interval.high)


def gradient_error(model, x, y, h=1e-5):
    """Largest relative error of the input gradient's length along itself, by central differences in float64."""
    exact, labels = as_float64(model), tf.constant(y, tf.int64)
    images = tf.constant(x, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(images)
        losses = attacks.margin(exact(images, training=False), labels)
    gradient = tape.gradient(losses, images)
    length = tf.sqrt(tf.reduce_sum(gradient**2, axis=(1, 2, 3), keepdims=True))
    step = h * gradient / tf.maximum(length, 1e-300)
    ahead, behind = (attacks.margin(exact(images + s, training=False), labels) for s in (step, -step))
    slope = (ahead - behind) / (2 * h)
    return float(tf.reduce_max(tf.abs(slope - length[:, 0, 0, 0]) / tf.maximum(length[:, 0, 0, 0], 1e-12)))


def sanity_checks(model, x, y, threat, *, surrogate=None, steps=40, queries=300, seed=0):
    """Run the checks that a sound attack passes; a table of (check, measured, limit, passed).

    Rates are compared with a tolerance of two standard errors. `surrogate` is another network from which
    adversarial images are transferred. Callers assert `table["passed"].all()`.
    """
    losses = ("cross-entropy", "margin")

    def success(x_adv):
        return float(1 - correct(model, x_adv, y).mean())

    def run(steps=steps, restarts=2, eps=threat.eps, against=model):
        limits = ThreatModel(threat.norm, eps, threat.bounds)
        return attacks.pgd(against, x, y, limits, steps=steps, restarts=restarts, losses=losses, seed=seed)

    strong, unbounded = run(), threat.bounds[1] - threat.bounds[0]
    rate, clean = success(strong), 1 - correct(model, x, y).mean()
    tolerance = 2 * np.sqrt(max(rate * (1 - rate), 1 / len(x)) / len(x))
    noise = threat.random_start(x, seed)
    if threat.norm == "linf":
        noise = np.clip(x + threat.eps * np.sign(noise - x), *threat.bounds).astype("float32")
    largest = unbounded if threat.norm == "linf" else unbounded * np.sqrt(x[0].size)
    curve = security_curve(model, x, y, [threat.eps / 2, threat.eps], norm=threat.norm, steps=steps, seed=seed)
    rows = [
        ("eps = 0 changes no pixel", float(np.abs(run(eps=0.0, steps=2) - x).max()), 0.0, "<="),
        ("largest distance", float(threat.distance(strong, x).max()), threat.eps + 1e-6, "<="),
        ("lowest pixel", float(strong.min()), threat.bounds[0], ">="),
        ("highest pixel", float(strong.max()), threat.bounds[1], "<="),
        ("success does not fall with eps", 1 - curve[1].mean(), 1 - curve[0].mean(), ">="),
        ("success at the largest eps", success(run(eps=float(largest))), 0.99, ">="),
        ("PGD against a single step", rate, success(run(steps=1, restarts=1)) - tolerance, ">="),
        ("twice the steps: change of success", abs(success(run(steps=2 * steps)) - rate), max(0.01, tolerance), "<="),
        ("PGD against random noise", rate, success(noise) - tolerance, ">="),
        ("PGD against no attack", rate, clean, ">="),
        ("gradient error (float64)", gradient_error(model, x[:50], y[:50]), 1e-3, "<="),
    ]
    if threat.norm == "linf":
        free = success(attacks.square(model, x, y, threat.eps, queries=queries, seed=seed))
        rows.append(("PGD against a gradient-free attack", rate, free - tolerance, ">="))
    if surrogate is not None:
        rows.append(("white box against transfer", rate, success(run(against=surrogate)) - tolerance, ">="))
    table = pd.DataFrame(rows, columns=["check", "measured", "limit", "relation"])
    table["passed"] = np.where(table["relation"] == "<=", table.measured <= table.limit, table.measured >= table.limit)
    return table
