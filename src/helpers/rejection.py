"""Neural rejection (NR) and deep neural rejection (DNR): RBF-SVMs on a network's layers, and the right to refuse.

Sources: paper 01, Section 2.4; Melis et al. 2017 (NR, one layer); Sotgiu et al. 2020 (DNR, several layers and a
combining SVM). All SVMs are one-vs-rest. The squared distances of a layer's features are computed once, by BLAS, and
serve the SVMs of all classes, all folds and every C and gamma.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC
from tqdm import tqdm

from helpers import files, models
from helpers.threat import check_images, check_labels

OUTCOMES = ("correct", "rejected", "evaded")
_ARRAYS = ("vectors", "columns", "weights", "bias")
_UNCOUNTED = (keras.layers.Flatten, keras.layers.Dropout, keras.layers.InputLayer)  # not in the paper's Table 1


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

    @cached_property
    def _tensors(self):
        with tf.init_scope():  # once and outside of any graph, which could not hold more than 2 GB
            norms = np.einsum("ij,ij->i", self.vectors, self.vectors, dtype=np.float64)
            there, back = np.flatnonzero(self.columns), np.cumsum(self.columns) - 1
            back[~self.columns] = len(there)  # where `_distances` has a column of zeros
            return [tf.constant(array) for array in (self.vectors, norms, there, back, self.weights, self.bias)]

    def scores(self, h, widths=(1.0,), dtype=tf.float32):
        """Decision values of features `h` (n, p) float64, a tensor (n, classes) float64 for each factor on gamma.

        The two large matrix products run in `dtype`, all else in float64: exp(-gamma d^2) underflows in float32 beyond
        gamma d^2 = 103, and its gradient with it.
        """
        vectors, norms, there, back, weights, bias = self._tensors
        if h.shape[1] != len(self.columns):
            raise ValueError(f"h has {h.shape[1]} features; expected {len(self.columns)}, those of the support vectors")
        distances = _distances(h, tf.cast(vectors, dtype), norms, there, back)
        return [tf.exp(-self.gamma * width * distances) @ weights + bias for width in widths]


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


@tf.custom_gradient
def _widen(*features):
    """Features as float64; an image's gradient that float32 cannot hold is scaled up on its way back."""

    def gradient(*upstream):
        largest = tf.reduce_max([tf.reduce_max(tf.abs(u), axis=1, keepdims=True) for u in upstream], axis=0)
        scale = tf.where((largest > 0) & (largest < 1e-20), 1 / tf.where(largest > 0, largest, 1.0), 1.0)
        return [tf.cast(u * scale, h.dtype) for u, h in zip(upstream, features, strict=True)]

    return [tf.cast(h, tf.float64) for h in features], gradient


