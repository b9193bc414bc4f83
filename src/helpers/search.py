"""What attacks share: the input gradient, what was found, and the checks at their door."""

from functools import partial
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from helpers.checks import check_images, check_labels, check_positive, check_seed
from helpers.defence import as_defence, check_defence, check_numbers, check_outputs, way
from helpers.losses import evasion, reached
from helpers.models import graph_of, predict, randomised

DRAWS = 9  # of a random defence, on which an image has won if it wins on most of them


def input_gradient(network, loss, x, y):
    """Gradient by the images `x` of `loss(network(x), y)`, zero where nothing connects; the losses; the outputs."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = network(x)
        losses = loss(outputs, y)
    return tape.gradient(losses, x, unconnected_gradients="zero"), losses, outputs


class Found(NamedTuple):
    """What an attack found.

    images : the best image of each by the goal, (n, h, w, c) float32, within the threat model.
    value : the goal's value of what is deployed there, (n,) float32, above 0 where the attack has won.
    steps : how many gradients or queries each image took, (n,) int.
    """

    images: np.ndarray
    value: np.ndarray
    steps: np.ndarray

    def offer(self, images, value, at):
        """Let those of `images` with a higher value replace the rows `at`."""
        better = value > self.value[at]
        self.images[at[better]], self.value[at[better]] = images[better], value[better]

    def left(self):
        """Rows of the images that are not beaten."""
        return np.flatnonzero(self.value <= 0)


class Aim(NamedTuple):
    """What an attack is made on, checked: the deployed `defence`, the `path` to it, and the `goal` to reach.

    goal : function (Outputs, labels) -> (n,), above 0 where an image has won.
    descend : whether the labels are wanted ones, and losses go down.
    """

    defence: object
    path: object
    goal: object
    descend: bool
    batch_size: int

    @property
    def direct(self):
        """Whether the path is what is deployed, so that what wins there has won."""
        return self.path.outputs is self.defence and not randomised(self.defence)

    def values(self, x, y):
        """The goal's value of what is deployed at `x`, (n,) float32; of a random defence the median of its draws."""
        check_finite(x)
        draws = [self.goal(single(predict(self.defence, x, self.batch_size)), y).numpy()
                 for _ in range(DRAWS if randomised(self.defence) else 1)]
        check_numbers(draws)
        return np.median(draws, axis=0).astype("float32")

    def offer(self, found, images, y, at):
        """Try `images`, the rows `at`, on what is deployed where nothing has won yet, and keep what is better."""
        left = found.value[at] <= 0  # where something has won already, another pass is not worth its time
        if left.any():
            found.offer(images[left], self.values(images[left], y[at[left]]), at[left])

    def compiled(self, compile, *settings):
        """What `compile` makes of the path, kept on it for the next call with these settings."""
        outputs = self.path.outputs
        return graph_of(outputs, (compile.__name__, *settings), partial(compile, outputs, *settings))


def opened(defence, x, y, threat, *, path=None, goal=None, target=None, start=None, batch_size=500, seed=0, **positive):
    """Check what all attacks are given, and open the search: `Aim`, labels to go by as int64, and nothing found yet.

    Raises TypeError for shape and dtype, ValueError for values, before any step.
    """
    check_images(x, bounds=threat.bounds)
    check_positive(batch_size=batch_size, **positive)
    check_seed(seed)
    defence = as_defence(defence)
    classes, path = check_defence(defence, x), way(defence, path, seed)
    if path.outputs is not defence and (other := check_outputs(path.outputs, x, "path")) != classes:
        raise ValueError(f"the path gives {other} classes; expected {classes}, those of the defence")
    y = check_labels(y, len(x), classes)
    if target is not None:
        target = check_labels(target, len(x), classes, "target")
        if (same := np.flatnonzero(target == y)).size:
            raise ValueError(f"target equals y for the images {same[:5].tolist()}; expected another class")
    if start is not None:
        check_images(start, "start", threat.bounds)
        if start.shape != x.shape:
            raise ValueError(f"start has shape {start.shape}; expected that of x, {x.shape}")
    targeted = target is not None
    aim = Aim(defence, path, goal or (reached if targeted else evasion), targeted, batch_size)
    nothing = Found(x.copy(), np.full(len(x), -np.inf, "float32"), np.zeros(len(x), int))
    return aim, target if targeted else y, nothing


def single(outputs):
    """Outputs, or any others, as float32 tensors."""
    return tf.nest.map_structure(lambda part: tf.cast(part, tf.float32), outputs)


def direction(gradient, norm):
    """Steepest ascent of unit length in the norm: the sign for linf, the normalised gradient for l2."""
    if norm == "linf":
        return tf.sign(gradient)
    # The squares of a confident network's gradient underflow in float32: scale by the largest entry first.
    gradient /= tf.maximum(tf.reduce_max(tf.abs(gradient), axis=(1, 2, 3), keepdims=True), 1e-30)
    length = tf.sqrt(tf.reduce_sum(gradient**2, axis=(1, 2, 3), keepdims=True))
    return gradient / tf.maximum(length, 1e-12)


def select(condition, new, old):
    """Rows of `new` where `condition` holds; tf.where broadcasts, in twice the time."""
    return tf.raw_ops.Select(condition=condition, x=new, y=old)


def advance(loop, rows, batch_size, changing, fixed, *scalars):
    """Run a compiled `loop` on `rows` of all arrays, in batches; what it returns goes back into those of `changing`."""
    for i in range(0, len(rows), batch_size):
        b = rows[i : i + batch_size]
        for array, part in zip(changing, loop(*(a[b] for a in (*changing, *fixed)), *scalars), strict=True):
            array[b] = part.numpy()


def check_finite(*arrays):
    """Raise FloatingPointError where a gradient has been neither here nor there."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise FloatingPointError("the model's gradient is not finite on some images: no attack can follow it")
