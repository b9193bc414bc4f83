"""What an attacker adds who knows that the defence may refuse: the paper's Algorithm 1, and a strong attack.

Both take a `rejection.Defence`, images `x` (n, h, w, c) float32 in [0, 1], true labels `y` and a `ThreatModel`. Evading
means a wrong class that is not refused; being refused is no success.
"""

import gc
from dataclasses import dataclass
from functools import partial

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from helpers import attacks
from helpers.checks import check_images, check_labels, check_positive
from helpers.closeness import squared_distances
from helpers.models import graph_of, traced
from helpers.rejection import Defence, evaluate, load
from helpers.threat import projection


@dataclass(frozen=True)
class evasion:  # a value, not a closure: equal ones share their graphs
    """Reject-aware margin (n,) as a function of (logits, y): best wrong class against the true one or refusing.

    `logits` are those of `Defence.logits`, classes + 1 columns a view; `view` picks the factor on gamma. Positive where
    the defence is evaded (paper 01, Section 2.5.1: the pair max(s_i), max(s_j)).
    """

    classes: int
    view: int = 0

    def __call__(self, logits, y):
        """Margin (n,) of `logits` for the true labels `y` (n,)."""
        width = self.classes + 1
        z = tf.convert_to_tensor(logits)[:, self.view * width : (self.view + 1) * width]
        known = tf.one_hot(y, width, True, False) | (tf.range(width) == self.classes)
        return tf.reduce_max(tf.where(known, -np.inf, z), axis=1) - tf.reduce_max(tf.where(known, z, -np.inf), axis=1)


@dataclass(frozen=True)
class dense_evasion:
    """`evasion` plus `weight` times the log-density of the best wrong class, from the columns after two views."""

    classes: int
    weight: float

    def __call__(self, logits, y):
        """Margin and density (n,) of `logits` for the true labels `y` (n,)."""
        wrong = tf.where(tf.one_hot(y, self.classes, True, False), -np.inf, logits[:, : self.classes])
        log_density = tf.gather(logits[:, 2 * (self.classes + 1) :], tf.argmax(wrong, axis=1), batch_dims=1)
        return evasion(self.classes)(logits, y) + self.weight * log_density


def _views(defence, width, density):
    """The defence's logits beside those with a smoothed kernel, and the log-densities of the classes if wanted."""
    def views(x):
        logits = defence.logits(x, (1.0, width))
        return logits if density is None else tf.concat([logits, density(x)], axis=1)

    views.randomised = defence.randomised
    return views


def kernel_density(x, y, bandwidth):
    """Function from images to the log of each class's kernel density (n, classes), up to a constant, among `x`, `y`.

    The kernel is Gaussian on pixels with standard deviation `bandwidth` (Biggio et al. 2013; paper 01's future work).
    """
    check_positive(bandwidth=bandwidth)
    points = tf.constant(x.reshape(len(x), -1), tf.float64)
    other = tf.constant(np.where(y[:, None] == np.arange(int(y.max()) + 1), 0.0, -np.inf))

    def log_density(images):
        flat = tf.cast(tf.reshape(images, (tf.shape(images)[0], points.shape[1])), tf.float64)
        log_kernel = -squared_distances(flat, points) / (2 * bandwidth**2)
        return tf.reduce_logsumexp(log_kernel[:, :, None] + other, axis=1)

    return log_density


