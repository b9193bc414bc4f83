"""What an attacker adds who knows that the defence may refuse: the paper's Algorithm 1, and a strong attack.

Both take a defence, images `x` (n, h, w, c) float32 in [0, 1], true labels `y` and a `ThreatModel`, and give back
`Found`. Evading means a wrong class that is not refused; being refused is no success.
"""

import gc
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from helpers import attacks, data, evaluation, models, rejection
from helpers.checks import check_images
from helpers.closeness import check_bandwidth, squared_distances
from helpers.defence import Path, answers
from helpers.losses import wrong, wrong_classes
from helpers.models import graph_of, traced
from helpers.rejection import margin
from helpers.search import Found, input_gradient, opened
from helpers.threat import ThreatModel, along, projection


class Dense(NamedTuple):
    """`Outputs` of a defence with the log-density (n, classes) of each class at the image."""

    logits: tf.Tensor
    refusal: tf.Tensor
    density: tf.Tensor


@dataclass(frozen=True)
class dense_margin:  # a value, not a closure: equal ones share their graphs
    """`rejection.margin` plus `weight` times the log-density of the best wrong class, of `Dense`."""

    weight: float

    def __call__(self, outputs, y):
        """Margin and density (n,) for the true labels `y` (n,)."""
        best = tf.argmax(wrong(outputs.logits, y), axis=1)
        return margin(outputs, y) + self.weight * tf.gather(outputs.density, best, batch_dims=1)


def kernel_density(x, y, bandwidth):
    """Function from images to the log of each class's kernel density (n, classes), up to a constant, among `x`, `y`.

    The kernel is Gaussian on pixels with standard deviation `bandwidth` (Biggio et al. 2013; paper 01's future work).
    """
    check_bandwidth(bandwidth)
    points = tf.constant(x.reshape(len(x), -1), tf.float64)
    other = tf.constant(np.where(y[:, None] == np.arange(int(y.max()) + 1), 0.0, -np.inf))

    def log_density(images):
        flat = tf.cast(tf.reshape(images, (tf.shape(images)[0], points.shape[1])), tf.float64)
        log_kernel = -squared_distances(flat, points) / (2 * bandwidth**2)
        return tf.reduce_logsumexp(log_kernel[:, :, None] + other, axis=1)

    return log_density


def dense(defence, density, weight):
    """Path to `defence` that climbs `dense_margin`; `density` is from `kernel_density`."""
    def build():
        def outputs(x):
            return Dense(*defence(x), density(x))

        outputs.randomised = defence.randomised
        return outputs

    return Path(graph_of(defence, ("dense", density), build), (dense_margin(weight),))


