"""What the attacker may do: a norm, a radius and the range of valid pixels."""

from dataclasses import dataclass
from numbers import Real

import numpy as np
import tensorflow as tf

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps` of the original, in one norm, that are still valid images.

    norm : "linf" (largest change of a pixel) or "l2" (Euclidean length of the whole change).
    eps : radius in pixel units of [0, 1]; 0.1 is 25.5/255. Infinity allows every valid image.
    bounds : (lowest, highest) value of a valid pixel.
    Raises ValueError for another norm, empty bounds, an `eps` that is negative, NaN or (linf) in 0-255 units.
    """

    norm: str
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; expected one of {NORMS}")
        if not isinstance(self.eps, Real) or not self.eps >= 0:
            raise ValueError(f"eps is {self.eps!s:.80}; expected a number >= 0, in [0, 1] pixel units")
        low, high = (float(bound) for bound in self.bounds)
        object.__setattr__(self, "bounds", (low, high))  # a tuple, so that compiled graphs can be kept by it
        if not low < high:
            raise ValueError(f"bounds are {self.bounds}; expected (low, high) with low < high")
        if self.norm == "linf" and high - low < self.eps < np.inf:
            raise ValueError(f"eps is {self.eps}, more than the pixel range {high - low}; is it in 0-255 units?")

    def radius(self, shape):
        """`eps`, or the largest distance between two valid images of `shape` (h, w, c) where that is less."""
        return min(self.eps, diameter(shape, self.norm, self.bounds))

    def project(self, x_adv, x):
        """Pull `x_adv` (n, h, w, c) into the ball around `x` and clip it to the bounds; a TensorFlow tensor."""
        return projection(x, self.norm, self.eps, self.bounds)(x_adv)

    def random_start(self, x, seed):
        """Points drawn uniformly from the ball around each image and clipped to the bounds, (n, h, w, c) float32."""
        rng, eps = np.random.default_rng(seed), self.radius(x.shape[1:])
        if self.norm == "linf":
            delta = rng.uniform(-eps, eps, x.shape)
        else:  # a direction from the normal distribution, a radius with density r^(d-1)
            delta = rng.standard_normal(x.shape)
            delta *= _stretch(delta, eps * rng.uniform(size=len(x)) ** (1 / x[0].size))
        return np.clip(x + delta, *self.bounds).astype("float32")

    def noise(self, x, seed=0):
        """Images with noise of the full length `eps`, clipped to the bounds: what an attack has to be better than."""
        return noise(x, self.norm, self.eps, self.bounds, seed)

    def distance(self, x_adv, x):
        """Distance of each pair of images in this norm, (n,) float64, from the arrays themselves."""
        return _distance(x_adv, x, self.norm)

    def contains(self, x_adv, x):
        """Which images are valid and within `eps` of the originals but for rounding in float32, (n,) bool.

        A pixel is rounded by half a unit in the last place, in x + change and in the limits; an l2 length adds up.
        """
        rounding = np.finfo("float32").eps * (2 if self.norm == "linf" else (1 + self.eps) * x[0].size ** 0.5)
        flat = np.asarray(x_adv).reshape(len(x), -1)
        valid = (flat.min(axis=1) >= np.float32(self.bounds[0])) & (flat.max(axis=1) <= np.float32(self.bounds[1]))
        return valid & (self.distance(x_adv, x) <= self.eps + rounding)


def noise(x, norm, eps, bounds=(0.0, 1.0), seed=0):
    """Images `x` (n, h, w, c) with noise of length `eps`, one number or one an image (n,); float32, within `bounds`.

    linf: every pixel moves by +eps or -eps; l2: in a direction that is uniform on the sphere. Then it is clipped, so
    that it is shorter where a pixel has no room.
    """
    rng = np.random.default_rng(seed)
    if norm == "linf":
        delta = np.sign(rng.uniform(-1, 1, x.shape)).astype("float32") * np.float32(eps).reshape(-1, 1, 1, 1)
    else:
        delta = rng.standard_normal(x.shape)
        delta *= _stretch(delta, eps)
    return np.clip(x + delta, *bounds).astype("float32")


def along(x, direction, length, norm, bounds=(0.0, 1.0)):
    """Images `x` (n, h, w, c), each moved along its `direction` until it is `length`, a number or (n,), away; float32.

    The length is that *after* clipping, which shortens: the way there is found by bisection. Where the bounds leave no
    room for it, it is as long as it can be.
    """
    def moved(factor):
        return np.clip(x + factor.reshape(-1, 1, 1, 1) * direction, *bounds).astype("float32")

    low = np.zeros(len(x))
    high = 1e4 * (bounds[1] - bounds[0]) / np.abs(direction).reshape(len(x), -1).max(axis=1)
    for _ in range(60):
        middle = (low + high) / 2
        fits = _distance(moved(middle), x, norm) <= length
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return moved(low)


def _distance(x_adv, x, norm):
    delta = (np.asarray(x_adv, "float64") - np.asarray(x, "float64")).reshape(len(x), -1)
    return np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)


def _stretch(delta, length):
    """Factors (n, 1, 1, 1) that give each of `delta` (n, h, w, c) its Euclidean `length`."""
    return (length / np.linalg.norm(delta.reshape(len(delta), -1), axis=1)).reshape(-1, 1, 1, 1)


def diameter(shape, norm, bounds):
    """Largest distance between two valid images of `shape` (h, w, c): a ball of that radius holds all of them."""
    pixel = bounds[1] - bounds[0]
    return float(pixel if norm == "linf" else pixel * np.sqrt(np.prod(shape)))


def projection(x, norm, eps, bounds):
    """`ThreatModel.project` for these `x` as a function of `x_adv`, in a compiled graph where `eps` is a tensor too."""
    if norm == "linf":  # a loop finds the limits only once
        low, high = tf.maximum(x - eps, bounds[0]), tf.minimum(x + eps, bounds[1])
        return lambda x_adv: tf.clip_by_value(x_adv, low, high)

    def into_ball(x_adv):
        delta = x_adv - x
        length = tf.sqrt(tf.reduce_sum(delta**2, axis=(1, 2, 3), keepdims=True))
        # x lies within the bounds, so clipping moves every pixel towards x and never leaves the ball.
        return tf.clip_by_value(x + delta * tf.minimum(1.0, eps / tf.maximum(length, 1e-12)), *bounds)

    return into_ball


def lengths(change, norm):
    """Length of each change (n, h, w, c) in this norm, (n,); a TensorFlow tensor."""
    if norm == "linf":
        return tf.reduce_max(tf.abs(change), axis=(1, 2, 3))
    return tf.sqrt(tf.reduce_sum(change**2, axis=(1, 2, 3)))


def onto_plane(x, normal, gap, norm, bounds):
    """Smallest change of each `x` (n, h, w, c) within the bounds whose product with `normal` is `gap` (n,), in a graph.

    Where the bounds leave no such change it is the one that comes nearest. Exact but for rounding: every pixel goes
    towards its bound at a speed, |normal| in l2 and 1 in linf, until it is there. What this adds up to is a concave and
    piecewise linear function of time, on which Newton's steps from 0 reach the gap from below, a kink or more a step.
    """
    scale = tf.maximum(tf.reduce_max(tf.abs(normal), axis=(1, 2, 3), keepdims=True), 1e-30)
    weight, wanted = tf.abs(normal / scale), tf.abs(gap)[:, None, None, None] / scale
    towards = tf.sign(normal) * tf.sign(gap)[:, None, None, None]
    room = tf.where(towards > 0, bounds[1] - x, x - bounds[0]) * tf.abs(towards)
    speed = weight if norm == "l2" else tf.ones_like(weight)

    def missing(time):
        return wanted - tf.reduce_sum(weight * tf.minimum(time * speed, room), axis=(1, 2, 3), keepdims=True)

    def newton(time, step):
        free = tf.cast(time * speed < room, time.dtype)
        slope = tf.reduce_sum(free * weight * speed, axis=(1, 2, 3), keepdims=True)
        step = tf.math.divide_no_nan(tf.maximum(missing(time), 0.0), slope)
        return time + step, step

    def moving(time, step):
        return tf.reduce_any(step > 1e-6 * time)

    start = tf.zeros_like(wanted)
    time, _ = tf.while_loop(moving, newton, newton(start, start), maximum_iterations=50)
    return towards * tf.minimum(time * speed, room)
