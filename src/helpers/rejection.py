"""Neural rejection (NR) and deep neural rejection (DNR): RBF-SVMs on a network's layers, and the right to refuse.

Sources: paper 01, Section 2.4; Melis et al. 2017 (NR, one layer); Sotgiu et al. 2020 (DNR, several layers and a
combining SVM). The machines are those of `helpers.svm`, one a class against the rest.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from scipy.special import expit, logit

from helpers import files, models, svm
from helpers.checks import check_images, check_labels, check_positive
from helpers.defence import Network, Outputs
from helpers.defence import Path as Way
from helpers.losses import wrong
from helpers.svm import SVM

_ARRAYS = ("vectors", "columns", "weights", "bias", "centre", "basis", "norms")  # the last three of a thin one alone
_UNCOUNTED = (keras.layers.Flatten, keras.layers.Dropout, keras.layers.InputLayer)  # not in the paper's Table 1


@tf.custom_gradient
def _widen(*features):
    """Features as float64; an image's gradient that float32 cannot hold is scaled up on its way back."""

    def gradient(*upstream):
        largest = tf.reduce_max([tf.reduce_max(tf.abs(u), axis=1, keepdims=True) for u in upstream], axis=0)
        scale = tf.where((largest > 0) & (largest < 1e-20), 1 / tf.where(largest > 0, largest, 1.0), 1.0)
        return [tf.cast(u * scale, h.dtype) for u, h in zip(upstream, features, strict=True)]

    return [tf.cast(h, tf.float64) for h in features], gradient


def margin(outputs, y):
    """Best wrong class against the true one or being refused, (n,): above 0 where `y` is evaded (paper 01, 2.5.1).

    `losses.evasion` is above 0 for the same images; below 0 this one climbs the wrong class even while a true one is
    sure.
    """
    threshold = outputs.refusal + tf.reduce_max(outputs.logits, axis=1)
    sure = tf.maximum(tf.gather(outputs.logits, y, batch_dims=1), threshold)
    return tf.reduce_max(wrong(outputs.logits, y), axis=1) - sure


@dataclass(frozen=True, eq=False)
class Rejection:
    """A network with SVMs on some of its layers and a threshold: the most probable class, or a refusal.

    A `helpers.defence.Defence`, whose logits are log-odds (of the bare network: its logits).

    layers : numbers of the layers, as in paper 01, Table 1; none: the bare network. svms : one a layer.
    combiner : SVM on the concatenated scores (DNR), or None (NR, bare network).
    inner : one (2, classes) a layer, slope and offset that turn its scores into the log-odds of the probabilities that
        the combiner is given; none: it is given the scores.
    platt : (2, classes), slope and offset that turn a score into log-odds; None leaves it.
    threshold : log-odds below which it refuses; -inf never does.
    width : factor on every gamma. Below 1 the kernels reach further: not what is deployed, but what an attacker may
        follow, and attack on the way as if it were a defence.
    """

    network: keras.Model
    layers: tuple[int, ...] = ()
    svms: tuple[SVM, ...] = ()
    combiner: SVM | None = None
    platt: np.ndarray | None = None
    threshold: float = -np.inf
    width: float = 1.0
    inner: tuple[np.ndarray, ...] = ()

    @property
    def randomised(self):
        """Whether the network says that it is."""
        return models.randomised(self.network)

    @cached_property
    def _features(self):
        with tf.init_scope():
            return feature_network(self.network, self.layers) if self.layers else self.network

    def scores(self, x, scaled=False):
        """Decision values (n, classes) float64 of images `x`, a tensor.

        `scaled`: an image's gradient too small for float32 keeps its direction and loses its length.
        """
        outputs = tf.nest.flatten(self._features(x, training=False))
        if not self.layers:
            return tf.cast(outputs[0], tf.float64)
        flat = [tf.reshape(h, (tf.shape(h)[0], int(np.prod(h.shape[1:])))) for h in outputs]
        wide, dtype = (_widen(*flat) if scaled else [tf.cast(h, tf.float64) for h in flat]), flat[0].dtype
        layers = [each.scores(h, self.width, dtype) for each, h in zip(self.svms, wide, strict=True)]
        if self.combiner is None:
            return layers[0]
        layers = [tf.sigmoid(s * a + b) for s, (a, b) in zip(layers, self.inner, strict=True)] if self.inner else layers
        return self.combiner.scores(tf.concat(layers, axis=1), self.width, tf.float64)

    def __call__(self, x):
        """Log-odds of the classes, float64, and how far the largest lies below the threshold."""
        scores = self.scores(x, scaled=True)
        odds = scores if self.platt is None else scores * self.platt[0] + self.platt[1]
        return Outputs(odds, self.threshold - tf.reduce_max(odds, axis=1))

    def paths(self, seed=0):
        """The network alone; the defence with kernels that reach further; the defence itself."""
        return {"unaware": Way(Network(self.network)), "smoothed": Way(self.smoothed(0.3), (margin,)),
                "exact": Way(self, (margin,))}

    def smoothed(self, width):
        """The same defence with every gamma times `width`, kept with its graphs."""
        check_positive(width=width)
        return models.graph_of(self, ("smoothed", width), lambda: replace(self, width=width))

    def as_float64(self):
        """The same with a network that computes in float64."""
        return replace(self, network=models.as_float64(self.network))

    def at(self, theta):
        """The same defence with reject threshold `theta`, a probability in (0, 1)."""
        if not 0 < theta < 1:
            raise ValueError(f"theta is {theta}; expected a probability above 0 and below 1")
        return replace(self, threshold=float(logit(theta)))

    def at_rate(self, x, rate):
        """The same defence with the threshold that refuses the share `rate` of the clean *validation* images `x`."""
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}; expected a share of at least 0 and below 1")
        check_images(x)
        return replace(self, threshold=float(np.quantile(models.predict(self, x, 500).logits.max(axis=1), rate)))

    @property
    def theta(self):
        """The reject threshold as a probability."""
        return float(expit(self.threshold))


