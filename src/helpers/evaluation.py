"""Measuring a classifier and its attacker: accuracy, security curves, intervals and the sanity checks."""

import numpy as np
import pandas as pd
import scipy.stats
import tensorflow as tf

from helpers import attacks
from helpers.models import as_float64, check_logits, inference, predict
from helpers.threat import ThreatModel, check_images, check_labels, diameter


def logits(model, x, batch_size=250):
    """Logits (n, classes) float32 of images `x` (n, h, w, c) in test mode, in batches."""
    check_images(x)
    check_logits(model, x)
    return predict(model, x, batch_size)


def correct(model, x, y):
    """Which images are classified as `y`, (n,) bool."""
    z = logits(model, x)
    return z.argmax(axis=1) == check_labels(y, *z.shape)


def score(model, x, y):
    """{"loss": mean cross-entropy in nats, "accuracy": fraction} in test mode."""
    z = logits(model, x)
    y = check_labels(y, *z.shape)
    losses = attacks.cross_entropy(z, y).numpy()
    return {"loss": float(losses.mean()), "accuracy": float((z.argmax(axis=1) == y).mean())}


def security_curve(model, x, y, grid, *, norm="linf", seed=0, **options):
    """Which images survive PGD at each eps: the worst case over this eps and all smaller ones.

    Only images that still stand are attacked, starting from the result at the last eps; `options` go to
    `attacks.pgd` (steps, restarts, losses ...). `grid`: rising eps values in [0, 1] pixel units; 0 means no attack.
    Returns (len(grid), n) bool, True where the image is still classified correctly; its row means are the curve.
    """
    if not (len(grid) and np.isfinite(grid).all() and min(grid) >= 0 and (np.diff(grid) > 0).all()):
        raise ValueError(f"grid is {list(grid)}; expected rising eps values >= 0")
    standing, start, rows = correct(model, x, y), x.copy(), []
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
    if np.shape(a) != np.shape(b) or np.ndim(a) != 1:
        raise ValueError(f"a and b have shapes {np.shape(a)} and {np.shape(b)}; expected the same images, (n,) each")
    delta = np.asarray(a, float) - np.asarray(b, float)
    interval = scipy.stats.bootstrap((delta,), np.mean, n_resamples=2000, confidence_level=confidence, batch=100,
                                     method="percentile", rng=seed).confidence_interval  # fmt: skip
    return float(delta.mean()), float(interval.low), float(interval.high)


def gradient_error(model, x, y, h=1e-7, seed=0):
    """Largest error of the margin's input gradient along random directions, by central differences in float64.

    For every image one random direction v of unit length: |slope along v - gradient . v|, divided by what a
    gradient of that length has along a random direction, |gradient| / sqrt(dimension).
    """
    exact, labels, rng = inference(as_float64(model)), tf.constant(y, tf.int64), np.random.default_rng(seed)
    # Off the image by a little: on a blank background max-pooling has ties, where there is no derivative.
    images = tf.constant(x + rng.uniform(-0.01, 0.01, x.shape), tf.float64)
    v = rng.standard_normal(x.shape)
    v /= np.linalg.norm(v.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
    gradient = attacks.input_gradient(exact, attacks.margin, images, labels)[0].numpy().reshape(len(x), -1)
    ahead, behind = (attacks.margin(exact(images + s * v), labels) for s in (h, -h))
    slope = (ahead - behind).numpy() / (2 * h)
    typical = np.linalg.norm(gradient, axis=1) / np.sqrt(x[0].size)
    return float((np.abs(slope - (gradient * v.reshape(len(x), -1)).sum(axis=1)) / np.maximum(typical, 1e-6)).max())


def gradient_share(model, x, y, loss=attacks.margin):
    """Share of images whose input gradient of `loss` is not zero in float32; a low one means masking."""
    gradient, *_ = attacks.input_gradient(
        inference(model), lambda z, y: loss(tf.cast(z, tf.float32), y), tf.constant(x), tf.constant(y, tf.int64))
    return float(np.abs(gradient).max(axis=(1, 2, 3)).astype(bool).mean())


def sanity_checks(model, x, y, threat, *, surrogate=None, steps=40, queries=300, seed=0):
    """Run the checks that a sound attack passes; a table of (check, measured, limit, relation, passed).

    Rates are compared with a tolerance of two standard errors. `surrogate` is another network from which
    adversarial images are transferred. Callers assert `table["passed"].all()`.
    """
    def success(x_adv):
        return float(1 - correct(model, x_adv, y).mean())

    def run(against=model, eps=threat.eps, **options):
        options = {"steps": steps, "restarts": 2, "losses": ("cross-entropy", "margin"), "seed": seed} | options
        return attacks.pgd(against, x, y, ThreatModel(threat.norm, eps, threat.bounds), **options)

    strong = run()
    rate, clean = success(strong), 1 - correct(model, x, y).mean()
    tolerance = 2 * np.sqrt(max(rate * (1 - rate), 1 / len(x)) / len(x))
    noise, single = threat.noise(x, (seed, 10**6)), run(steps=1, restarts=1)  # not PGD's own start
    if threat.norm == "linf":
        single = attacks.fgsm(model, x, y, threat.eps, bounds=threat.bounds)
    largest = diameter(x.shape[1:], threat.norm, threat.bounds)
    far = run(eps=largest, steps=4 * steps, compact=True)  # the way is long, and may begin where all looks alike
    rows = [
        ("eps = 0 changes no pixel", float(np.abs(run(eps=0.0, steps=2) - x).max()), 0.0, "<="),
        ("largest distance", float(threat.distance(strong, x).max()), threat.eps + 1e-6, "<="),
        ("lowest pixel", float(strong.min()), threat.bounds[0], ">="),
        ("highest pixel", float(strong.max()), threat.bounds[1], "<="),
        ("success at eps against eps / 2", rate, success(run(eps=threat.eps / 2)) - tolerance, ">="),
        ("success at the largest eps", success(far), 0.99, ">="),
        ("PGD against a single step", rate, success(single) - tolerance, ">="),
        ("twice the steps: change of success", abs(success(run(steps=2 * steps)) - rate), max(0.01, tolerance), "<="),
        ("PGD against random noise", rate, success(noise) - tolerance, ">="),
        ("PGD against no attack", rate, clean, ">="),
        ("gradient error (float64)", gradient_error(model, x[:50], y[:50]), 1e-3, "<="),
        ("images with a gradient", gradient_share(model, x, y), 0.9, ">="),
    ]
    if threat.norm == "linf":
        free = success(attacks.square(model, x, y, threat.eps, queries=queries, seed=seed))
        rows.append(("PGD against a gradient-free attack", rate, free - tolerance, ">="))
    if surrogate is not None:
        rows.append(("white box against transfer", rate, success(run(surrogate)) - tolerance, ">="))
    table = pd.DataFrame(rows, columns=["check", "measured", "limit", "relation"])
    table["passed"] = np.where(table["relation"] == "<=", table.measured <= table.limit, table.measured >= table.limit)
    return table