def strong(
    defence, x, y, threat, x_train, y_train, *, steps=200, restarts=4, width=0.3, density=None, weight=0.0,
    batch_size=500, seed=0, label=None, path=None, goal=None,
):
    """PGD on the reject-aware margin, from starts that already resemble another class; the best iterate is kept.

    Every restart takes `steps` normalised steps: half of them on the defence with every gamma times `width`, whose
    gradient reaches further, then half on the defence itself. The second restart begins at `nearest_starts`, the others
    where PGD drives the bare network to the most, the next, ... probable wrong class. Images that evade leave.
    A defence that is no `rejection.Rejection`, such as a readout of the binarization test, is followed as it is in both
    halves, and stands for its own bare network.
    `density`, from `kernel_density`, adds `weight` times the log-density of the wrong class to the loss. `label` is the
    text of the progress bar; None shows none. `path` and `goal` change nothing: this attack chooses its own; they are
    there so that `evaluation` and `standard` can call it as they call others.
    """
    aim, y, found = opened(defence, x, y, threat, goal=margin, batch_size=batch_size, steps=steps, restarts=restarts)
    defence = aim.defence
    soft = defence.smoothed(width) if hasattr(defence, "smoothed") else defence
    bare = getattr(defence, "network", defence)
    order = wrong_classes(answers(bare, x).logits, y)
    path = None if density is None else dense(defence, density, weight)
    losses = (margin,) if path is None else path.losses
    found.value[:] = aim.values(x, y)
    for restart in tqdm(range(restarts), desc=label, disable=label is None, unit="restart"):
        left = found.left()
        if not left.size:
            break
        options = {"batch_size": batch_size, "seed": seed + 1000 * restart}  # past the last class they start over
        if restart == 1:
            start = nearest_starts(defence, x[left], y[left], threat, x_train, y_train)
        else:
            target = order[left, max(0, restart - 1) % order.shape[1]]
            start = attacks.pgd(bare, x[left], y[left], threat, losses=("margin",), target=target, **options).images
        aim.offer(found, start, y, left)
        stand = found.value[left] <= 0
        left, start = left[stand], start[stand]
        if steps // 2 and left.size:  # attacked as if it were deployed: what comes out is a start
            start = attacks.pgd(soft, x[left], y[left], threat, steps=steps // 2, losses=(margin,), goal=margin,
                                start=start, compact=True, **options).images
        if left.size:
            part = attacks.pgd(defence, x[left], y[left], threat, steps=-(-steps // 2), losses=losses, path=path,
                               goal=margin, start=start, compact=True, **options)
            found.offer(part.images, part.value, left)
            found.steps[left] += steps
    return found


def nearest_starts(defence, x, y, threat, x_train, y_train, candidates=5):
    """For each image the best of the nearest training images of other classes, pulled into the ball around it.

    The best is the one of `candidates` at which `rejection.margin` is largest after the projection.
    """
    check_images(x_train, "x_train")
    flat, points = x.reshape(len(x), -1), x_train.reshape(len(x_train), -1)
    d2 = (points**2).sum(1) - 2 * flat @ points.T  # up to a constant of each image
    order = np.argpartition(np.where(y_train == y[:, None], np.inf, d2), candidates, axis=1)[:, :candidates]
    starts = [threat.project(x_train[column], x).numpy() for column in order.T]
    scores = [margin(answers(defence, s), tf.constant(y, tf.int64)).numpy() for s in starts]
    return np.stack(starts)[np.argmax(scores, axis=0), np.arange(len(x))]


def _hinge_step(defence, platt, shape, norm, bounds):
    """Compile one step of Algorithm 1: the loss at `x_adv`, and where the step leads."""
    images, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((), tf.float32)
    per_class = tf.TensorSpec((None, None), tf.float64)

    def scores(x):
        if hasattr(defence, "scores"):
            return defence.scores(x)
        odds = tf.cast(defence(x).logits, tf.float64)
        return odds if platt is None else (odds - platt[1]) / platt[0]

    def hinge(scores, signs):
        return tf.reduce_sum(tf.nn.relu(1 - signs * scores), axis=1)

    def step(x_adv, x, signs, eps, step_size):
        gradient, loss, _ = input_gradient(scores, hinge, x_adv, signs)
        return loss, projection(x, norm, eps, bounds)(x_adv - step_size * gradient)

    return traced(step, defence, input_signature=[images, images, per_class, number, number])


def algorithm_1(
    defence, x, y, threat, *, step_size, steps=100, tolerance=0.01, batch_size=500, seed=0, label=None, platt=None,
    path=None,
):
    """The paper's attack: gradient descent on the hinge loss of the runner-up class, from a random start in the ball.

    The label vector has +1 at the runner-up (the best wrong class of the clean image) and -1 elsewhere; the loss is
    summed over classes. The gradient is not normalised. An image stops when its loss changes by no more than
    `tolerance` (the paper's t; None: never), or after `steps`; its last iterate is reported. `label`: text of the
    progress bar. `platt`: where something stands before the defence that has its log-odds alone, such as
    `soundness.Watched`, the line that gives the scores back. `path` changes nothing, as in `strong`.
    """
    aim, y, found = opened(defence, x, y, threat, batch_size=batch_size, step_size=step_size, steps=steps,
                           tolerance=tolerance)
    logits, tolerance = answers(defence, x).logits, -1.0 if tolerance is None else tolerance
    signs = 2.0 * (np.arange(logits.shape[1]) == wrong_classes(logits, y)[:, :1]) - 1
    settings = x.shape[1:], threat.norm, threat.bounds
    step = graph_of(aim.defence, ("hinge", *settings), partial(_hinge_step, aim.defence, platt, *settings))
    current, last = threat.random_start(x, seed), np.full(len(x), np.inf)
    active = np.arange(len(x))
    for _ in tqdm(range(steps), desc=label, disable=label is None, unit="step"):
        parts = [active[i : i + batch_size] for i in range(0, len(active), batch_size)]
        for b in parts:
            loss, ahead = (t.numpy() for t in step(current[b], x[b], signs[b], threat.eps, step_size))
            moving = np.abs(loss - last[b]) > tolerance
            current[b[moving]], last[b] = ahead[moving], loss
            found.steps[b[moving]] += 1
            active = np.setdiff1d(active, b[~moving])
        if not active.size:
            break
    return Found(current, aim.values(current, y), found.steps)


# ── Plumbing of chapter 01 ──


def by_eps(defence, x, y, grid, attack, carry=False):
    """What becomes of the images `x` under an attack at each l2 radius of the rising `grid`; at 0 nobody attacks.

    attack : function (defence, x, y, threat) -> `Found`, whose images must lie in the ball.
    carry : what is evaded in a smaller ball is evaded in every larger one, and is not attacked again there.
    Returns {"outcome": (len(grid), n) indices into `evaluation.OUTCOMES`, "steps": (len(grid),), mean of an image}.
    """
    results, taken = [], []
    for eps in grid:
        found = evaluation.outcomes(defence, x, y)
        left = np.arange(len(x))
        if carry and results:
            left = np.flatnonzero(results[-1] != 2)
            found[results[-1] == 2] = 2
        steps = np.zeros(len(x))
        if eps > 0 and left.size:
            threat = ThreatModel("l2", float(eps))
            part = attack(defence, x[left], y[left], threat)
            assert threat.contains(part.images, x[left]).all(), "the attack leaves the ball or the range of pixels"
            found[left], steps[left] = evaluation.outcomes(defence, part.images, y[left]), part.steps
        results.append(found)
        taken.append(steps.mean())
    return {"outcome": np.array(results), "steps": np.array(taken)}


def noise(defence, x, y, threat, seed=0):
    """`Found` of noise whose length is eps after clipping, where the bounds leave room for it; nobody climbs."""
    direction = np.random.default_rng(seed).standard_normal(x.shape)
    aim, y, found = opened(defence, x, y, threat)
    found.images[:] = along(x, direction, threat.eps, threat.norm, threat.bounds)
    found.value[:] = aim.values(found.images, y)
    return found


@lru_cache(1)
def prepared(name, n_train, n_test, n_validation):
    """The data set `name` with so many images, `n_validation` of the training images apart; the last one is kept."""
    return data.load(name).take(n_train, n_test).split(n_validation)


@lru_cache(8)
def network(path):
    """The network of a file of `models.save`, kept with its graphs: not to be trained."""
    return models.load(path)


_KEPT, _MANY = {}, 8  # path: defence, since to load and compile one again takes longer than many a unit


def loaded(path, threshold=None):
    """The defence that `rejection.save` wrote to `path`, with its graphs; the last few are kept.

    threshold : another one than its own, as `Rejection.threshold` has it.
    """
    if path not in _KEPT:
        while len(_KEPT) >= _MANY:
            del _KEPT[next(iter(_KEPT))]
            gc.collect()  # its graphs and itself hold each other, and its support vectors may be large
        _KEPT[path] = rejection.load(path, network)
    kept = _KEPT[path]
    if threshold is None or threshold == kept.threshold:
        return kept
    return graph_of(kept, ("at", threshold), partial(replace, kept, threshold=threshold))


def clear_graphs():
    """Forget the defences of `loaded`, which may be large, and their networks."""
    _KEPT.clear()
    network.cache_clear()
    gc.collect()