@dataclass(frozen=True, eq=False)
class Defence:
    """A network with SVMs on some of its layers and a threshold: the most probable class, or a refusal.

    layers : numbers of the layers, as in paper 01, Table 1; none: the bare network. svms : one a layer.
    combiner : SVM on the concatenated scores (DNR), or None (NR, bare network).
    platt : (2, classes), slope and offset that turn a score into log-odds; None leaves it.
    threshold : log-odds below which it refuses; -inf never does.
    """

    network: keras.Model
    layers: tuple[int, ...] = ()
    svms: tuple[SVM, ...] = ()
    combiner: SVM | None = None
    platt: np.ndarray | None = None
    threshold: float = -np.inf

    @cached_property
    def _features(self):
        with tf.init_scope():
            return feature_network(self.network, self.layers) if self.layers else self.network

    def scores(self, x, widths=(1.0,), scaled=False):
        """Decision values (n, classes) float64 of images `x`, a tensor for each factor of gamma in `widths`.

        `scaled`: an image's gradient too small for float32 keeps its direction and loses its length.
        """
        outputs = tf.nest.flatten(self._features(x, training=False))
        if not self.layers:
            return [tf.cast(outputs[0], tf.float64) for _ in widths]
        flat = [tf.reshape(h, (tf.shape(h)[0], int(np.prod(h.shape[1:])))) for h in outputs]
        wide, dtype = (_widen(*flat) if scaled else [tf.cast(h, tf.float64) for h in flat]), flat[0].dtype
        layers = zip(*(svm.scores(h, widths, dtype) for svm, h in zip(self.svms, wide, strict=True)), strict=True)
        if self.combiner is None:
            return [scores for (scores,) in layers]
        return [self.combiner.scores(tf.concat(scores, axis=1), [width], tf.float64)[0]
                for scores, width in zip(layers, widths, strict=True)]

    def logits(self, x, widths=(1.0,)):
        """Log-odds of the classes and, last, the threshold: (n, classes + 1) float64, side by side for `widths`."""
        parts = []
        for scores in self.scores(x, widths, scaled=True):
            odds = scores if self.platt is None else scores * self.platt[0] + self.platt[1]
            parts += [odds, tf.fill((tf.shape(odds)[0], 1), tf.constant(self.threshold, tf.float64))]
        return tf.concat(parts, axis=1)

    def at(self, theta):
        """The same defence with reject threshold `theta`, a probability in (0, 1)."""
        if not 0 < theta < 1:
            raise ValueError(f"theta is {theta}; expected a probability above 0 and below 1")
        return replace(self, threshold=float(logit(theta)))

    def at_rate(self, x, rate):
        """The same defence with the threshold that refuses the share `rate` of the clean *validation* images `x`."""
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}; expected a share of at least 0 and below 1")
        return replace(self, threshold=float(np.quantile(evaluate(self, x)[:, :-1].max(axis=1), rate)))

    @property
    def theta(self):
        """The reject threshold as a probability."""
        return float(expit(self.threshold))


def evaluate(defence, x, batch_size=500):
    """`defence.logits` of images `x` (n, h, w, c) as an array (n, classes + 1), in batches."""
    check_images(x)
    graph = models.compiled(defence.logits)
    return np.concatenate([graph(tf.constant(x[i : i + batch_size])) for i in range(0, len(x), batch_size)])


def outcomes(defence, x, y):
    """What becomes of each image, (n,) int: an index into `OUTCOMES`."""
    z = evaluate(defence, x)
    check_labels(y, len(x), z.shape[1] - 1)
    seen = z.argmax(axis=1)
    return np.where(seen == z.shape[1] - 1, 1, np.where(seen == y, 0, 2))


def rates(results):
    """Shares of `outcomes` by name; they sum to 1."""
    return {name: float(np.mean(np.asarray(results) == i)) for i, name in enumerate(OUTCOMES)}


# ── Fitting ──


def feature_network(network, layers):
    """Keras network from images to the outputs of `layers`, counted as in paper 01, Table 1."""
    counted = [layer for layer in network.layers if not isinstance(layer, _UNCOUNTED)]
    if not layers or any(not isinstance(n, int) or not 1 <= n <= len(counted) for n in layers):
        raise ValueError(f"layers are {layers}; expected numbers from 1 to {len(counted)}")
    return keras.Model(network.inputs[0], [counted[n - 1].output for n in layers])


def features(network, x, layers, batch_size=500):
    """Outputs (n, p) float32 of each of `layers` for images `x`, in test mode."""
    check_images(x)
    graph = models.compiled(feature_network(network, layers))
    parts = [tf.nest.flatten(graph(tf.constant(x[i : i + batch_size]))) for i in range(0, len(x), batch_size)]
    return [np.concatenate([part[i] for part in parts]).reshape(len(x), -1) for i in range(len(layers))]


