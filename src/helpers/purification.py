"""Purification: an autoencoder that cleans an image before a frozen classifier sees it (paper 05, Section V)."""

from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from skimage.restoration import denoise_tv_chambolle

from helpers import training
from helpers.checks import check_images, check_labels, check_positive, known
from helpers.defence import Behind, Outputs, Path, as_defence, check_defence, check_numbers
from helpers.filters import chambolle
from helpers.losses import cross_entropy
from helpers.models import as_float64, inference, predict


def autoencoder(input_shape, *, filters=(32, 64, 128, 256), seed=0):
    """The purifier of paper 05, Table III, for any image size that four halvings divide. Sets Keras' random seed.

    Strided 3x3 convolutions, a linear layer that mixes the positions of the smallest maps (all maps share it), strided
    4x4 transposed convolutions; skips add what has the same shape, and the image itself is never added to the output.
    input_shape : (height, width, 1 or 3). filters : of the four convolutions; half of them make a smaller purifier.
    Returns a keras.Model from images (n, *input_shape) in [0, 1] to images of that shape, >= 0 by its last ReLU.
    """
    height, width, channels = _checked_shape(input_shape, 2 ** len(filters))
    keras.utils.set_random_seed(seed)
    skips = [image] = [layers.Input((height, width, channels))]
    for i, count in enumerate(filters):
        hidden = layers.Conv2D(count, 3, 2, padding="same")(skips[-1])
        skips.append(_leaky(hidden) if i else hidden)  # Table III: none in its first row
    maps = layers.Reshape((-1, filters[-1]))(skips[-1])
    mixed = layers.Dense(maps.shape[1])(layers.Permute((2, 1))(maps))
    hidden = layers.Reshape(skips[-1].shape[1:])(layers.Permute((2, 1))(mixed))
    hidden = layers.Add()([hidden, skips[-1]])
    for count, skip in zip(filters[-2::-1], skips[-2:0:-1], strict=True):
        hidden = _leaky(layers.Conv2DTranspose(count, 4, 2, padding="same")(hidden))
        hidden = layers.Add()([hidden, skip])
    # Starting from mid-grey keeps the last ReLU from being born dead; `fit` keeps it from dying.
    output = layers.Conv2DTranspose(channels, 4, 2, padding="same", bias_initializer=_GREY)(hidden)
    return keras.Model(image, layers.ReLU()(output), name="purifier")


def _leaky(hidden):
    """LeakyReLU with PyTorch's slope; spelt out, since TensorFlow's graph optimiser stumbles over the fused one."""
    return keras.ops.maximum(hidden, 0.01 * hidden)


_GREY = keras.initializers.Constant(0.5)


def _checked_shape(input_shape, factor):
    if len(input_shape) != 3 or input_shape[2] not in (1, 3):
        raise ValueError(f"input_shape is {input_shape}; expected (height, width, channels) with 1 or 3 channels")
    if any(side % factor or side <= 0 for side in input_shape[:2]):
        raise ValueError(f"input_shape is {input_shape}; expected a height and width divisible by {factor}")
    return input_shape


def _check_pair(purifier, classifier):
    """Raise unless `classifier` takes what `purifier` gives, and has nothing left to train."""
    ends = purifier.input_shape[1:], purifier.output_shape[1:], classifier.input_shape[1:]
    if len(set(ends)) > 1:
        raise ValueError(f"purifier maps {ends[0]} to {ends[1]} and classifier takes {ends[2]}; expected one shape")
    if classifier.trainable_variables:
        raise ValueError(f"classifier has {len(classifier.trainable_variables)} trainable variables; expected a frozen "
                         "one: set classifier.trainable = False")


def defended(purifier, classifier):
    """Purifier and frozen classifier as one `helpers.defence.Behind`: what is deployed, and attacked.

    Raises ValueError for shapes that do not fit and a classifier that is not frozen.
    """
    _check_pair(purifier, classifier)
    return Behind(purifier, classifier)


@dataclass(frozen=True)
class TotalVariation:
    """Chambolle's total-variation denoising of each image, by scikit-image: a filter without a usable gradient.

    weight : how much is smoothed; in the units of pixels in [0, 1]. Call it on images (n, h, w, c), NumPy or tensor.
    """

    weight: float
    randomised = False

    def __post_init__(self):
        check_positive(weight=self.weight)

    def __call__(self, x):
        """Smoothed images of the shape of `x`, a tensor without a gradient."""
        cleaned = tf.numpy_function(self._denoise, [x], tf.float32)
        return tf.ensure_shape(cleaned, x.shape)

    def unrolled(self, x, steps=30):
        """The first `steps` steps of the same iteration, written out: differentiable, and near enough to attack by."""
        return chambolle(x, self.weight, steps - 1)  # scikit-image counts the image itself as the first

    def _denoise(self, x):
        cleaned = [denoise_tv_chambolle(image, self.weight, channel_axis=-1) for image in x]
        return np.clip(np.stack(cleaned), 0, 1).astype("float32")  # a black background comes out at -6e-9


