"""Detecting adversarial images: six features, a logistic regression over them, and the attacker who knows both."""

from dataclasses import dataclass
from functools import cached_property

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import closeness, uncertainty
from helpers.defence import Network, Outputs, Path
from helpers.losses import evasion, margin
from helpers.models import graph_of, inference, predict
from helpers.threat import noise

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
    """Images `x` with Gaussian noise of the length (L2) of each one's adversarial change, clipped to [0, 1]."""
    return noise(x, "l2", np.linalg.norm((x_adv - x).reshape(len(x), -1), axis=1), seed=seed)


@dataclass(frozen=True)
class Detector:
    """A logistic regression over features: log-odds = sum of weight * value + offset, positive for an attack."""

    weights: dict[str, float]
    offset: float

    @classmethod
    def fit(cls, positives, negatives, columns=FEATURES):
        """Fit to `columns` of two frames of features: of adversarial images, and of clean and noisy ones.

        Features are scaled to unit variance, so that the regression's penalty treats them alike. Raises ValueError
        for a column that is not finite.
        """
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
        scores = np.concatenate([self.score(positives), self.score(negatives)])
        return float(roc_auc_score(np.repeat([1, 0], [len(positives), len(negatives)]), scores))

    def threshold(self, clean, false_reject_rate=0.05):
        """Log-odds above which that share of `clean` images, a frame of validation images, would be rejected."""
        if not 0 < false_reject_rate < 1:
            raise ValueError(f"false_reject_rate is {false_reject_rate}; expected a number between 0 and 1")
        return float(np.quantile(self.score(clean), 1 - false_reject_rate))


@dataclass(frozen=True, eq=False)
class Guarded:
    """A network with a detector beside it: a `helpers.defence.Defence` that refuses what the detector flags.

    model : keras.Sequential with dropout. near : closeness.Closeness of its training activations. threshold : log-odds
    above which an image is flagged. draws, seed : of the Monte-Carlo dropout; the masks are drawn once.
    known, points : thinned networks and points of each class that an attacker differentiates; None: as many as there
    are. His masks are his own.
    """

    model: keras.Model
    detector: Detector
    near: closeness.Closeness
    threshold: float
    draws: int = 50
    seed: int = 0
    known: int | None = None
    points: int | None = None

    randomised = False

    def __call__(self, x):
        """Logits of images `x` (n, h, w, c), a tensor, and how far the detector's log-odds lie above the threshold."""
        return self._answer(x)

    @cached_property
    def _answer(self):
        with tf.init_scope():
            return _guarded(self.model, self.detector, self.near, self.threshold, self.draws, self.seed)

    def paths(self, seed=0):
        """The network alone; network and detector, with the attacker's own masks and a part of the points."""
        def build():
            near = self.near.thin(self.points) if self.points else self.near
            return _guarded(self.model, self.detector, near, self.threshold, self.known or self.draws, seed + 999)

        key = "guarded", seed, self.known, self.points
        return {"unaware": Path(Network(self.model)), "exact": Path(graph_of(self, key, build), (evasion, in_turn))}


def in_turn(outputs, y):
    """Margin until the image is wrong, then minus the refusal, (n,): above 0 where it is wrong and not refused."""
    wrong = margin(outputs.logits, y)
    return tf.where(wrong > 0, -outputs.refusal, wrong)


def _guarded(model, detector, near, threshold, draws, seed):
    """A TensorFlow function from images to `Outputs`: the same features as `features`, differentiable.

    Monte-Carlo dropout is the mean of `draws` thinned networks (expectation over fixed masks).
    """
    networks, hidden_of = uncertainty.thinned(model, draws, seed), inference(closeness.last_hidden(model))
    points, means = np.concatenate(near.points), near.means()
    owner = np.repeat(np.arange(len(near.points)), [len(members) for members in near.points])
    centre = points.mean(axis=0)

    def outputs(x):
        hidden = hidden_of(x)
        logits = model.layers[-1](hidden)
        predicted = tf.argmax(logits, axis=1)
        values = uncertainty.formulas(networks(x))
        values["KDE"] = closeness.log_density(hidden - centre, points - centre, near.bandwidth,
                                              predicted[:, None] == owner[None, :])
        values["KL"] = tf.gather(closeness.divergences(hidden, means), predicted, batch_dims=1)
        log_odds = sum(weight * values[name] for name, weight in detector.weights.items()) + detector.offset
        return Outputs(logits, log_odds - threshold)

    outputs.randomised = False  # the masks are drawn once
    return outputs
