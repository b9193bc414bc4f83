"""Filters in front of a network: Gaussian and median (paper 03, Section 3.1), and as cheap baselines JPEG and few bits.

`gaussian`, `median`, `jpeg` and `bits` take and give tensors (n, h, w, c) in [0, 1] and check nothing; `Filter` is the
same as a layer, which checks its arguments and can be saved with a network.
At the border images are mirrored, with the edge pixel repeated: the mode "reflect" of SciPy and scikit-image.
"""

from functools import partial

import keras
import numpy as np
import scipy.fft
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


# Quantisation of the 8 x 8 cosine coefficients at quality 50: ITU-T T.81 (1992), Tables K.1 and K.2.
_LUMINANCE = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
_CHROMINANCE = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def jpeg_like(x, quality):
    """JPEG as a differentiable function (Shin and Song 2017): rounding is replaced by a cubic that is flat on integers.

    Its gradient tells an attacker which coefficients the file keeps. Colour is halved in size, as by `jpeg`.
    """
    height, width, channels = x.shape[1:]
    rows, columns = (np.pad(np.arange(side), (0, -side % 16), "symmetric") for side in (height, width))
    x = tf.gather(tf.gather(255 * x, rows, axis=1), columns, axis=2)  # tf.pad cannot double a side and more
    if channels == 1:
        x = _quantised(x - 128, _LUMINANCE, quality) + 128
    else:
        plane = tf.tensordot(x, tf.constant(_YCBCR.T, x.dtype), 1) - tf.constant([128, 0, 0], x.dtype)
        small = _quantised(tf.nn.avg_pool2d(plane[..., 1:], 2, 2, "VALID"), _CHROMINANCE, quality)
        colour = tf.repeat(tf.repeat(small, 2, axis=1), 2, axis=2)
        plane = tf.concat([_quantised(plane[..., :1], _LUMINANCE, quality) + 128, colour], axis=-1)
        x = tf.tensordot(plane, tf.constant(np.linalg.inv(_YCBCR).T, x.dtype), 1)
    return tf.clip_by_value(x[:, :height, :width] / 255, 0, 1)


def _quantised(plane, table, quality):
    """Planes (n, h, w, c) after the cosine transform of each block of 8 x 8, soft rounding, and the way back."""
    n, (h, w, c) = tf.shape(plane)[0], plane.shape[1:]
    h, w = -(-h // 8) * 8, -(-w // 8) * 8
    plane = tf.pad(plane, ((0, 0), (0, h - plane.shape[1]), (0, w - plane.shape[2]), (0, 0)), "SYMMETRIC")
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    step = np.clip(np.floor((np.array(table.split(), float) * scale + 50) / 100), 1, 255).reshape(8, 8)
    cosine = tf.constant(scipy.fft.dct(np.eye(8), axis=0, norm="ortho"), plane.dtype)
    step = tf.constant(step, plane.dtype)
    blocks = tf.transpose(tf.reshape(plane, (n, h // 8, 8, w // 8, 8, c)), (0, 1, 3, 5, 2, 4))
    coefficients = cosine @ blocks @ tf.transpose(cosine) / step
    whole = tf.stop_gradient(tf.round(coefficients))
    blocks = tf.transpose(cosine) @ (step * (whole + (coefficients - whole) ** 3)) @ cosine
    return tf.reshape(tf.transpose(blocks, (0, 1, 4, 2, 5, 3)), (n, h, w, c))


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
                    "jpeg": "a quality from 1 to 100", "bits": "a depth from 1 to 8"}[kind]
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

    Its paths: "unaware", "exact" where the filter has a gradient, "BPDA", and for JPEG "approximated", by `jpeg_like`.
    """
    layer = Filter(kind, value)
    layer.build((None, *network.input_shape[1:]))  # here, so that a window that is too large is an error of its own
    instead = partial(jpeg_like, quality=layer.value) if kind == "jpeg" else None
    return Behind(layer, network, exact=kind in ("gaussian", "median"), instead=instead)


def _mirrored(x, reach):
    return tf.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)], "SYMMETRIC")