# ── Fitting ──


def feature_network(network, layers):
    """Keras network from images to the outputs of `layers`, counted as in paper 01, Table 1."""
    counted = [layer for layer in network.layers if not isinstance(layer, _UNCOUNTED)]
    if not layers or any(not isinstance(n, int) or not 1 <= n <= len(counted) for n in layers):
        raise ValueError(f"layers are {layers}; expected numbers from 1 to {len(counted)}")
    outputs = [counted[n - 1].output for n in layers]
    return models.graph_of(network, ("features", layers), lambda: models.part(network, outputs))


def features(network, x, layers, batch_size=500):
    """Outputs (n, p) float32 of each of `layers` for images `x`, in test mode."""
    check_images(x)
    return _features(network, x, layers, batch_size)


def _features(network, x, layers, batch_size=500):
    outputs = models.forward(feature_network(network, tuple(layers)), x)
    parts = [tf.nest.flatten(outputs(tf.constant(x[i : i + batch_size]))) for i in range(0, len(x), batch_size)]
    return [np.concatenate([part[i] for part in parts]).reshape(len(x), -1) for i in range(len(layers))]


def fit(network, x, y, *, layers=(5, 7, 8), C=0.1, gamma=0.01, folds=None, probabilities=False, calibrated=True,
        theta=0.9, shared=None, probe=None, tolerance=1e-3, label=None):
    """Fit NR (one layer) or DNR (several, and a combining SVM on their scores) on images `x` and labels `y`.

    Parameters
    ----------
    C, gamma : one number for all SVMs, or a dictionary by layer and "combiner"; the defaults are the paper's.
    folds : None gives the combiner scores of the samples that the SVMs were fitted on, as the paper does; a number
        gives it out-of-fold scores, as Sotgiu et al. do.
    probabilities : give the combiner probabilities of each layer, by `svm.platt`, in the place of scores.
    calibrated : turn the last scores into probabilities by 5-fold scores, as scikit-learn's `predict_proba`. False
        leaves them, as Sotgiu et al. do, and the defence refuses nothing until `at_rate`.
    shared : what `prepare` gave for these images, to fit several defences from the same distances.
    probe : images on which decision values are to stay what they are, within the `tolerance`, when the SVMs of wide
        layers are made thin (`svm.SVM.thin`); None leaves them whole.
    label : text of the progress bars; None shows none.
    """
    check_images(x)
    y, layers = check_labels(y, len(x), int(np.max(y)) + 1), tuple(layers)
    C, gamma = _parameters(network, y, layers, C, gamma, folds)
    Rejection(network).at(theta)  # refuse a bad one before the work, not after it
    svms, lines, scores, gram = [], [], [], None
    for n in layers:
        gram = None  # one large matrix at a time
        h, gram = _gram(network, x, n, gamma[n], shared, label)
        weights, bias = svm.duals(gram, y, C[n], label and f"{label}, layer {n}")
        if len(layers) > 1:
            apart = svm.out_of_fold(gram, y, C[n], folds or 5) if folds or probabilities else None
            scores.append(gram @ weights + bias if folds is None else apart)
            lines += [svm.platt(apart, y)] if probabilities else []
            gram = None
        machine = SVM.of(h, weights, bias, gamma[n], C[n])
        svms.append(machine if probe is None else machine.thin(_features(network, probe, (n,))[0], tolerance))
    combiner = None
    if len(layers) > 1:
        n, stacked = "combiner", np.concatenate(_chances(scores, lines), axis=1).astype("float32")
        gram = svm.gram(stacked, gamma[n])
        combiner = SVM.of(stacked, *svm.duals(gram, y, C[n], label and f"{label}, {n}"), gamma[n], C[n])
    defence = Rejection(network, layers, tuple(svms), combiner, inner=tuple(lines))
    if not calibrated:
        return defence
    return replace(defence, platt=svm.platt(svm.out_of_fold(gram, y, C[n]), y)).at(theta)


