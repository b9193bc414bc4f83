"""RBF-SVMs, one a class against the rest, that share one matrix of squared distances, and their scores in TensorFlow.

The distances between the features of a layer are computed once, as a matrix product, and serve the machines of all
classes, all folds and every C and gamma (paper 01, Section 2.4).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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

    vectors : (m, q) float32, in the q of p features that are not zero in all of them; of a thin one (m, r), their
        coordinates in `basis`.
    columns : (p,) bool, which. weights : (m, classes) float64, alpha_i y_i, 0 where i supports another class only.
    bias : (classes,) float64. gamma, C : as fitted.
    centre, basis, norms : of a thin one, see `thin`: (p,) and (q, r) float32, and (m,) float64, the squared length of
        each whole vector from the centre.
    """

    vectors: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    gamma: float
    C: float
    centre: np.ndarray | None = None
    basis: np.ndarray | None = None
    norms: np.ndarray | None = None

    @classmethod
    def of(cls, h, weights, bias, gamma, C):
        """The machine of dual coefficients `weights` (n, classes) on features `h` (n, p), kept small."""
        used = weights.any(axis=1)
        columns = h[used].any(axis=0)
        return cls(np.compress(columns, h[used], axis=1), columns, weights[used], bias, float(gamma), float(C))

    @cached_property
    def _tensors(self):
        """Vectors from their centre, their squared lengths, the centre, where columns go and come from, weights."""
        with tf.init_scope():  # once and outside of any graph, which could not hold more than 2 GB
            return [tf.constant(array) for array in (*self._centred(), *self._places(), self.weights, self.bias)]

    def _centred(self):
        """What the products need: vectors (m, q or r), squared lengths (m,), centre (p,)."""
        if self.basis is not None:
            return self.vectors, self.norms, self.centre
        mean = self.vectors.mean(axis=0, dtype=np.float64).astype("float32")
        centre = np.zeros(len(self.columns), "float32")
        centre[self.columns] = mean
        vectors = self.vectors - mean
        return vectors, np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64), centre

    def _places(self):
        """Which columns are used, and where each of p is found among them; one that is not, behind the last."""
        back = np.cumsum(self.columns) - 1
        back[~self.columns] = self.columns.sum()
        return np.flatnonzero(self.columns), back

    def scores(self, h, width=1.0, dtype=tf.float32):
        """Decision values of features `h` (n, p) float64, (n, classes) float64, with gamma times `width`.

        What has a number for each image and vector is computed in `dtype`. The largest kernel value of an image stands
        before the sum, in float64, for exp(-gamma d^2) underflows in float32 beyond gamma d^2 = 103, and its gradient
        with it.
        """
        if h.shape[1] != len(self.columns):
            raise ValueError(f"h has {h.shape[1]} features; expected {len(self.columns)}, those of the support vectors")
        *parts, bias = self._tensors
        basis = None if self.basis is None else tf.cast(self._basis, dtype)
        return _sums(h, *parts, basis, self.gamma * width, dtype) + bias

    @cached_property
    def _basis(self):
        with tf.init_scope():
            return tf.constant(self.basis)

    def thin(self, probe, tolerance=1e-3, ranks=(128, 256, 512, 768, 1024, 1536, 2048), seed=0):
        """The same machine in a few directions of its features, or itself where none of `ranks` is enough.

        The product of an image and a vector, both from the vectors' centre, is taken in a few directions alone; lengths
        stay whole. So of a squared distance only 2 h_rest . v_rest is lost, whose size is at most 2 |h_rest| |v_rest|
        (`lost`). The directions are those in which the vectors vary most, and those in which they pull the scores at
        every other of the features `probe` (k, p) float32. The first of `ranks` is taken whose decision values differ
        by no more than `tolerance` at those between.
        """
        vectors, norms, centre = self._centred()
        ranks = [rank for rank in ranks if 3 * rank <= vectors.shape[1] and rank < len(vectors)]  # else little is won
        if not ranks or self.basis is not None:
            return self
        new = tf.constant(probe[1::2], tf.float64)
        whole, pulls = self.scores(new).numpy(), self._pulls(probe[::2], vectors, norms, centre)
        basis = _directions(vectors, pulls, max(ranks), seed)
        coordinates = vectors @ basis
        for rank in ranks:
            found = replace(self, vectors=np.ascontiguousarray(coordinates[:, :rank]), centre=centre, norms=norms,
                            basis=np.ascontiguousarray(basis[:, :rank]))
            if np.abs(found.scores(new) - whole).max() <= tolerance:
                return found
        return self

    def _pulls(self, h, vectors, norms, centre):
        """Sum of the vectors, weighted as in the score of each class at each of `h` (k, p): (k * classes, q)."""
        away = h - centre
        distances = (away**2).sum(axis=1, keepdims=True) + norms - 2 * away[:, self.columns] @ vectors.T
        bumps = np.exp(-self.gamma * np.maximum(distances, 0)).astype("float32")
        return np.concatenate([(bumps * weights) @ vectors for weights in self.weights.T.astype("float32")])

    def lost(self, h):
        """The most that each squared distance of features `h` (n, p) to a vector has lost in a thin one, (n,)."""
        if self.basis is None:
            return np.zeros(len(h))
        away = h.astype("float64") - self.centre
        inside = (away[:, self.columns].astype("float32") @ self.basis).astype("float64")
        rest = (away**2).sum(axis=1) - (inside**2).sum(axis=1)
        left = self.norms - np.einsum("ij,ij->i", self.vectors, self.vectors, dtype=np.float64)
        return 2 * np.sqrt(np.maximum(rest, 0) * max(left.max(), 0))


