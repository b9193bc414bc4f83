"""Closeness to a class: how near an image's last hidden activations lie to the training images of that class."""

from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf

from helpers.checks import check_images, check_labels, check_positive, known
from helpers.models import graph_of, part, predict

FLOOR = 1e-7  # of a class's mean share, so that a unit which that class never uses costs much and not infinitely much


def check_bandwidth(bandwidth):
    """Raise ValueError unless `bandwidth` is a number > 0 whose square, by which distances are divided, is one."""
    check_positive(bandwidth=bandwidth)
    if bandwidth is None or not 1e-18 < bandwidth < 1e18:
        raise ValueError(f"bandwidth is {bandwidth}; expected a number between 1e-18 and 1e18: float32 holds the "
                         "squares of no others")


def last_hidden(model):
    """The part of `model`, a Keras network, from images to what enters its last layer, (n, d); dropout must be off."""
    def build():
        hidden = model.layers[-1].input
        return part(model, keras.ops.cast(hidden, "float32") if hidden.dtype in ("float16", "bfloat16") else hidden)

    return graph_of(model, "last hidden", build)


def activations(model, x, batch_size=1000):
    """Last hidden activations (n, d) float32 of images `x` (n, h, w, c), in test mode."""
    check_images(x)
    return predict(last_hidden(model), x, batch_size)


@dataclass(frozen=True, eq=False)
class Closeness:
    """Training activations of every class, to which images are compared (paper 04, Section 3.5).

    Parameters
    ----------
    points : one (m, d) float32 array of last hidden activations a class.
    bandwidth : sigma of the kernel exp(-|x - y|^2 / sigma^2) of Eqn. 9; the paper has 1.70 (MNIST), 1.00 (Fashion).
    pmf : how activations become distributions, a name in `DISTRIBUTIONS`; the paper leaves it open.
    """

    points: tuple[np.ndarray, ...]
    bandwidth: float
    pmf: str = "sum"

    @classmethod
    def fit(cls, features, labels, bandwidth, classes=10, pmf="sum"):
        """Sort activations (n, d) by class.

        Raises ValueError for a bandwidth <= 0, a class without an image, and negative activations to be divided by
        their sum.
        """
        check_bandwidth(bandwidth)
        if known("pmf", pmf, DISTRIBUTIONS) == "sum" and np.min(features) < 0:
            raise ValueError(f"features go down to {np.min(features):.3g}; expected none below 0, or pmf='softmax'")
        labels = check_labels(labels, len(features), classes)
        points = tuple(np.asarray(features[labels == c], "float32") for c in range(classes))
        if missing := [c for c, members in enumerate(points) if not len(members)]:
            raise ValueError(f"labels lack the classes {missing}; expected a training image of each of {classes}")
        return cls(points, float(bandwidth), pmf)

    def thin(self, n):
        """The same with the first `n` points of each class."""
        return replace(self, points=tuple(members[:n] for members in self.points))

    def log_density(self, features, classes, batch_size=500):
        """Logarithm of the mean kernel (Eqn. 9) between activations (n, d) and the points of `classes` (n,)."""
        classes, scores = check_labels(classes, len(features), len(self.points)), np.empty(len(features), "float32")
        for c, members in enumerate(self.points):
            rows = np.flatnonzero(classes == c)
            for i in range(0, len(rows), batch_size):
                b = rows[i : i + batch_size]
                scores[b] = _log_density(features[b], members, self.bandwidth)
        return scores

    def kl(self, features, classes):
        """KL divergence (nats) of activations (n, d), turned into distributions, from the mean ones of `classes`."""
        classes = check_labels(classes, len(features), len(self.points))
        return np.take_along_axis(divergences(features, self.means(), self.pmf).numpy(), classes[:, None], 1)[:, 0]

    def means(self):
        """Mean distribution of each class, (classes, d): Q of Eqn. 12."""
        return np.stack([DISTRIBUTIONS[self.pmf](members).numpy().mean(axis=0) for members in self.points])

    def lid(self, features, neighbours=20, reference=200):
        """Local intrinsic dimensionality (n,) of activations (n, d), by maximum likelihood (Ma et al. 2018, Eqn. 4).

        From the distances to the nearest of the first `reference` points of every class: -1 / mean of log(r_i / r) over
        the `neighbours` nearest, where r is the distance of the next one. Eqn. 4 has the last of them in that place.
        """
        points = np.concatenate(self.thin(reference).points)
        if not 1 <= neighbours < len(points):
            raise ValueError(f"neighbours is {neighbours}; expected 1 to {len(points) - 1}, less than there are points")
        return _lid(features, points, neighbours).numpy()


def shares(features):
    """Activations (n, d) >= 0 as distributions: each divided by the sum of all."""
    return features / tf.maximum(tf.reduce_sum(features, axis=-1, keepdims=True), FLOOR)


DISTRIBUTIONS = {"sum": shares, "softmax": tf.nn.softmax}  # the paper's "necessary conversions"


def divergences(features, means, pmf="sum"):
    """D_KL(P || Q_c) of Eqn. 11 in nats, (n, classes), of activations (n, d) from mean distributions (classes, d)."""
    p = DISTRIBUTIONS[pmf](features)
    log_p, log_q = tf.math.log(tf.maximum(p, 1e-30)), tf.math.log(tf.maximum(means, FLOOR))
    return tf.reduce_sum(p * log_p, axis=1, keepdims=True) - tf.matmul(p, log_q, transpose_b=True)


def squared_distances(a, b):
    """|a_i - b_j|^2 by one matrix product, (n, m), about the mean of `b`: a common offset would swallow the digits."""
    centre = tf.reduce_mean(b, axis=0)
    a, b = a - centre, b - centre
    cross = tf.matmul(a, b, transpose_b=True)
    return tf.maximum(tf.reduce_sum(a**2, axis=1)[:, None] + tf.reduce_sum(b**2, axis=1) - 2 * cross, 0.0)


def log_density(features, points, bandwidth, members=True):
    """Logarithm of the mean kernel between each row of `features` and its `members` among the `points`, a tensor (n,).

    The kernel itself underflows in float32 some ten bandwidths away; its logarithm does not.
    """
    log_kernel = tf.where(members, -squared_distances(features, points) / bandwidth**2, -np.inf)
    count = tf.reduce_sum(tf.cast(tf.broadcast_to(members, tf.shape(log_kernel)), log_kernel.dtype), axis=1)
    return tf.reduce_logsumexp(log_kernel, axis=1) - tf.math.log(count)


_log_density = tf.function(log_density, reduce_retracing=True)


@tf.function(reduce_retracing=True)
def _lid(features, points, neighbours):
    nearest, _ = tf.math.top_k(-squared_distances(features, points), neighbours + 1)
    log_distance = 0.5 * tf.math.log(tf.maximum(-nearest, 1e-12))
    return -1 / tf.reduce_mean(log_distance[:, :neighbours] - log_distance[:, neighbours:], axis=1)
