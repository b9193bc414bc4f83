"""Filters in front of a network: Gaussian and median (paper 03, Section 3.1), and as cheap baselines JPEG, few bits and
total variation.

`gaussian`, `median`, `jpeg`, `bits` and `total_variation` take and give tensors (n, h, w, c) in [0, 1] and check
nothing; `Filter` is the same as a layer, which checks its arguments and can be saved with a network. `surrogates` are
functions like a filter whose gradient an attacker may take for the filter's.
At the border images are mirrored, with the edge pixel repeated: the mode "reflect" of SciPy and scikit-image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import keras
import numpy as np
import scipy.fft
import tensorflow as tf

from helpers import attacks
from helpers.checks import check_grid, check_images, known
from helpers.defence import Behind, Path, StraightThrough, answers
from helpers.models import graph_of, predict
from helpers.threat import ThreatModel

TRUNCATE = 4.0  # standard deviations after which the Gaussian kernel ends, as in SciPy
TV_STEPS = 20  # of Chambolle's iteration


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
    window, value = _windows(x, size)
    chosen = tf.cast(window == value[..., None], x.dtype)
    passed = tf.reduce_sum(window * chosen, axis=-1) / tf.reduce_sum(chosen, axis=-1)
    return value + (passed - tf.stop_gradient(passed))


def soft_median(x, size, width=0.02):
    """The median, whose gradient goes to all pixels of the window within about `width` of it, and not to one alone."""
    window, value = _windows(x, size)
    weight = tf.stop_gradient(tf.nn.softmax(-0.5 * ((window - value[..., None]) / width) ** 2, axis=-1))
    passed = tf.reduce_sum(window * weight, axis=-1)
    return value + (passed - tf.stop_gradient(passed))


def _windows(x, size):
    """The pixels around each pixel, (n, h, w, c, size^2), and their medians (n, h, w, c), without a gradient."""
    height, width = x.shape[1:3]
    mirrored = _mirrored(x, size // 2)
    window = tf.stack([mirrored[:, i : i + height, j : j + width] for i in range(size) for j in range(size)], axis=-1)
    middle = size**2 // 2
    value = tf.numpy_function(lambda w: np.partition(w, middle)[..., middle], [tf.stop_gradient(window)], x.dtype)
    value.set_shape(x.shape)
    return window, value


def total_variation(x, weight):
    """Images near `x` with less total variation: `TV_STEPS` steps of `chambolle`, in [0, 1].

    weight : of the total variation; larger is flatter. Its gradient is that of the steps.
    """
    return tf.clip_by_value(chambolle(x, weight, TV_STEPS), 0, 1)


def chambolle(x, weight, steps):
    """`steps` of Chambolle's iteration (2004) for total variation, as in scikit-image; may leave [0, 1] by rounding."""
    p_down, p_right = tf.zeros_like(x), tf.zeros_like(x)
    out = x
    for step in range(steps):
        if step:
            out = x + _divergence(p_down, p_right)
        down = tf.pad(out[:, 1:] - out[:, :-1], ((0, 0), (0, 1), (0, 0), (0, 0)))
        right = tf.pad(out[:, :, 1:] - out[:, :, :-1], ((0, 0), (0, 0), (0, 1), (0, 0)))
        length = tf.sqrt(down**2 + right**2 + 1e-12)  # the root has no derivative at 0
        p_down, p_right = ((p - 0.25 * g) / (1 + 0.25 / weight * length)
                           for p, g in ((p_down, down), (p_right, right)))
    return x + _divergence(p_down, p_right)


