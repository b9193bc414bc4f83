"""Detecting adversarial images: six features, a logistic regression over them, and the attacker who knows both."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import attacks, closeness, uncertainty
from helpers.defence import Network, Outputs, Path, as_defence
from helpers.losses import evasion, margin, wrong_classes
from helpers.models import graph_of, inference, predict
from helpers.search import Found
from helpers.threat import along

FEATURES = (*uncertainty.METRICS, "KDE", "KL")


def features(model, x, near, *, draws=50, seed=0):
    """The six features of paper 04's Table 5 for images `x` (n, h, w, c), and "LID"; a row an image.

    KDE (its logarithm) and KL are those of the class that the network predicts in test mode, which is the column
    "predicted". `near` : closeness.Closeness of the network's training activations. `draws`, `seed` : of the dropout.
    """
    sampled = uncertainty.sample(model, x, draws=draws, seed=seed)  # which checks the images
    hidden = predict(closeness.last_hidden(model), x, 1000)
    predicted = model.layers[-1](hidden).numpy().argmax(axis=1)
    return pd.DataFrame(uncertainty.metrics(sampled) | {
        "KDE": near.log_density(hidden, predicted), "KL": near.kl(hidden, predicted), "LID": near.lid(hidden),
        "predicted": predicted})


def noisy(x, x_adv, seed=0):
    """Images `x` with Gaussian noise as long (L2) as each one's adversarial change *after* it is clipped to [0, 1].

    Where no noise in that direction is so long, it is as long as it can be.
    """
    wanted = np.linalg.norm((x_adv - x).reshape(len(x), -1), axis=1)
    return along(x, np.random.default_rng(seed).standard_normal(x.shape), wanted, "l2")


class Area(NamedTuple):
    """Area under a ROC curve, and what each image adds to its error, (n,), mean 0.

    Areas of detectors on the same images are compared by the difference of their `parts`.
    """

    value: float
    parts: np.ndarray

    @property
    def error(self):
        """Standard error over images."""
        return float(self.parts.std(ddof=1) / len(self.parts) ** 0.5)


def area(positives, negatives):
    """`Area` from scores: `positives` (n,), `negatives` (k, n), k negatives that come from the same n images.

    DeLong et al. (1988), with the images as clusters (Obuchowski 1997): an attacked image and its own clean and noisy
    versions are not independent.
    """
    negatives = np.atleast_2d(negatives)
    _check_some(positives=positives)
    n, flat = len(positives), negatives.ravel()
    rank = rankdata(np.concatenate([positives, flat]))
    above = (rank[:n] - rankdata(positives)) / len(flat)  # share of the negatives below each positive
    below = 1 - (rank[n:] - rankdata(flat)) / n  # share of the positives above each negative
    value = above.mean()
    return Area(float(value), above + below.reshape(negatives.shape).mean(axis=0) - 2 * value)


@dataclass(frozen=True)
class Detector:
    """A logistic regression over features: log-odds = sum of weight * value + offset, positive for an attack."""

    weights: dict[str, float]
    offset: float

    @classmethod
    def fit(cls, positives, negatives, columns=FEATURES):
        """Fit to `columns` of two frames of features: of adversarial images, and of clean and noisy ones.

        Features are scaled to unit variance, so that the regression's penalty treats them alike. Raises ValueError
        for a column that is not finite, and where one of the frames is empty.
        """
        _check_some(positives=positives, negatives=negatives)
        columns, x = list(columns), pd.concat([positives, negatives])
        if bad := [name for name in columns if not np.isfinite(x[name]).all()]:
            raise ValueError(f"features {bad} hold values that are not finite")
        scaler, regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
            x[columns].to_numpy("float64"), np.repeat([1, 0], [len(positives), len(negatives)]))
        weights = regression.coef_[0] / scaler.scale_
        return cls(dict(zip(columns, weights.tolist(), strict=True)),
                   float(regression.intercept_[0] - weights @ scaler.mean_))

    def score(self, frame):
        """Log-odds (n,) of the rows of a frame of features."""
        return frame[list(self.weights)].to_numpy("float64") @ np.array(list(self.weights.values())) + self.offset

    def auc(self, positives, negatives):
        """Area under the ROC curve on two frames, which should be of other images than `fit` saw."""
        _check_some(positives=positives, negatives=negatives)
        scores = np.concatenate([self.score(positives), self.score(negatives)])
        return float(roc_auc_score(np.repeat([1, 0], [len(positives), len(negatives)]), scores))

    def threshold(self, clean, false_reject_rate=0.05):
        """Log-odds above which that share of `clean` images, a frame of validation images, would be rejected."""
        if not 0 < false_reject_rate < 1:
            raise ValueError(f"false_reject_rate is {false_reject_rate}; expected a number between 0 and 1")
        _check_some(clean=clean)
        return float(np.quantile(self.score(clean), 1 - false_reject_rate))


def _check_some(**frames):
    for name, frame in frames.items():
        if not len(frame):
            raise ValueError(f"{name} is empty; expected the features of one image or more")


@dataclass(frozen=True, eq=False)
class Guarded:
    """A network with a detector beside it: a `helpers.defence.Defence` that refuses what the detector flags.

    model : keras.Sequential with dropout. near : closeness.Closeness of its training activations. threshold : log-odds
    above which an image is flagged. draws, seed : of the Monte-Carlo dropout, whose masks are drawn anew at every call.
    known : draws of the attacker's gradient; None: as many as are deployed. His masks are fresh ones as well.
    """

    model: keras.Model
    detector: Detector
    near: closeness.Closeness
    threshold: float
    draws: int = 50
    seed: int = 0
    known: int | None = None

    randomised = True

    def __call__(self, x):
        """Logits of images `x` (n, h, w, c), a tensor, and how far the detector's log-odds lie above the threshold."""
        return self._answer(x, tf.constant(self._rng.integers(2**31), tf.int64))

    @cached_property
    def _rng(self):
        return np.random.default_rng(self.seed)

    @cached_property
    def _answer(self):
        with tf.init_scope():
            return _guarded(self.model, self.detector, self.near, self.threshold, self.draws)

    def paths(self, seed=0):
        """The network alone; network and detector, whole, with masks of the attacker's own: EOT."""
        def build():
            attacker = replace(self, draws=self.known or self.draws, seed=seed + 999)
            if attacker.draws == self.draws:
                attacker.__dict__["_answer"] = self._answer  # one graph for both
            return attacker

        return {"unaware": Path(Network(self.model)),
                "EOT": Path(graph_of(self, ("EOT", seed), build), (evasion, in_turn))}