def _parameters(network, y, layers, C, gamma, folds):
    """C and gamma by layer and "combiner"; raise for what `fit` cannot work with."""
    if folds is not None and folds not in range(2, len(y) + 1):
        raise ValueError(f"folds is {folds}; expected None or a whole number from 2 to {len(y)}")
    parts = [*layers, "combiner"]
    C, gamma = (value if isinstance(value, dict) else dict.fromkeys(parts, value) for value in (C, gamma))
    for part in parts[: len(layers) + (len(layers) > 1)]:
        if None in (C.get(part), gamma.get(part)):
            raise ValueError(f"C and gamma lack {part!r}; expected a number, or one for each of {parts}")
        check_positive(C=C[part], gamma=gamma[part])
    svm.check_classes(y, max(5, folds or 0))
    feature_network(network, layers)
    return C, gamma


def _chances(scores, lines):
    """Scores of each layer, or where there are `lines` the probabilities that these make of them."""
    return [1 / (1 + np.exp(-(s * a + b))) for s, (a, b) in zip(scores, lines, strict=True)] if lines else scores


def _gram(network, x, n, gamma, shared, label):
    """Features and kernel of layer `n`, from distances that are `shared` or straight from the features."""
    if shared:
        h, distances = shared[n]
        return h, svm.kernel(distances, gamma)
    (h,) = _features(network, x, (n,))
    return h, svm.gram(h, gamma, label and f"{label}, kernel {n}")


def prepare(network, x, layers, label=None):
    """Features and their squared distances by layer, for several calls of `fit`."""
    check_images(x)
    return _prepare(network, x, layers, label)


def _prepare(network, x, layers, label):
    found = zip(layers, _features(network, x, layers), strict=True)
    return {n: (h, svm.squared_distances(h, label=label and f"{label}, distances {n}")) for n, h in found}


# ── On the disk ──


def save(defence, folder):
    """Keep `defence` in `folder` as <SHA-256>.npz, its network beside it, and return that file name."""
    svms = [*defence.svms, *([defence.combiner] if defence.combiner else [])]
    about = {"network": models.save(defence.network, folder), "layers": defence.layers, "threshold": defence.threshold,
             "width": defence.width, "svms": [{"gamma": each.gamma, "C": each.C} for each in svms]}
    arrays = {f"{i}.{name}": getattr(each, name) for i, each in enumerate(svms) for name in _ARRAYS
              if getattr(each, name) is not None}
    arrays |= {f"inner.{i}": line for i, line in enumerate(defence.inner)}
    arrays |= {"about": np.array(json.dumps(about)), **({} if defence.platt is None else {"platt": defence.platt})}
    path = Path(folder) / f"{_digest(arrays)}.npz"
    if not path.exists():
        with files.atomic(path) as temporary:
            np.savez(temporary, **arrays)
    return path.name


def load(path, load_network=models.load):
    """The defence of a file that `save` wrote; FileNotFoundError or ValueError, naming it, where it is not whole.

    load_network : what loads its network from the file beside it.
    """
    arrays = files.kept(path, files.read_npz, _digest)
    about = json.loads(arrays["about"].item())
    network = load_network(Path(path).with_name(about["network"]))
    svms = [SVM(**{name: arrays.get(f"{i}.{name}") for name in _ARRAYS}, **kept)
            for i, kept in enumerate(about["svms"])]
    n = len(about["layers"])
    return Rejection(network, tuple(about["layers"]), tuple(svms[:n]), svms[n] if len(svms) > n else None,
                   arrays.get("platt"), about["threshold"], about["width"],
                   tuple(arrays[f"inner.{i}"] for i in range(n) if f"inner.{i}" in arrays))


def _digest(arrays):
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()
