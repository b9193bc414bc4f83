"""Detecting adversarial images: six features, a logistic regression over them, and the attacker who knows both."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import closeness, uncertainty
from helpers.models import inference, predict
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
        "KDE": near.kde(hidden, predicted), "KL": near.kl(hidden, predicted), "LID": near.lid(hidden),
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


def guarded(model, detector, near, *, draws=10, seed=0):
    """A TensorFlow function from images to (n, classes + 1): the logits, and in the last column the log-odds.

    The same features as `features`, differentiable: Monte-Carlo dropout by `draws` thinned networks of the attacker's
    own (expectation over fixed masks), KDE over the points of `near`, of which an attacker may take fewer.
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
        return tf.concat([logits, log_odds[:, None]], axis=1)

    outputs.randomised = False  # the masks are drawn once
    return outputs