def squared_distances(a, rows=2048, label=None):
    """Squared distances (n, n) float32 between the rows of `a` (n, p), by BLAS in blocks, half of them computed.

    Raises
    ------
    MemoryError
        Before it starts, when the matrix and the float64 kernel that an SVM needs would not fit.
    """
    n, free, each = len(a), _free_memory(), 14.5  # bytes a pair: the kernel, and its copy without a fold
    if each * n**2 > free:
        raise MemoryError(f"{n:,} samples need {each * n**2 / 1e9:.3g} GB for their kernel, {free / 1e9:.3g} GB are "
                          f"free: fit at most {int((free / each) ** 0.5):,}")
    a = np.ascontiguousarray(a[:, np.any(a, axis=0)], np.float32)  # columns of zeros add nothing
    out, norms = np.empty((n, n), np.float32), np.einsum("ij,ij->i", a, a, dtype=np.float64).astype("float32")
    for i in tqdm(range(0, n, rows), desc=label, disable=label is None, unit="block"):
        j = min(i + rows, n)
        block = a[i:j] @ a[:j].T
        block *= -2
        block += norms[i:j, None]
        block += norms[:j]
        out[i:j, :j] = np.maximum(block, 0, out=block)
        out[:i, i:j] = block[:, :i].T
    np.fill_diagonal(out, 0)
    return out