def _divergence(p_down, p_right):
    """Minus the divergence of a field, whose last row and column are 0 in its direction."""
    above = tf.pad(p_down[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    left = tf.pad(p_right[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    return above + left - p_down - p_right


def jpeg(x, quality):
    """Encode as JPEG of `quality` 1 ... 100 and decode; grey or colour, no gradient."""
    images = tf.map_fn(lambda image: tf.image.adjust_jpeg_quality(image, quality), tf.cast(x, tf.float32))
    return tf.ensure_shape(tf.cast(images, x.dtype), x.shape)


def bits(x, depth):
    """Round to 2^`depth` grey levels from 0 to 1; the gradient is zero."""
    return tf.round(x * (2**depth - 1)) / (2**depth - 1)


def soft_bits(x, depth, share=0.5):
    """`bits` as a smooth staircase: steep between two grey levels, and on them with `share` of the slope of x."""
    scaled = x * (2**depth - 1)
    soft = scaled - (1 - share) * tf.sin(2 * np.pi * scaled) / (2 * np.pi)
    return soft / (2**depth - 1)


# Quantisation of the 8 x 8 cosine coefficients at quality 50: ITU-T T.81 (1992), Tables K.1 and K.2.
_LUMINANCE = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
_CHROMINANCE = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def _cubic(whole, rest):
    return whole + rest**3


def _mixed(whole, rest):
    return whole + (rest**3 + rest) / 2


def _sine(whole, rest):
    return whole + rest - tf.sin(2 * np.pi * rest) / (2 * np.pi)


def _kept(whole, rest):
    return whole + tf.where(whole != 0, rest, tf.zeros_like(rest))


def jpeg_like(x, quality, rounding=_cubic):
    """JPEG as a differentiable function (Shin and Song 2017): rounding is replaced by a cubic that is flat on integers.

    Its gradient tells an attacker which coefficients the file keeps. Colour is halved in size, as by `jpeg`.
    rounding : function of a coefficient's whole part and the rest, which gives what stands for the whole part.
    """
    height, width, channels = x.shape[1:]
    rows, columns = (np.pad(np.arange(side), (0, -side % 16), "symmetric") for side in (height, width))
    x = tf.gather(tf.gather(255 * x, rows, axis=1), columns, axis=2)  # tf.pad cannot double a side and more
    if channels == 1:
        x = _quantised(x - 128, _LUMINANCE, quality, rounding) + 128
    else:
        plane = tf.tensordot(x, tf.constant(_YCBCR.T, x.dtype), 1) - tf.constant([128, 0, 0], x.dtype)
        small = _quantised(tf.nn.avg_pool2d(plane[..., 1:], 2, 2, "VALID"), _CHROMINANCE, quality, rounding)
        colour = tf.repeat(tf.repeat(small, 2, axis=1), 2, axis=2)
        plane = tf.concat([_quantised(plane[..., :1], _LUMINANCE, quality, rounding) + 128, colour], axis=-1)
        x = tf.tensordot(plane, tf.constant(np.linalg.inv(_YCBCR).T, x.dtype), 1)
    return tf.clip_by_value(x[:, :height, :width] / 255, 0, 1)


def _quantised(plane, table, quality, rounding):
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
    blocks = tf.transpose(cosine) @ (step * rounding(whole, coefficients - whole)) @ cosine
    return tf.reshape(tf.transpose(blocks, (0, 1, 4, 2, 5, 3)), (n, h, w, c))


FILTERS = {"gaussian": gaussian, "median": median, "jpeg": jpeg, "bits": bits, "tv": total_variation}


def surrogates(kind, value):
    """Functions of images whose gradient may be taken for the filter's, name -> function, the simple ones first."""
    value = _checked(known("kind", kind, FILTERS), value)
    own = {"gaussian": {"exact": gaussian}, "median": {"soft": soft_median, "exact": median},
           "jpeg": {"kept": partial(jpeg_like, rounding=_kept), "mixed": partial(jpeg_like, rounding=_mixed),
                    "cubic": jpeg_like},
           "bits": {"staircase": soft_bits}, "tv": {"exact": total_variation}}[kind]
    return {"identity": tf.identity, "smooth": partial(gaussian, sigma=1.0)} | {
        name: _of(function, value) for name, function in own.items()}


def held_back(kind, value):
    """More of them, which `surrogates` leaves out: what would the next one add? {} where there is none."""
    value = _checked(known("kind", kind, FILTERS), value)
    own = {"median": {"softer": partial(soft_median, width=0.1)}, "bits": {"steeper": partial(soft_bits, share=0.1)},
           "jpeg": {"sine": partial(jpeg_like, rounding=_sine)}}
    return {name: _of(function, value) for name, function in own.get(kind, {}).items()}


def _of(function, value):
    return lambda x: function(x, value)


@keras.saving.register_keras_serializable("helpers")
class Filter(keras.layers.Layer):
    """A filter as a layer, with the gradient of its function.

    kind, value : "gaussian" and sigma in pixels, 0 for no filter; "median" and the odd size of its window; "jpeg" and
        a quality 1 ... 100; "bits" and a depth 1 ... 8; "tv" and a weight of the total variation, above 0.
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
    lowest, highest = {"gaussian": (0, np.inf), "median": (1, np.inf), "jpeg": (1, 100), "bits": (1, 8),
                       "tv": (1e-6, np.inf)}[kind]
    whole = kind in ("gaussian", "tv") or float(value).is_integer()
    if not (whole and lowest <= value <= highest and np.isfinite(value)) or (kind == "median" and value % 2 == 0):
        expected = {"gaussian": "a finite standard deviation >= 0, in pixels", "median": "an odd window size >= 1",
                    "jpeg": "a quality from 1 to 100", "bits": "a depth from 1 to 8",
                    "tv": "a finite weight > 0"}[kind]
        raise ValueError(f"value is {value} for the filter {kind!r}; expected {expected}")
    return float(value) if kind in ("gaussian", "tv") else int(value)


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
    return Behind(layer, network, exact=kind in ("gaussian", "median", "tv"), instead=instead)


@dataclass(frozen=True, eq=False)
class Filtered(Behind):
    """A network behind a filter that is attacked by every one of its `surrogates`, name -> function, as well."""

    surrogates: Mapping = field(default_factory=dict)

    def paths(self, seed=0):
        """The network alone, and the filter with the gradient of each surrogate in turn."""
        ways = {"unaware": super().paths(seed)["unaware"]}
        for name, instead in self.surrogates.items():
            build = partial(StraightThrough, self.before, self.network, instead)
            exact = name == "exact" and self.exact
            ways[name] = Path(self if exact else graph_of(self, ("surrogate", name), build))
        return ways


def attacked(network, kind, value, spare=False):
    """`defend` with a path for each of the filter's `surrogates`, for an attacker who tries them all.

    spare : whether those that are `held_back` come after them.
    """
    plain, tried = defend(network, kind, value), surrogates(kind, value)
    tried |= held_back(kind, value) if spare else {}
    return Filtered(plain.before, plain.network, plain.exact, plain.instead, tried)


def power_by_frequency(change):
    """Power of changes (n, h, w, c), h = w, by frequency in rings from 0 to 1/2 cycles a pixel, white noise being 1.

    Each change is scaled to unit length first. The last ring holds the corners as well. Returns (h // 2 + 1,) float64.
    """
    side = change.shape[1]
    power = (np.abs(np.fft.fft2(change, axes=(1, 2))) ** 2).sum(axis=3)
    share = power / np.maximum(power.mean(axis=(1, 2), keepdims=True), 1e-30)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    ring = np.minimum((frequency * side).round().astype(int), side // 2).ravel()
    return np.bincount(ring, share.mean(axis=0).ravel()) / np.bincount(ring)


def survivors(defence, grid, x, y, *, names, steps=20, losses=("margin", "cross-entropy"), seed=0):
    """Which images stand in l-infinity balls as one path after another is tried, for images that may be stored.

    names : of the defence's paths, in the order in which they are added; each attacks by PGD, once with every loss,
        what the paths before it have left, from where it got to at the last eps.
    grid : rising eps values > 0.

    Returns
    -------
    (paths, eps, n) bool, who stands after each path was added, and (eps, n) bool, who stands on the best images when
    they are rounded to 8 bits.
    """
    check_grid(grid, ">")
    paths = defence.paths(seed)
    chosen = [paths[known("names", name, paths)] for name in names]
    clean = attacks.evasion(answers(defence, x), y).numpy() <= 0
    standing, stored = np.tile(clean, (len(names), len(grid), 1)), np.tile(clean, (len(grid), 1))
    starts = [x.copy() for _ in names]
    for e, eps in enumerate(grid):
        threat, left, best = ThreatModel("linf", float(eps)), clean.copy(), x.copy()
        if e:  # beaten in a smaller ball
            stored[e] &= stored[e - 1]
        for p, path in enumerate(chosen):
            rows = np.flatnonzero(left & standing[p, max(0, e - 1)])
            if rows.size:
                found = attacks.pgd(defence, x[rows], y[rows], threat, path=path, steps=steps, restarts=len(losses),
                                    losses=losses, start=starts[p][rows] if e else None, compact=True, seed=seed)
                starts[p][rows], best[rows] = found.images, found.images
                left[rows] = found.value <= 0
            left &= standing[p, max(0, e - 1)]
            standing[p, e] = left
        rounded = (np.rint(255 * best) / 255).astype("float32")
        stored[e] &= attacks.evasion(answers(defence, rounded), y).numpy() <= 0
    return standing, stored


def _mirrored(x, reach):
    return tf.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)], "SYMMETRIC")
