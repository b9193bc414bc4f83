"""Filters in front of a network: Gaussian and median (paper 03, Section 3.1), and as cheap baselines JPEG and few bits.

`gaussian`, `median`, `jpeg` and `bits` take and give tensors (n, h, w, c) in [0, 1] and check nothing; `Filter` is the
same as a layer, which checks its arguments and can be saved with a network.
At the border images are mirrored, with the edge pixel repeated: the mode "reflect" of SciPy and scikit-image.
"""

import keras
import numpy as np
import tensorflow as tf

from helpers.checks import check_images, known
from helpers.defence import Behind
from helpers.models import predict

TRUNCATE = 4.0  # standard deviations after which the Gaussian kernel ends, as in SciPy


def radius(sigma):
    """Pixels to each side that the Gaussian kernel of standard deviation `sigma` (pixels) reaches."""
    return int(TRUNCATE * sigma + 0.5)


def gaussian(x, sigma):
    """Convolve every channel with a Gaussian of standard deviation `sigma` pixels: first columns, then rows."""
    if sigma == 0:
        return x
    reach = radius(sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = tf.constant(np.tile((kernel / kernel.sum())[:, None, None, None], (1, 1, x.shape[-1], 1)), x.dtype)
    x = tf.nn.depthwise_conv2d(_mirrored(x, reach), kernel, (1, 1, 1, 1), "VALID")
    return tf.nn.depthwise_conv2d(x, tf.transpose(kernel, (1, 0, 2, 3)), (1, 1, 1, 1), "VALID")


def median(x, size):
    """Replace every pixel by the median of the `size` x `size` window around it, in each channel.

    Its gradient is that of sorting: it goes to the pixel that is the median, in equal parts where several are.
    """
    height, width = x.shape[1:3]
    mirrored = _mirrored(x, size // 2)
    window = tf.stack([mirrored[:, i : i + height, j : j + width] for i in range(size) for j in range(size)], axis=-1)
    middle = size**2 // 2
    value = tf.numpy_function(lambda w: np.partition(w, middle)[..., middle], [tf.stop_gradient(window)], x.dtype)
    value.set_shape(x.shape)
    chosen = tf.cast(window == value[..., None], x.dtype)
    passed = tf.reduce_sum(window * chosen, axis=-1) / tf.reduce_sum(chosen, axis=-1)
    return value + (passed - tf.stop_gradient(passed))


def jpeg(x, quality):
    """Encode as JPEG of `quality` 1 ... 100 and decode; grey or colour, no gradient."""
    images = tf.map_fn(lambda image: tf.image.adjust_jpeg_quality(image, quality), tf.cast(x, tf.float32))
    return tf.ensure_shape(tf.cast(images, x.dtype), x.shape)


def bits(x, depth):
    """Round to 2^`depth` grey levels from 0 to 1; the gradient is zero."""
    return tf.round(x * (2**depth - 1)) / (2**depth - 1)


FILTERS = {"gaussian": gaussian, "median": median, "jpeg": jpeg, "bits": bits}


@keras.saving.register_keras_serializable("helpers")
class Filter(keras.layers.Layer):
    """A filter as a layer, with the gradient of its function.

    kind, value : "gaussian" and sigma in pixels, 0 for no filter; "median" and the odd size of its window; "jpeg" and
        a quality 1 ... 100; "bits" and a depth 1 ... 8.
    Raises ValueError for other values, and for a window that reaches further than the image is wide.
    """

    def __init__(self, kind, value, **options):
        super().__init__(**options)
        self.kind, self.value = known("kind", kind, FILTERS), _checked(kind, value)

    def build(self, shape):
        """Compare the window with the image."""
        reach = {"gaussian": radius, "median": lambda size: size // 2}.get(self.kind, lambda value: 0)(self.value)
        if reach > min(shape[1:3]) or (self.kind == "median" and self.value > min(shape[1:3])):
            raise ValueError(f"value: {self.kind} {self.value} reaches {reach} pixels to each side; expected at most "
                             f"the size of the image, {shape[1]} x {shape[2]}")

    def call(self, x):
        """Filter the images."""
        return FILTERS[self.kind](x, self.value)

    def compute_output_shape(self, shape):
        """Shape of the images, which does not change."""
        return shape

    def get_config(self):
        """Arguments, for saving."""
        return super().get_config() | {"kind": self.kind, "value": self.value}


def _checked(kind, value):
    lowest, highest = {"gaussian": (0, np.inf), "median": (1, np.inf), "jpeg": (1, 100), "bits": (1, 8)}[kind]
    whole = kind == "gaussian" or float(value).is_integer()
    if not (whole and lowest <= value <= highest and np.isfinite(value)) or (kind == "median" and value % 2 == 0):
        expected = {"gaussian": "a finite standard deviation >= 0, in pixels", "median": "an odd window size >= 1",
                    "jpeg": "a quality from 1 to 100", "bits": "a depth from 1 to 8"}[kind]  # fmt: skip
        raise ValueError(f"value is {value} for the filter {kind!r}; expected {expected}")
    return float(value) if kind == "gaussian" else int(value)


def apply(x, kind, value, batch_size=100):
    """Filtered images like `x`, a float32 array (n, h, w, c) in [0, 1] of any length: it goes in batches."""
    check_images(x)
    layer = Filter(kind, value)
    layer.build(x.shape)  # here, so that a window that is too large is an error of its own, not one of a graph
    return np.clip(predict(layer, x, batch_size), 0, 1)


def defend(network, kind, value):
    """The filter in front of `network`, a Keras network from images of a fixed size to logits, as a `defence.Behind`.

    Its paths: "unaware", "exact" where the filter has a gradient, and "BPDA".
    """
    layer = Filter(kind, value)
    layer.build((None, *network.input_shape[1:]))  # here, so that a window that is too large is an error of its own
    return Behind(layer, network, exact=kind in ("gaussian", "median"))


def _mirrored(x, reach):
    return tf.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)], "SYMMETRIC")
