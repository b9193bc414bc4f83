"""RBF-SVMs, one a class against the rest, that share one matrix of squared distances, and their scores in TensorFlow.

The distances between the features of a layer are computed once, as a matrix product, and serve the machines of all
classes, all folds and every C and gamma (paper 01, Section 2.4).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorflow as tf
from joblib import cpu_count
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC
from tqdm import tqdm

from helpers.checks import check_positive

_MEMINFO, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # of Linux: the machine, and its version 2 containers


@dataclass(frozen=True, eq=False)
class SVM:
    """RBF-SVMs, one a class against the rest, over the union of their support vectors.

    vectors : (m, q) float32, in the q of p features that are not zero in all of them. columns : (p,) bool, which.
    weights : (m, classes) float64, alpha_i y_i, 0 where i supports another class only.
    bias : (classes,) float64. gamma, C : as fitted.
    """

    vectors: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    gamma: float
    C: float

    @classmethod
    def of(cls, h, weights, bias, gamma, C):
        """The machine of dual coefficients `weights` (n, classes) on features `h` (n, p), kept small."""
        used = weights.any(axis=1)
        columns = h[used].any(axis=0)
        return cls(np.compress(columns, h[used], axis=1), columns, weights[used], bias, float(gamma), float(C))

    @cached_property
    def _tensors(self):
        with tf.init_scope():  # once and outside of any graph, which could not hold more than 2 GB
            norms = np.einsum("ij,ij->i", self.vectors, self.vectors, dtype=np.float64)
            there, back = np.flatnonzero(self.columns), np.cumsum(self.columns) - 1
            back[~self.columns] = len(there)  # where `_distances` has a column of zeros
            return [tf.constant(array) for array in (self.vectors, norms, there, back, self.weights, self.bias)]

    def scores(self, h, width=1.0, dtype=tf.float32):
        """Decision values of features `h` (n, p) float64, (n, classes) float64, with gamma times `width`.

        The two large matrix products run in `dtype`, all else in float64: exp(-gamma d^2) underflows in float32 beyond
        gamma d^2 = 103, and its gradient with it.
        """
        vectors, norms, there, back, weights, bias = self._tensors
        if h.shape[1] != len(self.columns):
            raise ValueError(f"h has {h.shape[1]} features; expected {len(self.columns)}, those of the support vectors")
        distances = _distances(h, tf.cast(vectors, dtype), norms, there, back)
        return tf.exp(-self.gamma * width * distances) @ weights + bias


def _distances(h, vectors, norms, there, back):
    """Squared distances (n, m) float64 with a gradient whose small numbers survive a product in float32."""

    @tf.custom_gradient
    def distances(h):
        used = tf.cast(tf.gather(h, there, axis=1), vectors.dtype)
        products = tf.cast(tf.matmul(used, vectors, transpose_b=True), tf.float64)

        def gradient(upstream):
            scale = tf.reduce_max(tf.abs(upstream), axis=1, keepdims=True)
            shares = upstream / tf.where(scale > 0, scale, 1.0)
            pull = tf.pad(tf.matmul(tf.cast(shares, vectors.dtype), vectors), [[0, 0], [0, 1]])
            pull = tf.cast(tf.gather(pull, back, axis=1), tf.float64)
            return 2 * scale * (h * tf.reduce_sum(shares, axis=1, keepdims=True) - pull)

        return tf.nn.relu(tf.reduce_sum(h**2, axis=1, keepdims=True) + norms - 2 * products), gradient

    return distances(h)


# ── Fitting ──
# By hand, since scikit-learn's OneVsRestClassifier and cross_val_predict need as many lines on a kernel matrix and a
# third more time for scores out of fold: their scores are a sum over support vectors, ours a matrix product.


def squared_distances(a, rows=512, label=None):
    """Squared distances (n, n) float32 between the rows of `a` (n, p), in blocks, half of them computed.

    Raises
    ------
    MemoryError
        Before it starts, when the matrix and the float64 kernel that an SVM needs would not fit.
    """
    n, free, each = len(a), _free_memory(), 14.5  # bytes a pair: the kernel, and its copy without a fold
    if each * n**2 > free:
        raise MemoryError(f"{n:,} samples need {each * n**2 / 1e9:.3g} GB for their kernel, {free / 1e9:.3g} GB are "
                          f"free: fit at most {int((free / each) ** 0.5):,}")
    # The square of a common offset would swallow the distances: in float32 there are seven digits for both.
    out, centre, parts = np.empty((n, n), np.float32), a.mean(axis=0, dtype=np.float64).astype(a.dtype), []
    with tf.device("CPU"):  # TensorFlow's product is twice as fast as NumPy's where there is AVX-512; a GPU rounds more
        for i in range(0, n, rows):
            part = (a[i : i + rows] - centre).astype("float32")
            norms = np.einsum("ij,ij->i", part, part, dtype=np.float64).astype("float32")
            parts.append((slice(i, i + rows), tf.constant(part), norms))
        for done, (i, left, norms) in enumerate(tqdm(parts, desc=label, disable=label is None, unit="block")):
            for j, right, others in parts[: done + 1]:
                block = -2 * tf.matmul(left, right, transpose_b=True).numpy() + norms[:, None] + others
                out[i, j] = np.maximum(block, 0, out=block)
                out[j, i] = block.T
    np.fill_diagonal(out, 0)
    return out


def _free_memory():
    """Bytes that can be had without swapping, within the container's limit; infinite where the system does not say."""
    paths = _MEMINFO, *(_GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    machine, limit, used, stat = (path.read_text().split() if path.exists() else [] for path in paths)
    free = 1024.0 * int(machine[machine.index("MemAvailable:") + 1]) if "MemAvailable:" in machine else np.inf
    if used and "".join(limit).isdecimal():  # it is "max" where there is none
        cache = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0  # which makes way
        free = min(free, max(0, int(limit[0]) - int(used[0]) + cache))
    return free


def kernel(distances, gamma):
    """RBF kernel exp(-gamma d^2), float64, from squared distances."""
    out = np.multiply(distances, -gamma, dtype=np.float64)
    return np.exp(out, out=out)


def duals(gram, y, C, label=None):
    """Dual coefficients alpha_i y_i (n, classes) and biases (classes,) of one binary SVM a class against the rest.

    All of them read the same kernel matrix `gram` (n, n) float64.
    """
    classes = check_classes(y)

    def one(k):
        svm = SVC(kernel="precomputed", C=C, tol=1e-4, cache_size=200).fit(gram, y == k)
        column = np.zeros(len(y))
        column[svm.support_] = svm.dual_coef_[0]
        return column, svm.intercept_[0]

    with ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS") or cpu_count())) as pool:  # libsvm frees the GIL
        found = pool.map(one, range(classes))
        found = list(tqdm(found, desc=label, total=classes, disable=label is None, unit="class"))
    return np.stack([column for column, _ in found], axis=1), np.array([bias for _, bias in found])


def out_of_fold(gram, y, C, folds=5, seed=0):
    """Scores (n, classes) of every sample by SVMs that were not fitted on it."""
    scores = np.empty((len(y), check_classes(y, folds)))
    for rows, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(gram, y):
        weights, bias = duals(gram[np.ix_(rows, rows)], y[rows], C)
        scores[held] = gram[np.ix_(held, rows)] @ weights + bias
    return scores


def platt(scores, y):
    """Slope and offset (2, classes) of a logistic regression of each class on its score (Platt 1999).

    The targets are his, (n+ + 1) / (n+ + 2) and 1 / (n- + 2), so that separated classes keep a finite slope.
    """
    lines = []
    for k in range(scores.shape[1]):
        own = y == k
        target = np.where(own, (own.sum() + 1) / (own.sum() + 2), 1 / ((~own).sum() + 2))
        both, label = np.tile(scores[:, k], 2)[:, None], np.repeat([1, 0], len(y))
        line = LogisticRegression(C=1e6, tol=1e-6, max_iter=1000).fit(both, label, np.concatenate([target, 1 - target]))
        lines.append((line.coef_[0, 0], line.intercept_[0]))
    return np.array(lines).T


def grid_search(distances, y, Cs, gammas, folds=5, seed=0, label=None):
    """Cross-validated accuracy (len(gammas), len(Cs), folds) from one matrix of squared distances."""
    found = np.empty((len(gammas), len(Cs), folds))
    check_classes(y, folds)
    for name, values in {"gamma": gammas, "C": Cs}.items():
        for value in values:
            check_positive(**{name: value})
    for g, gamma in enumerate(tqdm(gammas, desc=label, disable=label is None, unit="gamma")):
        gram = kernel(distances, gamma)
        for f, (rows, held) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(gram, y)):
            known, new = gram[np.ix_(rows, rows)], gram[np.ix_(held, rows)]
            for c, C in enumerate(Cs):
                weights, bias = duals(known, y[rows], C)
                found[g, c, f] = np.mean((new @ weights + bias).argmax(axis=1) == y[held])
    return found


def check_classes(y, least=1):
    """Number of classes in `y`; raise unless there are two or more, with `least` samples each."""
    counts = np.bincount(y)
    if len(counts) < 2 or counts.min() < least:
        raise ValueError(f"y: samples by class are {counts.tolist()}; expected two classes or more, {least} of each")
    return len(counts)