def _sums(h, vectors, norms, centre, there, back, weights, basis, gamma, dtype):
    """Sums of kernel values times `weights`, (n, classes) float64, with a gradient whose small numbers survive."""

    def coordinates(away):
        used = tf.gather(away, there, axis=1)
        return used if basis is None else used @ basis

    def spread(pull):  # the way back
        pull = pull if basis is None else tf.matmul(pull, basis, transpose_b=True)
        return tf.gather(tf.pad(pull, [[0, 0], [0, 1]]), back, axis=1)

    vectors, narrow = tf.cast(vectors, dtype), tf.cast(weights, dtype)

    @tf.custom_gradient
    def sums(h):
        away = h - tf.cast(centre, tf.float64)
        products = tf.matmul(coordinates(tf.cast(away, dtype)), vectors, transpose_b=True)
        lengths = tf.cast(tf.reduce_sum(away**2, axis=1, keepdims=True), dtype)
        distances = lengths + tf.cast(norms, dtype) - 2 * products
        nearest = tf.nn.relu(tf.reduce_min(distances, axis=1, keepdims=True))
        bumps = tf.exp(gamma * tf.minimum(nearest - distances, 0))  # 1 for the nearest vector
        largest = tf.exp(-gamma * tf.cast(nearest, tf.float64))

        def gradient(upstream):
            scale = tf.reduce_max(tf.abs(upstream), axis=1, keepdims=True)
            shares = tf.cast(upstream / tf.where(scale > 0, scale, 1.0), dtype)
            pulls = bumps * tf.matmul(shares, narrow, transpose_b=True)
            towards = tf.cast(spread(tf.matmul(pulls, vectors)), tf.float64)
            force = tf.cast(tf.reduce_sum(pulls, axis=1, keepdims=True), tf.float64)
            return -2 * gamma * scale * largest * (away * force - towards)

        # A sum over tens of thousands of vectors, in which large terms cancel, has no digits to lose.
        return largest * (tf.cast(bumps, tf.float64) @ weights), gradient

    return sums(h)


def _directions(vectors, pulls, rank, seed, sample=3072, first=128):
    """Orthonormal directions (q, rank): the `first` ones of `pulls`, then the leading of a `sample` of `vectors`."""
    rows = np.random.default_rng(seed).permutation(len(vectors))[: max(sample, rank)]
    found = [_leading(pulls, min(first, rank, len(pulls))), _leading(vectors[np.sort(rows)], rank)]
    return np.linalg.qr(np.concatenate(found, axis=1))[0][:, :rank]


def _leading(rows, rank):
    """Directions (q, rank) along which centred `rows` (n, q) are longest."""
    values, turned = np.linalg.eigh(rows @ rows.T)
    longest = rows.T @ turned[:, np.argsort(-values)[:rank]]
    return longest / np.maximum(np.linalg.norm(longest, axis=0), 1e-30)


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
    out = _symmetric(a, rows, label, np.float32, 14.5, lambda block: block)
    np.fill_diagonal(out, 0)
    return out


def gram(a, gamma, label=None):
    """RBF kernel (n, n) float64 between the rows of `a` (n, p), without a matrix of distances beside it.

    The exponential is taken in float32, as exact as the distances are. Raises MemoryError as `squared_distances` does.
    """
    check_positive(gamma=gamma)
    out = _symmetric(a, 512, label, np.float64, 13.2, lambda block: np.exp(np.multiply(block, -gamma, out=block)))
    np.fill_diagonal(out, 1)
    return out


def _symmetric(a, rows, label, dtype, each, of):
    """Matrix (n, n) of what `of` makes of blocks of squared distances; `each`: bytes a pair that an SVM then needs."""
    n, free = len(a), _free_memory()  # each: the kernel, its copy without a fold, and the distances beside it if kept
    if each * n**2 > free:
        raise MemoryError(f"{n:,} samples need {each * n**2 / 1e9:.3g} GB for their kernel, {free / 1e9:.3g} GB are "
                          f"free: fit at most {int((free / each) ** 0.5):,}")
    a = np.compress(a.any(axis=0), a, axis=1)  # of a layer after a ReLU many features are never there
    # The square of a common offset would swallow the distances: in float32 there are seven digits for both.
    out, centre, parts = np.empty((n, n), dtype), a.mean(axis=0, dtype=np.float64).astype(a.dtype), []
    with tf.device("CPU"):  # TensorFlow's product is twice as fast as NumPy's where there is AVX-512; a GPU rounds more
        for i in range(0, n, rows):
            part = (a[i : i + rows] - centre).astype("float32")
            norms = np.einsum("ij,ij->i", part, part, dtype=np.float64).astype("float32")
            parts.append((slice(i, i + rows), tf.constant(part), norms))
        for done, (i, left, norms) in enumerate(tqdm(parts, desc=label, disable=label is None, unit="block")):
            for j, right, others in parts[: done + 1]:
                block = -2 * tf.matmul(left, right, transpose_b=True).numpy() + norms[:, None] + others
                block = of(np.maximum(block, 0, out=block))
                out[i, j], out[j, i] = block, block.T
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
