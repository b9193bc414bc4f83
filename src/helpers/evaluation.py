"""Measuring a defence and its attacker: outcomes, security curves, intervals and the sanity checks.

`defence` is a `helpers.defence.Defence`, a Keras network or a function from images to logits; images `x` are float32
(n, h, w, c) in [0, 1], `y` their true labels (n,).
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import scipy.stats
import tensorflow as tf

from helpers import attacks, flags, soundness, standard
from helpers.checks import check_grid, check_labels
from helpers.defence import Path, answers, as_defence, way
from helpers.losses import cross_entropy, evasion, margin
from helpers.models import as_float64, randomised
from helpers.search import DRAWS, Found, input_gradient, single
from helpers.threat import ThreatModel, diameter

GRADIENT_ERROR = 1e-3  # relative; differences in float64 are right to about 1e-7
OUTCOMES = ("correct", "rejected", "evaded")
PGD = partial(attacks.pgd, restarts=2, losses=("cross-entropy", "margin"))


def logits(defence, x, batch_size=250):
    """Logits (n, classes) of images in test mode, in batches."""
    return answers(defence, x, batch_size).logits


def outcomes(defence, x, y):
    """What becomes of each image, (n,) int: an index into `OUTCOMES`. A random defence is asked once."""
    found = answers(defence, x)
    y = check_labels(y, *found.logits.shape)
    return np.where(found.refusal > 0, 1, np.where(found.logits.argmax(axis=1) == y, 0, 2))


def rates(results):
    """Shares of `outcomes` by name; they sum to 1."""
    return {name: float(np.mean(np.asarray(results) == i)) for i, name in enumerate(OUTCOMES)}


def correct(defence, x, y):
    """Which images are classified as `y` and not refused, (n,) bool."""
    return outcomes(defence, x, y) == 0


def score(defence, x, y):
    """{"loss": mean cross-entropy in nats, "accuracy": fraction} in test mode."""
    z = logits(defence, x)
    y = check_labels(y, *z.shape)
    return {"loss": float(cross_entropy(z, y).numpy().mean()), "accuracy": float((z.argmax(axis=1) == y).mean())}


def survivors(defence, grid, x, y, *, norm="linf", path=None, attack=attacks.pgd, seed=0, **options):
    """Which images survive an attack at each eps: the worst case over this eps and all smaller ones.

    Only images that still stand are attacked, starting from the result at the last eps; `options` go to the attack
    (steps, restarts, losses ...). A refused image survives. What the attack found on a random defence, the luckiest of
    its draws, is asked afresh. `grid`: rising eps values in [0, 1] pixel units; 0 means no attack. Returns
    (len(grid), n) bool; its row means are the security curve.
    """
    check_grid(grid)
    defence = as_defence(defence)
    path, start, rows = way(defence, path, seed), x.copy(), []
    standing = _stand(defence, x, y)
    for eps in grid:
        left = np.flatnonzero(standing)
        if eps > 0 and left.size:
            warm = start[left] if any(e > 0 for e in grid[: len(rows)]) else None
            found = attack(defence, x[left], y[left], ThreatModel(norm, float(eps)), path=path, start=warm,
                           compact=True, seed=seed, **options)
            start[left], standing[left] = found.images, found.value <= 0
            if randomised(defence):
                standing[left] |= _stand(defence, found.images, y[left])
        rows.append(standing.copy())
    return np.array(rows)


def _stand(defence, x, y):
    """Which images do not evade, of a random defence on most of its draws, (n,) bool."""
    draws = [outcomes(defence, x, y) != 2 for _ in range(DRAWS if randomised(defence) else 1)]
    return np.mean(draws, axis=0) > 0.5


def difference_interval(a, b, confidence=0.95, seed=0):
    """Paired bootstrap over images: mean of a - b and its interval, for two defences on the same images.

    a, b : (n,) bool or float, e.g. which images each defence classifies correctly. Returns (mean, low, high).
    """
    if np.shape(a) != np.shape(b) or np.ndim(a) != 1:
        raise ValueError(f"a and b have shapes {np.shape(a)} and {np.shape(b)}; expected the same images, (n,) each")
    if len(a) < 2:
        raise ValueError(f"a and b are of {len(a)} images; expected two or more")
    delta = np.asarray(a, float) - np.asarray(b, float)
    interval = scipy.stats.bootstrap((delta,), np.mean, n_resamples=2000, confidence_level=confidence, batch=100,
                                     method="percentile", rng=seed).confidence_interval
    return float(delta.mean()), float(interval.low), float(interval.high)


def gradient_errors(outputs, x, y, loss=None, h=1e-7, seed=0):
    """Errors of the input gradient along random directions, by differences in float64, and who is on a kink.

    outputs : network, defence or what a path has in its place, with a copy in float64. loss : function (Outputs, y) ->
    (n,), default `losses.evasion`.
    For every image one random direction v of unit length: |slope along v - gradient . v|, divided by what a gradient of
    that length has along a random direction, |gradient| / sqrt(dimension). A ReLU or a maximum that changes within `h`
    has another slope ahead than behind: such an image is on a kink, where no derivative is right.
    Returns (errors (n,) float64, kinked (n,) bool).
    """
    exact, labels, rng = as_defence(as_float64(outputs)), tf.constant(y, tf.int64), np.random.default_rng(seed)
    loss = loss or evasion
    # Off the image by a little: on a blank background max-pooling has ties, where there is no derivative.
    images = tf.constant(x + rng.uniform(-0.01, 0.01, x.shape), tf.float64)
    v = rng.standard_normal(x.shape)
    v /= np.linalg.norm(v.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
    gradient, here, _ = input_gradient(exact, loss, images, labels)
    gradient = gradient.numpy().reshape(len(x), -1)
    ahead, behind = (s * (loss(exact(images + s * h * v), labels) - here).numpy() / h for s in (1, -1))
    typical = np.maximum(np.linalg.norm(gradient, axis=1) / np.sqrt(x[0].size), 1e-6)
    errors = np.abs((ahead + behind) / 2 - (gradient * v.reshape(len(x), -1)).sum(axis=1)) / typical
    steepest = np.maximum(typical, np.maximum(np.abs(ahead), np.abs(behind)))
    return errors, np.abs(ahead - behind) > GRADIENT_ERROR * steepest


def has_gradient(outputs, x, y, loss=margin):
    """Which images have an input gradient of `loss`, of logits, that is not zero in float32, (n,) bool; few: masked."""
    outputs = as_defence(outputs) if not isinstance(outputs, Path) else outputs.outputs
    gradient, *_ = input_gradient(lambda x: single(outputs(x)), lambda z, y: loss(z.logits, y), tf.constant(x),
                                  tf.constant(y, tf.int64))
    return np.abs(gradient).max(axis=(1, 2, 3)).astype(bool)


def seen(x, fitted):
    """Which images of `x` (n, h, w, c) are, bit for bit, among the images `fitted`, (n,) bool."""
    known = {image.tobytes() for image in fitted}
    return np.array([image.tobytes() in known for image in x])


def gradient_flags(defence, x, y, path=None):
    """Rows of `helpers.flags`: is the gradient of the path there, and where it has a copy in float64, is it right?"""
    path = way(as_defence(defence), path)
    rows = [flags.share(f"images with a gradient of the {name}", has_gradient(path, x, y, loss), 0.9)
            for name, loss in (("margin", margin), ("cross-entropy", cross_entropy))]
    try:
        errors, kinked = gradient_errors(path.outputs, x[:100], y[:100], *path.losses[:1])
    except TypeError:  # no copy in float64; differences in float32 tell a bug from rounding too seldom
        return rows
    rows.append(flags.share("images on a kink", kinked, 0.1, "<="))
    if not kinked.all():
        wrong = errors[~kinked] > GRADIENT_ERROR
        rows.append(flags.share("images off a kink whose gradient is wrong (float64)", wrong, 0.01, "<="))
    return rows


def sanity_checks(defence, x, y, threat, *, attack=PGD, path=None, surrogate=None, beaten=None, steps=40, queries=300,
                  seed=0):
    """Flags that a sound attack on a sound defence passes; a table with the columns of `helpers.flags.flag`.

    Rates are compared image by image. `attack` is called as `attacks.pgd` is, with `steps`; `surrogate` is another
    network, from which adversarial images are transferred; `beaten` says which images a whole set of attacks has
    beaten, (n,) bool.
    Raises AssertionError where the attack breaks its own rules: it leaves the ball, or moves at eps = 0.
    """
    defence = as_defence(defence)
    path = way(defence, path, seed)

    def run(eps=threat.eps, **options):
        options = {"path": path, "steps": steps, "seed": seed} | options
        found = attack(defence, x, y, replace(threat, eps=eps), **options)
        return found.images, found.value > 0

    def evaded(images):
        return outcomes(defence, images, y) == 2

    images, strong = run()
    assert threat.contains(images, x).all(), "the attack leaves the ball or the range of pixels"
    assert np.array_equal(run(eps=0.0, steps=2)[0], x), "the attack changes pixels at eps = 0"
    far = diameter(x.shape[1:], threat.norm, threat.bounds)
    half = run(eps=threat.eps / 2)[1]
    least = standard.fab(defence, x, y, threat, path=path, steps=steps, targets=3, smallest=True, seed=seed)
    length = np.where(least.value > 0, threat.distance(least.images, x), np.inf)
    rows = [
        flags.difference("success at eps less at eps / 2", strong, half),
        flags.share("success at the largest eps", run(eps=far, steps=4 * steps)[1], 0.99),  # the way there is long
        flags.difference("PGD less a single step", strong, attacks.fgsm(defence, x, y, threat, path=path).value > 0),
        flags.difference("twice the steps: gain of success", run(steps=2 * steps)[1], strong, 0.01, "<="),
        flags.difference("PGD less random noise", strong, evaded(threat.noise(x, (seed, 10**6)))),
        flags.difference("PGD less no attack", strong, evaded(x)),
        flags.difference("PGD less the smallest change", strong, length <= threat.eps),
        flags.difference("PGD at eps / 2 less the smallest change", half, length <= threat.eps / 2),
        flags.difference("PGD less a gradient-free attack", strong,
                         standard.square(defence, x, y, threat, queries=queries, seed=seed).value > 0),
        *gradient_flags(defence, x, y, path)]
    if not randomised(defence):
        again = [answers(defence, x).logits for _ in range(2)]
        same = np.isclose(*again, rtol=1e-3, atol=1e-3).all(axis=1)
        rows.insert(0, flags.share("images with the same answer twice", same, 1.0))
    if beaten is not None:
        rows.append(flags.difference("the whole set less PGD", beaten, strong))
    if surrogate is not None:
        moved = attacks.pgd(defence, x, y, threat, path=surrogate, steps=steps, losses=("margin",), seed=seed)
        rows.append(flags.difference("white box less transfer", strong, moved.value > 0))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Report:
    """What `evaluate` found.

    clean, outcomes : what becomes of each image, (n,) indices into `OUTCOMES`: as it is, and at its worst.
    found : the worst image of each. attacks : which attack beat how many on which path. flags : is it sound?
    """

    clean: np.ndarray
    outcomes: np.ndarray
    found: Found
    attacks: pd.DataFrame
    flags: pd.DataFrame

    @property
    def left(self):
        """Share of images that are right or refused at their worst."""
        return float(np.mean(self.outcomes != 2))

    @property
    def sound(self):
        """Whether no flag is raised."""
        return bool(self.flags["passed"].all())


def evaluate(defence, x, y, threat, *, attacks=None, paths=None, surrogate=None, steps=40, queries=300, examined=16,
             seed=0, label=None):
    """Attack with the standard set on every path, and ask whether the attack could have found something.

    attacks, paths, surrogate : as `standard.standard` takes them. steps, queries : of the sanity checks. examined :
    images on which the binarization test and the indicators of attack failure are run, one by one; 0 leaves them out.
    label : text of the progress bar; None shows none.
    """
    defence = as_defence(defence)
    options = {"surrogate": surrogate, "seed": seed}
    found, table = standard.standard(defence, x, y, threat, attacks=attacks, paths=paths, label=label, **options)
    won = np.where(found.value > 0, 2, np.where(outcomes(defence, found.images, y) == 1, 1, 0))
    named = defence.paths(seed)
    last = named[list(named)[-1] if paths is None else paths[-1]]  # the strongest path comes last
    rows = [sanity_checks(defence, x, y, threat, path=last, beaten=found.value > 0, steps=steps, queries=queries,
                          **options)]
    if examined and not randomised(last.outputs):
        attack, few = partial(standard.apgd, steps=steps), x[:examined]
        rows += [pd.DataFrame(soundness.binarization(defence, attack, few, threat, path=last, seed=seed)),
                 pd.DataFrame(soundness.indicators(defence, attack, few, y[:examined], threat, path=last, seed=seed))]
    return Report(outcomes(defence, x, y), won, found, table, pd.concat(rows, ignore_index=True))