def in_turn(outputs, y):
    """Margin until the image is wrong, then minus the refusal, (n,): above 0 where it is wrong and not refused."""
    wrong = margin(outputs.logits, y)
    return tf.where(wrong > 0, -outputs.refusal, wrong)


@dataclass(frozen=True)
class Weighed:
    """A loss to descend towards a wanted class: refusal, times `weight`, less the class's margin up to `enough`."""

    weight: float
    enough: float

    def __call__(self, outputs, wanted):
        """Of `outputs` for classes `wanted` (n,), the loss (n,)."""
        return self.weight * outputs.refusal - tf.minimum(-margin(outputs.logits, wanted), self.enough)


def informed(defence, x, y, threat, *, weights=(Weighed(1.0, 10.0), Weighed(0.1, 10.0)), targets=2, steps=50,
             path="EOT", start=None, batch_size=100, seed=0):
    """Drive each image to high confidence in a wrong class, and the refusal down: the attacker of chapter 04.

    Towards the `targets` likeliest wrong classes of `x`, one after the other; for each of them the losses `weights` are
    descended in turn, the first from `start`, the others from where the one before has ended. Images that win on what
    is deployed, by the median of its draws, leave. Gives back `Found` by `evasion`.
    """
    order = wrong_classes(predict(as_defence(defence), x, batch_size).logits, y)
    found = Found(x.copy(), np.full(len(x), -np.inf, "float32"), np.zeros(len(x), int))
    for k in range(min(targets, order.shape[1])):
        at = (start if start is not None else x).copy()
        for loss in weights:
            left = found.left()
            if not left.size:
                return found
            one = attacks.pgd(defence, x[left], y[left], threat, target=order[left, k], start=at[left], losses=(loss,),
                              steps=steps, path=path, compact=True, batch_size=batch_size, seed=seed)
            found.offer(one.images, one.value, left)
            found.steps[left] += one.steps
            at[left] = one.images
    return found


def _guarded(model, detector, near, threshold, draws):
    """A TensorFlow function from images and a seed to `Outputs`: the same features as `features`, differentiable."""
    votes, hidden_of = uncertainty.fresh(model, draws), inference(closeness.last_hidden(model))
    points, means = np.concatenate(near.points), near.means()
    owner = np.repeat(np.arange(len(near.points)), [len(members) for members in near.points])

    @partial(tf.function, reduce_retracing=True)
    def outputs(x, seed):
        hidden = hidden_of(x)
        logits = model.layers[-1](hidden)
        predicted = tf.argmax(logits, axis=1)
        values = uncertainty.formulas(votes(x, seed))
        values["KDE"] = closeness.log_density(hidden, points, near.bandwidth,
                                              predicted[:, None] == owner[None, :])
        values["KL"] = tf.gather(closeness.divergences(hidden, means, near.pmf), predicted, batch_dims=1)
        log_odds = sum(weight * values[name] for name, weight in detector.weights.items()) + detector.offset
        return Outputs(logits, log_odds - threshold)

    return outputs