def strong(
    defence, x, y, threat, x_train, y_train, *, steps=200, restarts=4, width=0.3, density=None, weight=0.0,
    batch_size=500, seed=0, label=None,
):  # fmt: skip
    """PGD on the reject-aware margin, from starts that already resemble another class; the best iterate is kept.

    Every restart takes `steps` normalised steps: half of them on the defence with every gamma times `width`, whose
    gradient reaches further, then half on the defence itself. The second restart begins at `nearest_starts`, the others
    where PGD drives the bare network to the most, the next, ... probable wrong class. Images that evade leave.
    `density`, from `kernel_density`, adds `weight` times the log-density of the wrong class to the loss. `label` is the
    text of the progress bar; None shows none.
    """
    check_images(x, bounds=threat.bounds)
    check_positive(steps=steps, restarts=restarts, width=width, batch_size=batch_size)
    order = _wrong_classes(Defence(defence.network), x, y)
    y, classes = np.asarray(y, "int64"), order.shape[1]
    soft, success = evasion(classes, 1), evasion(classes)
    hard = success if density is None else dense_evasion(classes, weight)
    best, score = x.copy(), success(evaluate(defence, x), y).numpy()
    model = graph_of(defence, ("views", width, density), partial(_views, defence, width, density))
    options = {"batch_size": batch_size, "seed": seed}

    def keep(left, images):
        new = success(evaluate(defence, images), y[left]).numpy()
        attacks.keep(images, new, best, score, left)
        return new <= 0

    for restart in tqdm(range(restarts), desc=label, disable=label is None, unit="restart"):
        left = np.flatnonzero(score <= 0)
        if not left.size:
            break
        if restart == 1:
            start = nearest_starts(defence, x[left], y[left], threat, x_train, y_train)
        else:
            target = order[left, max(0, restart - 1) % (classes - 1)]
            start = attacks.pgd(defence.network, x[left], target, threat, losses=("margin",), targeted=True, **options)
        stand = keep(left, start)
        left, start = left[stand], start[stand]
        for loss, good, n in ((soft, soft, steps // 2), (hard, success, -(-steps // 2))):
            if n and left.size:
                start = attacks.pgd(model, x[left], y[left], threat, steps=n, losses=(loss,), goal=good, start=start,
                                    compact=good is success, **options)
        if left.size:
            keep(left, start)
    return best


def _wrong_classes(defence, x, y):
    """Classes (n, classes) of images `x`, from the most to the least probable for `defence`; the true ones `y` last."""
    z = evaluate(defence, x)[:, :-1]
    z[np.arange(len(x)), check_labels(y, *z.shape)] = -np.inf
    return np.argsort(-z, axis=1, kind="stable")


def nearest_starts(defence, x, y, threat, x_train, y_train, candidates=5):
    """For each image the best of the nearest training images of other classes, pulled into the ball around it.

    The best is the one of `candidates` at which `evasion` is largest after the projection.
    """
    check_images(x_train, "x_train")
    flat, points = x.reshape(len(x), -1), x_train.reshape(len(x_train), -1)
    d2 = (points**2).sum(1) - 2 * flat @ points.T  # up to a constant of each image
    order = np.argpartition(np.where(y_train == y[:, None], np.inf, d2), candidates, axis=1)[:, :candidates]
    starts = [threat.project(x_train[column], x).numpy() for column in order.T]
    classes = evaluate(defence, x[:1]).shape[1] - 1
    scores = [evasion(classes)(evaluate(defence, s), tf.constant(y, tf.int64)).numpy() for s in starts]
    return np.stack(starts)[np.argmax(scores, axis=0), np.arange(len(x))]


def _hinge_step(defence, shape, norm, bounds):
    """Compile one step of Algorithm 1: the loss at `x_adv`, and where the step leads."""
    images, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((), tf.float32)
    per_class = tf.TensorSpec((None, None), tf.float64)

    def hinge(scores, signs):
        return tf.reduce_sum(tf.nn.relu(1 - signs * scores), axis=1)

    def step(x_adv, x, signs, eps, step_size):
        gradient, loss, _ = attacks.input_gradient(lambda images: defence.scores(images)[0], hinge, x_adv, signs)
        return loss, projection(x, norm, eps, bounds)(x_adv - step_size * gradient)

    return traced(step, defence, input_signature=[images, images, per_class, number, number])


def algorithm_1(
    defence, x, y, threat, *, step_size, steps=100, tolerance=0.01, batch_size=500, seed=0, label=None
):  # fmt: skip
    """The paper's attack: gradient descent on the hinge loss of the runner-up class, from a random start in the ball.

    The label vector has +1 at the runner-up (the best wrong class of the clean image) and -1 elsewhere; the loss is
    summed over classes. The gradient is not normalised. An image stops when its loss changes by no more than
    `tolerance` (the paper's t), or after `steps`; its last iterate is reported. `label`: text of the progress bar.

    Returns
    -------
    images like `x`, and the number of steps that each image took, (n,) int.
    """
    check_images(x, bounds=threat.bounds)
    check_positive(step_size=step_size, steps=steps, tolerance=tolerance, batch_size=batch_size)
    order = _wrong_classes(defence, x, y)
    signs = 2.0 * (np.arange(order.shape[1]) == order[:, :1]) - 1
    settings = x.shape[1:], threat.norm, threat.bounds
    step = graph_of(defence, ("hinge", *settings), partial(_hinge_step, defence, *settings))
    current, taken, last = threat.random_start(x, seed), np.zeros(len(x), int), np.full(len(x), np.inf)
    active = np.arange(len(x))
    for _ in tqdm(range(steps), desc=label, disable=label is None, unit="step"):
        parts = [active[i : i + batch_size] for i in range(0, len(active), batch_size)]
        for b in parts:
            loss, ahead = (t.numpy() for t in step(current[b], x[b], signs[b], threat.eps, step_size))
            moving = np.abs(loss - last[b]) > tolerance
            current[b[moving]], last[b] = ahead[moving], loss
            taken[b[moving]] += 1
            active = np.setdiff1d(active, b[~moving])
        if not active.size:
            break
    return current, taken


_TARGET = {}  # path: the defence of the unit before, since to load and compile it again takes longer than many a unit


def target(path):
    """The defence that `rejection.save` wrote to `path`, kept with its graphs until the next one is asked for."""
    if path not in _TARGET:
        _TARGET.clear()
        gc.collect()  # its graphs and itself hold each other, and its support vectors may be large
        _TARGET[path] = load(path)
    return _TARGET[path]


def clear_graphs():
    """Forget the defence of `target`. Chapter 01 calls it before it attacks larger ones."""
    _TARGET.clear()
    gc.collect()
