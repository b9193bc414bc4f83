"""A reader's own defence against the book's attacks: brought from a file, looked at, and judged.

    opened / brought ─► judge (all attacks, is it sound?) ─► examine (and a curve) ─► helpers.report
"""

import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.special import softmax
from tqdm import tqdm

from helpers import data, evaluation, flags, models, soundness, standard
from helpers.defence import Path as Way
from helpers.defence import answers, as_defence, never
from helpers.search import DRAWS
from helpers.threat import ThreatModel

SAME = 1000  # test images that all defences of the board meet; a reader's own meets the first of them
CURVE = 100  # images of the curve over eps
NO_READOUT = "binarization test: a readout could be made"
NO_INDICATORS = "indicators of attack failure: they could be read"


class ArenaError(Exception):
    """A defence that cannot be evaluated; the message says which, why, and what was expected."""


# ── Bringing a defence ──


def opened(path, randomised=False):
    """What a file holds: the network of a .keras, or what `defence()` of a Python file gives.

    randomised : whether a network of a file, which cannot say so itself, may give one image two answers.
    Raises ArenaError for another file, a missing `defence`, or one that raises. A Python file is executed: it is the
    reader's own.
    """
    path = Path(path)
    if path.suffix == ".keras":
        try:
            network = keras.saving.load_model(path, compile=False, safe_mode=True)
            if randomised:
                network.randomised = True
            return network
        except Exception as error:  # Keras raises many kinds for a file that is none
            raise ArenaError(f"{path}: no network of Keras ({_said(error)})") from error
    if path.suffix != ".py":
        raise ArenaError(f"{path}: expected a Python file with a function `defence`, or a network saved as .keras")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "defence", None)):
            raise ArenaError(f"{path}: no function `defence`; expected one without arguments that gives a Keras "
                             "network, a function from images to logits, or a defence of three members")
        return module.defence()
    except ArenaError:
        raise
    except Exception as error:
        raise ArenaError(f"{path}{_line_in(error, path)}: {_said(error)}") from error
    finally:
        sys.path.pop(0)


