"""A reader's own defence against the book's attacks.

    guest.opened ─► guest.brought ─► judge (all attacks, is it sound?) ─► examine (and a curve) ─► helpers.report
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.special import softmax
from tqdm import tqdm

from helpers import data, evaluation, flags, models, soundness, standard, training
from helpers.defence import answers, as_defence
from helpers.guest import ArenaError, brought, said
from helpers.search import DRAWS
from helpers.threat import ThreatModel

SAME = 1000  # test images that all defences of the board meet; a reader's own meets the first of them
CURVE = 100  # images of the curve over eps
RIVAL = 3000  # training images of the network from which images are transferred
NO_READOUT = "binarization test: a readout could be made"
NO_INDICATORS = "indicators of attack failure: they could be read"


def chosen(dataset, images):
    """The first `images` of the test images of the board: x (n, h, w, c), y (n,). ArenaError where there are fewer."""
    if not 1 <= images <= len(dataset.y_test):
        raise ArenaError(f"images: got {images}, expected 1 to {len(dataset.y_test)}, which {dataset.name} has")
    whole = dataset.take(None, max(images, min(SAME, len(dataset.y_test))))
    return whole.x_test[:images], whole.y_test[:images]


def judge(
    defence, x, y, threat, *, attacks=None, surrogate=None, steps=40, queries=300, checked=100, examined=16, seed=0,
    label=None,
):
    """What `evaluation.evaluate` does, and flags of what a defence that nobody has looked at may get wrong.

    It may refuse most clean images, guess, answer an image alone otherwise than among others, or change by being
    asked; and it may be of a kind on which the tests of the evaluation itself cannot be made, which is a raised flag.

    attacks, surrogate, steps, queries, examined, label : as `evaluate` takes them. checked : images of the sanity
    checks, whose cost grows with them where their message does not; the attacks meet all.
    """
    defence = as_defence(defence)
    before, clean = answers(defence, x), evaluation.outcomes(defence, x, y)
    options = {"attacks": attacks, "surrogate": surrogate}
    found, table = standard.standard(defence, x, y, threat, seed=seed, label=label, **options)
    worst = pressed(defence, x, y, threat, found, seed=seed, **options)
    random = models.randomised(defence)  # its wins are those of most draws, the others' of a lucky few
    last, few = list(defence.paths(seed).values())[-1], slice(0, checked)
    checks = {
        "sanity": lambda: evaluation.sanity_checks(
            defence, x[few], y[few], threat, path=last, beaten=None if random else found.value[few] > 0, steps=steps,
            queries=queries, seed=seed).to_dict("records"),
        "soundness": partial(_tested, defence, last, x[:examined], y[:examined], threat, steps, seed),
        "answers": partial(_own, defence, x, y, before, clean)}
    rows = []
    for check in tqdm(checks.values(), desc=label and "checks", disable=label is None, unit="set"):
        rows += check()
    return evaluation.Report(clean, worst, found, table, pd.DataFrame(rows))


def settled(defence, x, y):
    """What becomes of each image, (n,) int as `evaluation.outcomes`: of a random defence by most of its draws."""
    draws = np.array([evaluation.outcomes(defence, x, y) for _ in range(DRAWS if models.randomised(defence) else 1)])
    correct, rejected, evaded = (np.mean(draws == i, axis=0) for i in range(3))
    return np.where(evaded >= 0.5, 2, np.where(rejected >= correct, 1, 0))


def pressed(defence, x, y, threat, found, *, attacks=None, surrogate=None, seed=0, turns=3):
    """`at_worst` of what was `found`, attacked on where a lucky draw of a random defence had ended the attack.

    What wins once leaves a cascade. Where most fresh draws then say otherwise, the image is attacked again, `turns`
    times at most.
    """
    for turn in range(1, turns + 1 if models.randomised(defence) else 1):
        claimed = found.value > 0
        outcome = at_worst(defence, found, y)
        rows = np.flatnonzero(claimed & (outcome != 2))
        if not rows.size:
            return outcome
        part, _ = standard.standard(defence, x[rows], y[rows], threat, attacks=attacks, surrogate=surrogate,
                                    seed=seed + turn)
        found.offer(part.images, part.value, rows)
    return at_worst(defence, found, y)


def at_worst(defence, found, y):
    """Outcomes (n,) at the images that were `found`.

    An attack keeps the luckiest of many draws of a random defence, so that this is asked afresh, and what it then says
    goes into `found.value` as well.
    """
    outcome = settled(defence, found.images, y)
    if models.randomised(defence):
        found.value[:] = np.where(outcome == 2, np.maximum(found.value, 1e-6), np.minimum(found.value, 0.0))
    return np.where(found.value > 0, 2, np.where(outcome == 1, 1, 0))


def _tested(defence, last, x, y, threat, steps, seed):
    """Rows of the binarization test and the indicators of attack failure; a raised one where they cannot be had."""
    if not len(x) or models.randomised(defence) or models.randomised(last.outputs):  # both are of one answer an image
        return []
    attack, rows = partial(standard.apgd, steps=steps), []
    for name, test in ((NO_READOUT, partial(soundness.binarization, defence, attack, x)),
                       (NO_INDICATORS, partial(soundness.indicators, defence, attack, x, y))):
        try:
            rows += test(threat, path=last, seed=seed)
        except (ValueError, FloatingPointError):
            rows.append(flags.flag(name, 0.0, 1.0, ">=", len(x)))
    return rows


def _own(defence, x, y, before, clean):
    """Rows: is it of use, are the answers to an image its own, are they what they were before it was attacked?"""
    rows = [flags.share("clean images refused", clean == 1, 0.5, "<="),
            flags.share("clean images right", clean == 0, 1.5 / before.logits.shape[1])]
    if models.randomised(defence):
        return [*rows, flags.difference("answers after the evaluation: images right before less after", clean == 0,
                                        evaluation.correct(defence, x, y), 0.05, "<=")]
    few = x[:16]
    alone = [np.concatenate(part) for part in zip(*(answers(defence, image[None]) for image in few), strict=True)]
    return [*rows, flags.share("answers to an image alone as among others", _alike(before, alone, len(few)), 1.0),
            flags.share("answers after the evaluation as before it", _alike(before, answers(defence, x), len(x)), 1.0)]


def _alike(one, other, n):
    """Of which of the first `n` images logits and refusal agree but for rounding, (n,) bool."""
    a, b = (np.column_stack([part[:n].reshape(n, -1) for part in outputs]).astype(float) for outputs in (one, other))
    scale = 1e-3 * max(1.0, np.abs(a[np.isfinite(a)]).max())
    return np.isclose(a, b, rtol=1e-3, atol=scale).all(axis=1)


@dataclass(frozen=True)
class Entry:
    """A defence that was examined: its report, and what is shown of it.

    grid, curves : eps values, and name -> which images survive PGD there, (eps, n).
    x, y : the images that it met. sure : probabilities (n, classes) before the attack, and at the worst.
    seconds : what an answer to an image takes.
    """

    name: str
    dataset: data.Dataset
    threat: ThreatModel
    report: evaluation.Report
    grid: list
    curves: dict
    x: np.ndarray
    y: np.ndarray
    sure: tuple
    seconds: float

    def summary(self):
        """Everything as plain values, for JSON."""
        found = self.report
        interval = flags.share("left", found.outcomes != 2, 0.0)
        return {
            "defence": self.name, "data": self.dataset.name, "data_sha256": self.dataset.sha256,
            "norm": self.threat.norm, "eps": self.threat.eps, "images": len(found.clean), "sound": found.sound,
            "left": found.left, "left_low": interval["low"], "left_high": interval["high"],
            "seconds_per_image": self.seconds,
            "clean": evaluation.rates(found.clean), "attacked": evaluation.rates(found.outcomes),
            "attacks": found.attacks.to_dict("records"), "flags": found.flags.to_dict("records"),
            "curves": {"eps": list(self.grid)} | {name: rows.mean(axis=1).tolist()
                                                  for name, rows in self.curves.items()},
        }


def rival(dataset, seed=0):
    """A small network for the task of `dataset`, trained in seconds, from which images are transferred to a guest.

    None where there are no images to train it on.
    """
    if not len(dataset.y_train):
        return None
    small = dataset.take(min(RIVAL, len(dataset.y_train)), 1)
    network = models.two_conv(small.x_train.shape[1:], len(small.class_names), batch_norm=False, seed=seed)
    training.fit(network, small.x_train, small.y_train, epochs=4, batch_size=50, seed=seed)
    return network


def examine(model, dataset, threat, *, name="defence", images=200, surrogate=None, seed=0, label=None):
    """Bring `model`, and judge it on the first `images` of the board's test images. Returns an `Entry`.

    surrogate : a network for the same task, from which images are transferred; None: no transfer is tried.
    label : text of the progress bar; None shows none.
    Raises ArenaError where the defence answers to no images of this data as one should, before the attacks or under
    them.
    """
    x, y = chosen(dataset, images)
    defence = brought(model, x, name)
    if (classes := answers(defence, x[:8]).logits.shape[1]) != len(dataset.class_names):
        raise ArenaError(f"{name}: answers with {classes} classes; expected {len(dataset.class_names)}, those of "
                         f"{dataset.name}")
    try:
        report = judge(defence, x, y, threat, surrogate=surrogate, seed=seed, label=label)
        grid, curves = _curves(defence, x[:CURVE], y[:CURVE], threat, report, seed)
    except AssertionError:  # of an attack's own rules: not the reader's fault
        raise
    except Exception as error:
        hint = "; a root or a logarithm of 0 has none: add a little" if isinstance(error, FloatingPointError) else ""
        raise ArenaError(f"{name}: while it was attacked: {said(error)}{hint}") from error
    sure = tuple(softmax(answers(defence, images).logits, axis=1) for images in (x, report.found.images))
    return Entry(name, dataset, threat, report, grid, curves, x, y, sure, seconds_per_image(defence, x))


def _curves(defence, x, y, threat, report, seed):
    """eps values, and which images survive PGD there on the first and on the last path, (eps, n)."""
    grid, paths = [0.0, *(factor * threat.eps for factor in (0.25, 0.5, 0.75, 1.0))], defence.paths(seed)
    ends = dict(zip(("unaware", "informed"), (list(paths.values())[i] for i in (0, -1)), strict=True))
    if len(paths) == 1:
        del ends["unaware"]
    curves = {name: evaluation.survivors(defence, grid, x, y, norm=threat.norm, path=path, seed=seed, steps=20,
                                         restarts=2, losses=("margin", "cross-entropy")) for name, path in ends.items()}
    curves["informed"][-1] &= report.outcomes[: len(x)] != 2  # at eps the whole set has been tried
    return grid, curves


def seconds_per_image(defence, x):
    """How long an answer takes in a batch of up to 100 images, the second time, when graphs are made."""
    for images in (x[:100], 1 - x[:100]):  # others, since `guest.Arrays` remembers its answers
        started = tf.timestamp()
        models.predict(defence, images, len(images))
    return float(tf.timestamp() - started) / len(images)
