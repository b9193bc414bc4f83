"""Measuring a classifier and its attacker: accuracy, security curves, intervals and the sanity checks."""

import numpy as np
import pandas as pd
import scipy.stats
import tensorflow as tf

from helpers import attacks, flags
from helpers.checks import check_images, check_labels
from helpers.models import as_float64, check_logits, inference, predict
from helpers.threat import ThreatModel, diameter

GRADIENT_ERROR = 1e-3  # relative; differences in float64 are right to about 1e-7


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


def gradient_errors(model, x, y, h=1e-7, seed=0):
    """Errors of the margin's input gradient along random directions, by differences in float64, and who is on a kink.

    For every image one random direction v of unit length: |slope along v - gradient . v|, divided by what a gradient of
    that length has along a random direction, |gradient| / sqrt(dimension). A ReLU or a maximum that changes within `h`
    has another slope ahead than behind: such an image is on a kink, where no derivative is right.
    Returns (errors (n,) float64, kinked (n,) bool).
    """
    exact, labels, rng = inference(as_float64(model)), tf.constant(y, tf.int64), np.random.default_rng(seed)
    # Off the image by a little: on a blank background max-pooling has ties, where there is no derivative.
    images = tf.constant(x + rng.uniform(-0.01, 0.01, x.shape), tf.float64)
    v = rng.standard_normal(x.shape)
    v /= np.linalg.norm(v.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
    gradient, here, _ = attacks.input_gradient(exact, attacks.margin, images, labels)
    gradient = gradient.numpy().reshape(len(x), -1)
    ahead, behind = (s * (attacks.margin(exact(images + s * h * v), labels) - here).numpy() / h for s in (1, -1))
    typical = np.maximum(np.linalg.norm(gradient, axis=1) / np.sqrt(x[0].size), 1e-6)
    errors = np.abs((ahead + behind) / 2 - (gradient * v.reshape(len(x), -1)).sum(axis=1)) / typical
    steepest = np.maximum(typical, np.maximum(np.abs(ahead), np.abs(behind)))
    return errors, np.abs(ahead - behind) > GRADIENT_ERROR * steepest


def has_gradient(model, x, y, loss=attacks.margin):
    """Which images have an input gradient of `loss` that is not zero in float32, (n,) bool; few: it is masked."""
    gradient, *_ = attacks.input_gradient(
        inference(model), lambda z, y: loss(tf.cast(z, tf.float32), y), tf.constant(x), tf.constant(y, tf.int64))
    return np.abs(gradient).max(axis=(1, 2, 3)).astype(bool)


def seen(x, fitted):
    """Which images of `x` (n, h, w, c) are, bit for bit, among the images `fitted`, (n,) bool."""
    known = {image.tobytes() for image in fitted}
    return np.array([image.tobytes() in known for image in x])


def gradient_flags(model, x, y):
    """Rows of `helpers.flags`: is the gradient there, and is it right? `x` (n, h, w, c), labels `y` (n,)."""
    errors, kinked = gradient_errors(model, x[:100], y[:100])
    rows = [flags.share(f"images with a gradient of the {name}", has_gradient(model, x, y, loss), 0.9)
            for name, loss in (("margin", attacks.margin), ("cross-entropy", attacks.cross_entropy))]
    rows.append(flags.share("images on a kink", kinked, 0.1, "<="))
    if not kinked.all():
        wrong = errors[~kinked] > GRADIENT_ERROR
        rows.append(flags.share("images off a kink whose gradient is wrong (float64)", wrong, 0.01, "<="))
    return rows


def sanity_checks(model, x, y, threat, *, surrogate=None, steps=40, queries=300, seed=0):
    """Flags that a sound attack on a sound network passes; a table with the columns of `helpers.flags.flag`.

    Rates are compared image by image. `surrogate` is another network from which adversarial images are transferred.
    Raises AssertionError where the attack breaks its own rules: it leaves the ball, or moves at eps = 0.
    """
    def success(x_adv):
        return ~correct(model, x_adv, y)

    def run(against=model, eps=threat.eps, **options):
        options = {"steps": steps, "restarts": 2, "losses": ("cross-entropy", "margin"), "seed": seed} | options
        return attacks.pgd(against, x, y, ThreatModel(threat.norm, eps, threat.bounds), **options)

    strong = run()
    assert threat.contains(strong, x).all(), "the attack leaves the ball or the range of pixels"
    assert np.array_equal(run(eps=0.0, steps=2), x), "the attack changes pixels at eps = 0"
    beaten, noise, single = success(strong), threat.noise(x, (seed, 10**6)), run(steps=1, restarts=1)
    if threat.norm == "linf":
        single = attacks.fgsm(model, x, y, threat.eps, bounds=threat.bounds)
    largest = diameter(x.shape[1:], threat.norm, threat.bounds)
    far = run(eps=largest, steps=4 * steps, compact=True)  # the way is long, and may begin where all looks alike
    again = np.isclose(*(logits(model, x) for _ in range(2)), rtol=1e-3, atol=1e-3).all(axis=1)
    rows = [
        flags.share("images with the same answer twice", again, 1.0),
        flags.difference("success at eps less at eps / 2", beaten, success(run(eps=threat.eps / 2))),
        flags.share("success at the largest eps", success(far), 0.99),
        flags.difference("PGD less a single step", beaten, success(single)),
        flags.difference("twice the steps: gain of success", success(run(steps=2 * steps)), beaten, 0.01, "<="),
        flags.difference("PGD less random noise", beaten, success(noise)),
        flags.difference("PGD less no attack", beaten, success(x)),
        *gradient_flags(model, x, y),
    ]
    if threat.norm == "linf":
        free = success(attacks.square(model, x, y, threat, queries=queries, seed=seed).images)
        rows.append(flags.difference("PGD less a gradient-free attack", beaten, free))
    if surrogate is not None:
        rows.append(flags.difference("white box less transfer", beaten, success(run(surrogate))))
    return pd.DataFrame(rows)