def _said(error):
    """Kind and first lines of an error: a long trace of TensorFlow would hide the sentence."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _line_in(error, path):
    """", line n", the last one of the file that is on the way to the error."""
    trace, found = error.__traceback__, ""
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve():
            found = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def brought(model, x, name="defence"):
    """`model` as a `Defence` that is known to answer images like `x` (n, h, w, c) as one should.

    A function of images that says nothing of itself is asked whether it is random; where TensorFlow cannot follow it,
    it is one of `Arrays`.
    Raises ArenaError, in words, for what is no defence, raises, takes other images, gives NaN or probabilities, or
    answers differently when it is asked again without saying that it is `randomised`.
    """
    few = x[:8]
    try:
        if isinstance(model, keras.Model):
            models.check_size(model, few)
        if callable(model) and not isinstance(model, keras.Layer) and not hasattr(model, "paths"):
            model = _function(model, few)
        defence = as_defence(model)
        _ask(defence, few)
        answers(defence, few)
        return defence
    except ArenaError as error:
        raise ArenaError(f"{name}: {error}") from error
    except Exception as error:
        hint = "; of votes or probabilities, give the logarithm" if "probabilities" in str(error) else ""
        raise ArenaError(f"{name}: {_said(error)}{hint}") from error


def _ask(defence, x):
    """What `defence` answers to images, given as a tensor; ArenaError where it raises."""
    try:
        return defence(tf.constant(x))
    except Exception as error:
        raise ArenaError(f"it raises on images of shape {x.shape}, float32 in [0, 1], channels last: "
                         f"{_said(error)}") from error


def _function(function, x):
    """A function of images as one that says whether it is random, and of which a graph can be made."""
    try:
        first = _ask(function, x)
    except ArenaError:
        first = _ask(lambda images: function(images.numpy()), x)  # it may want arrays
    if hasattr(first, "logits"):
        raise ArenaError("it answers with logits and refusal and has no `paths(seed)`; expected all three members: "
                         "`randomised`, the call and `paths`")
    logits = np.asarray(first)
    models.check_logits(logits)
    if models.randomised(function) and hasattr(function, "randomised"):
        return function
    if any(not np.allclose(logits, np.asarray(_array(function, x)), rtol=1e-3, atol=1e-3) for _ in range(2)):
        raise ArenaError("it answers differently when it is asked again; expected the same each time, or an attribute "
                         "`randomised = True` that says so: then draws are averaged")
    return _steady(function, x, logits)


def _array(function, x):
    try:
        return function(tf.constant(x))
    except Exception:
        return function(x)


def _steady(function, x, logits):
    """`function`, declared not to be random; `Arrays` of it where a graph cannot be made."""
    def followed(images):
        return tf.convert_to_tensor(function(images), tf.float32)

    try:
        same = np.allclose(tf.function(followed)(tf.constant(x)), logits, rtol=1e-3, atol=1e-3)
    except Exception:  # NumPy within, most often
        same = False
    followed.randomised = False
    return followed if same else Arrays(function)


class Arrays:
    """A function of arrays as a `Defence` without a gradient, asked once about each batch.

    It says that it is random to be kept out of graphs: a graph of the function's own, within another one, may wait for
    a thread for ever.
    """

    randomised = True

    def __init__(self, function):
        self.function, self.known = function, {}

    def __call__(self, x):
        """Logits of `x` (n, h, w, c), and no refusal."""
        key = x.numpy().tobytes()
        if key not in self.known:
            while len(self.known) >= 4:
                del self.known[next(iter(self.known))]
            self.known[key] = tf.constant(np.asarray(self.function(x.numpy())), tf.float32)
        return never(self.known[key])

    def paths(self, seed=0):
        """Itself."""
        return {"exact": Way(self)}


# ── Judging it ──


def chosen(dataset, images):
    """The first `images` of the test images of the board: x (n, h, w, c), y (n,). ArenaError where there are fewer."""
    if not 1 <= images <= len(dataset.y_test):
        raise ArenaError(f"images: got {images}, expected 1 to {len(dataset.y_test)}, which {dataset.name} has")
    whole = dataset.take(None, max(images, min(SAME, len(dataset.y_test))))
    return whole.x_test[:images], whole.y_test[:images]


def judge(defence, x, y, threat, *, attacks=None, steps=40, queries=300, checked=100, examined=16, seed=0, label=None):
    """What `evaluation.evaluate` does, and flags of what a defence that nobody has looked at may get wrong.

    It may refuse most clean images, guess, answer an image alone otherwise than among others, or change by being
    asked; and it may be of a kind on which the tests of the evaluation itself cannot be made, which is a raised flag.

    attacks, steps, queries, examined, label : as `evaluate` takes them. checked : images of the sanity checks, whose
    cost grows with them where their message does not; the attacks meet all.
    """
    defence = as_defence(defence)
    before, clean = answers(defence, x), evaluation.outcomes(defence, x, y)
    found, table = standard.standard(defence, x, y, threat, attacks=attacks, seed=seed, label=label)
    worst = at_worst(defence, found, y)
    last, few = list(defence.paths(seed).values())[-1], slice(0, checked)
    checks = {
        "sanity": lambda: evaluation.sanity_checks(
            defence, x[few], y[few], threat, path=last, beaten=found.value[few] > 0, steps=steps, queries=queries,
            seed=seed).to_dict("records"),
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


def examine(model, dataset, threat, *, name="defence", images=200, seed=0, label=None):
    """Bring `model`, and judge it on the first `images` of the board's test images. Returns an `Entry`.

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
        report = judge(defence, x, y, threat, seed=seed, label=label)
        grid, curves = _curves(defence, x[:CURVE], y[:CURVE], threat, report, seed)
    except AssertionError:  # of an attack's own rules: not the reader's fault
        raise
    except Exception as error:
        hint = "; a root or a logarithm of 0 has none: add a little" if isinstance(error, FloatingPointError) else ""
        raise ArenaError(f"{name}: while it was attacked: {_said(error)}{hint}") from error
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
    for _ in range(2):
        started = tf.timestamp()
        answers(defence, x[:100])
    return float(tf.timestamp() - started) / len(x[:100])