def _free_memory():
    """Bytes that can be had without swapping; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), np.inf)


def kernel(distances, gamma):
    """RBF kernel exp(-gamma d^2), float64, from squared distances."""
    out = np.multiply(distances, -gamma, dtype=np.float64)
    return np.exp(out, out=out)


def duals(gram, y, C, label=None):
    """Dual coefficients alpha_i y_i (n, classes) and biases (classes,) of one binary SVM a class against the rest.

    All of them read the same kernel matrix `gram` (n, n) float64.
    """
    classes = _count_classes(y)

    def one(k):
        svm = SVC(kernel="precomputed", C=C, tol=1e-4, cache_size=500).fit(gram, y == k)
        column = np.zeros(len(y))
        column[svm.support_] = svm.dual_coef_[0]
        return column, svm.intercept_[0]

    with ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())) as pool:  # libsvm frees the GIL
        found = pool.map(one, range(classes))
        found = list(tqdm(found, desc=label, total=classes, disable=label is None, unit="class"))
    return np.stack([column for column, _ in found], axis=1), np.array([bias for _, bias in found])


def out_of_fold(gram, y, C, folds=5, seed=0):
    """Scores (n, classes) of every sample by SVMs that were not fitted on it."""
    scores = np.empty((len(y), _count_classes(y, folds)))
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
    _count_classes(y, folds)
    for g, gamma in enumerate(tqdm(gammas, desc=label, disable=label is None, unit="gamma")):
        gram = kernel(distances, _positive(gamma=gamma))
        for f, (rows, held) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(gram, y)):
            known, new = gram[np.ix_(rows, rows)], gram[np.ix_(held, rows)]
            for c, C in enumerate(Cs):
                weights, bias = duals(known, y[rows], _positive(C=C))
                found[g, c, f] = np.mean((new @ weights + bias).argmax(axis=1) == y[held])
    return found


def fit(network, x, y, *, layers=(5, 7, 8), C=0.1, gamma=0.01, folds=None, theta=0.9, shared=None, label=None):
    """Fit NR (one layer) or DNR (several, and a combining SVM on their scores) on images `x` and labels `y`.

    Parameters
    ----------
    C, gamma : one number for all SVMs, or a dictionary by layer and "combiner"; the defaults are the paper's.
    folds : None gives the combiner scores of the samples that the SVMs were fitted on, as the paper does; a number
        gives it out-of-fold scores, as Sotgiu et al. do.
    shared : what `prepare` gave for these images, to fit several defences from the same distances.
    label : text of the progress bars; None shows none.

    Returns
    -------
    Defence whose probabilities were calibrated on 5-fold scores of its last SVM, as scikit-learn's `predict_proba`.
    """
    check_images(x)
    check_labels(y, len(x), int(np.max(y)) + 1)
    parts = [*layers, "combiner"]
    C, gamma = (value if isinstance(value, dict) else dict.fromkeys(parts, value) for value in (C, gamma))
    for part in parts[: len(layers) + (len(layers) > 1)]:
        if part not in C or part not in gamma:
            raise ValueError(f"C and gamma lack {part!r}; expected a number, or one for each of {parts}")
        _positive(C=C[part], gamma=gamma[part])
    _count_classes(y, max(5, folds or 0))
    feature_network(network, layers), Defence(network).at(theta)  # refuse bad ones before the work, not after it
    svms, scores = [], []
    for n in layers:
        h, distances = shared[n] if shared else prepare(network, x, (n,), label)[n]
        gram = kernel(distances, gamma[n])
        del distances  # one large matrix at a time
        weights, bias = duals(gram, y, C[n], label and f"{label}, layer {n}")
        svms.append(_svm(h, weights, bias, gamma[n], C[n]))
        if len(layers) > 1:
            scores.append(gram @ weights + bias if folds is None else out_of_fold(gram, y, C[n], folds))
    combiner = None
    if len(layers) > 1:
        n, gram, stacked = "combiner", None, np.concatenate(scores, axis=1).astype("float32")
        gram = kernel(squared_distances(stacked), gamma[n])
        combiner = _svm(stacked, *duals(gram, y, C[n], label and f"{label}, {n}"), gamma[n], C[n])
    lines = platt(out_of_fold(gram, y, C[n]), y)
    return Defence(network, tuple(layers), tuple(svms), combiner, lines).at(theta)


def prepare(network, x, layers, label=None):
    """Features and their squared distances by layer, for several calls of `fit`."""
    found = zip(layers, features(network, x, layers), strict=True)
    return {n: (h, squared_distances(h, label=label and f"{label}, distances {n}")) for n, h in found}


def _svm(h, weights, bias, gamma, C):
    used = weights.any(axis=1)
    columns = h[used].any(axis=0)
    return SVM(h[used][:, columns], columns, weights[used], bias, float(gamma), float(C))


def _count_classes(y, least=1):
    counts = np.bincount(y)
    if len(counts) < 2 or counts.min() < least:
        raise ValueError(f"y: samples by class are {counts.tolist()}; expected two classes or more, {least} of each")
    return len(counts)


def _positive(**values):
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; expected a finite number > 0")
    return value


# ── On the disk ──


def save(defence, folder):
    """Keep `defence` in `folder` as <SHA-256>.npz, its network beside it, and return that file name."""
    svms = [*defence.svms, *([defence.combiner] if defence.combiner else [])]
    about = {"network": models.save(defence.network, folder), "layers": defence.layers, "threshold": defence.threshold,
             "svms": [{"gamma": svm.gamma, "C": svm.C} for svm in svms]}
    arrays = {f"{i}.{name}": getattr(svm, name) for i, svm in enumerate(svms) for name in _ARRAYS}
    arrays |= {"about": np.array(json.dumps(about)), **({} if defence.platt is None else {"platt": defence.platt})}
    path = Path(folder) / f"{_digest(arrays)}.npz"
    if not path.exists():
        with files.atomic(path) as temporary:
            np.savez(temporary, **arrays)
    return path.name


def load(path):
    """The defence of a file that `save` wrote; FileNotFoundError or ValueError, naming it, where it is not whole."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no defence {path}; remove the folder 'units' beside its folder and run again")
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = dict(npz)
        whole = _digest(arrays) == path.stem
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and the folder 'units', and run again") from error
    if not whole:
        raise ValueError(f"{path} is damaged: its arrays are not those of its name")
    about = json.loads(arrays["about"].item())
    network = models.load(path.parent / about["network"])
    svms = [SVM(*(arrays[f"{i}.{name}"] for name in _ARRAYS), **kept) for i, kept in enumerate(about["svms"])]
    n = len(about["layers"])
    return Defence(network, tuple(about["layers"]), tuple(svms[:n]), svms[n] if len(svms) > n else None,
                   arrays.get("platt"), about["threshold"])


def _digest(arrays):
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()