def composite_loss(purified, clean, logits, y, weight):
    """Restoration + weight * classification, (n,): mean squared error of the pixels, cross-entropy in nats."""
    restoration = tf.reduce_mean((purified - clean) ** 2, axis=(1, 2, 3))
    return restoration + weight * cross_entropy(logits, y)


def fit(purifier, classifier, x_in, x, y, *, weight, epochs, batch_size=32, learning_rate=1e-3, adversary=None,
        monitor=None, seed=0, label=None):
    """Train `purifier` in place with Adam on `composite_loss`, through the frozen `classifier` in test mode.

    Where the purifier ends in a ReLU, a gradient that leads upwards passes it below zero, too, in training: on images
    that are mostly black it falls below zero everywhere, has no gradient there, and the purifier draws black for ever.
    x_in, x : what the purifier is shown, and the clean images that it should give back; (n, h, w, c) float32 in [0, 1].
    y : labels (n,), every class among them. weight : of the classification loss; 0 is restoration alone.
    adversary : `training.Adversary`, who attacks every batch of `x_in` anew, through purifier and classifier as they
    are at that moment, or None. monitor : function(purifier) -> dict of numbers to record after every epoch, or None.
    label : text of the progress bar; None shows none. Returns a dict of lists, one value an epoch: "loss", and the
    monitor's.
    """
    check_images(x_in, "x_in")
    check_images(x)
    _check_pair(purifier, classifier)
    if x_in.shape != x.shape or x.shape[1:] != purifier.input_shape[1:]:
        raise ValueError(f"x_in {x_in.shape} and x {x.shape} should have one shape, the purifier's "
                         f"{purifier.input_shape[1:]}")
    if not (np.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight is {weight}; expected a finite number >= 0")
    classes = check_defence(as_defence(classifier), x)
    y = check_labels(y, len(x), classes)
    if missing := sorted(set(range(classes)) - set(y.tolist())):
        raise ValueError(f"y lacks the classes {missing} of {classes}; expected images of every class to train on")

    def whole(x):
        return classifier(purifier(x, training=False), training=False)

    draw = _awake(purifier)

    def losses_of(x_in, x, y, seed):
        if adversary is not None:
            attacked = adversary.craft(whole, x_in, y, seed)
            x_in, x, y = (_twice(x_in, attacked), _twice(x, x), _twice(y, y)) if adversary.mixed else (attacked, x, y)
        purified = draw(x_in)
        logits = classifier(purified, training=False)
        return composite_loss(purified, x, logits, y, weight), tf.argmax(logits, axis=1) == y

    history = training.descend(purifier, losses_of, (x_in, x, y), epochs=epochs, batch_size=batch_size, after=monitor,
                               learning_rate=learning_rate, owner=Behind(purifier, classifier), seed=seed, label=label)
    return {key: values for key, values in history.items() if key != "accuracy"}  # of the classifier on the batches


def _awake(purifier):
    """What the purifier gives in training, with `_waking` in the place of its last ReLU."""
    if not isinstance(purifier.layers[-1], layers.ReLU):
        return lambda x: purifier(x, training=True)
    before = keras.Model(purifier.inputs, purifier.layers[-1].input)
    return lambda x: _waking(before(x, training=True))


@tf.custom_gradient
def _waking(z):
    """ReLU, with a gradient below zero as well where it leads upwards."""
    return tf.nn.relu(z), lambda slope: tf.where((z > 0) | (slope < 0), slope, 0.0)


def _twice(one, other):
    return tf.concat([one, other], axis=0)


def keep_best(model, **measured):
    """A monitor of training that keeps the weights of the best epoch, and the dictionary in which it keeps them.

    measured : name -> (defence, x, y). The mean of the accuracies on these, validation images, is what has to rise.
    The monitor records each as "validation, <name>"; the dictionary holds "accuracy" and "weights".
    """
    best = {"accuracy": -1.0, "weights": model.get_weights()}

    def monitor(_):
        rates = {f"validation, {name}": float(right(*each).mean()) for name, each in measured.items()}
        mean = float(np.mean(list(rates.values())))
        if mean > best["accuracy"]:
            best.update(accuracy=mean, weights=model.get_weights())
        return rates

    return monitor, best


def resized(dataset, side):
    """`dataset` with its images scaled to `side` x `side` pixels, by area or, upwards, between the pixels."""
    check_positive(side=side)
    parts = {part: getattr(dataset, part) for part in ("x_train", "x_val", "x_test")}
    return replace(dataset, **{part: np.clip(tf.image.resize(x, (side, side), antialias=True).numpy(), 0, 1)
                               for part, x in parts.items() if x is not None})


def right(defence, x, y, batch_size=50):
    """Which images a defence classifies as `y`, (n,) bool. `x` may leave [0, 1], as purified images do.

    With more than 50 images at once the maps of a deep network no longer fit a processor's cache.
    """
    logits = predict(as_defence(defence), x, batch_size).logits
    check_numbers(logits)
    return logits.argmax(axis=1) == y


# ── Purification as a detector ──

MEASURES = ("distance", "divergence")


@dataclass(frozen=True, eq=False)
class Residual:
    """Purifier and classifier that refuse an image of which the purifier takes too much (MagNet, Meng & Chen 2017).

    measure : of the residual. "distance" is the root mean square of x - P(x); "divergence" is Jensen's and Shannon's,
    in nats, between the classifier's probabilities for x and for P(x). threshold : above which an image is refused.
    """

    purifier: keras.Model
    classifier: keras.Model
    measure: str
    threshold: float
    randomised = False

    def __post_init__(self):
        known("measure", self.measure, MEASURES)
        check_positive(threshold=self.threshold)

    def __call__(self, x):
        """Logits of the purified image; the refusal is the logarithm of residual over threshold."""
        x = tf.convert_to_tensor(x)
        purified = inference(self.purifier)(x)
        logits = inference(self.classifier)(purified)
        if self.measure == "distance":
            size = tf.sqrt(tf.reduce_mean((x - purified) ** 2, axis=(1, 2, 3)) + 1e-12)
        else:
            size = _divergence(inference(self.classifier)(x), logits)
        return Outputs(logits, tf.math.log(size / self.threshold))

    def paths(self, seed=0):
        """Without the detector, which knows nothing of it; and the whole."""
        return {"unaware": Path(defended(self.purifier, self.classifier)), "exact": Path(self)}

    def as_float64(self):
        """The same in float64."""
        return Residual(as_float64(self.purifier), as_float64(self.classifier), self.measure, self.threshold)


def _divergence(a, b):
    """Jensen-Shannon divergence of two rows of logits, (n,), in nats; never 0, so that its logarithm is finite."""
    a, b = tf.nn.log_softmax(a), tf.nn.log_softmax(b)
    middle = tf.reduce_logsumexp(tf.stack([a, b]), axis=0) - np.log(2)
    each = [tf.reduce_sum(tf.exp(p) * (p - middle), axis=1) for p in (a, b)]
    return tf.maximum(sum(each) / 2, 0) + 1e-9


def residual(purifier, classifier, measure, x, rejects=0.05, batch_size=50):
    """A `Residual` that refuses the share `rejects` of the clean images `x`, which should be validation images."""
    if not 0 < rejects < 1:
        raise ValueError(f"rejects is {rejects}; expected a share above 0 and below 1")
    check_images(x)
    _check_pair(purifier, classifier)
    whole = Residual(purifier, classifier, measure, 1.0)
    sizes = np.exp(predict(whole, x, batch_size).refusal)
    return Residual(purifier, classifier, measure, float(np.quantile(sizes, 1 - rejects)))


# ── Intervals ──


def interval(values, groups, *, statistic=np.mean, draws=2000, confidence=0.95, seed=0):
    """`statistic` of the means over seeds and images, and its interval by a hierarchical bootstrap.

    values : one array a network, (..., seeds, n): of each seed and image, of any number of measures on them. Networks
    are drawn, then seeds of each, then whole groups of images, the same for all. groups : (n,), whose images are not
    independent, such as tiles; images of one group stay together.
    statistic : of the means (..., ) over the networks drawn; with the default the plain mean.
    Returns (value, low, high), floats; draws in which the statistic is not finite are left out.
    """
    values = [np.asarray(each, float) for each in values]
    groups = np.asarray(groups)
    if not values or any(each.ndim < 2 or each.shape[-1:] != groups.shape for each in values):
        raise ValueError(f"values have shapes {[each.shape for each in values]} and groups {groups.shape}; expected "
                         "one array (..., seeds, n) or more, and (n,)")
    rng, (_, at) = np.random.default_rng(seed), np.unique(groups, return_inverse=True)
    sizes = np.bincount(at)
    sums = [np.apply_along_axis(lambda row: np.bincount(at, row), -1, each) for each in values]

    def measured(networks, weights):
        means = [(each @ weights).mean(axis=-1) / (sizes @ weights) for each in networks]
        return statistic(np.mean(means, axis=0))

    def drawn():
        networks = [sums[i] for i in rng.integers(len(sums), size=len(sums))]
        weights = np.bincount(rng.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        return measured([each[..., rng.integers(each.shape[-2], size=each.shape[-2]), :] for each in networks], weights)

    found, tails = np.array([drawn() for _ in range(draws)]), (1 - confidence) / 2
    low, high = np.quantile(found[np.isfinite(found)], [tails, 1 - tails]) if np.isfinite(found).any() else [np.nan] * 2
    return float(measured(sums, np.ones(len(sizes)))), float(low), float(high)


def won_back(rates):
    """Share of the lost accuracy that a defence wins back, of (clean, attacked, defended); NaN where nothing is lost.

    Above 1 where the defended accuracy exceeds the clean one.
    """
    clean, attacked, defended = rates
    return (defended - attacked) / (clean - attacked) if clean - attacked > 1e-9 else np.nan
