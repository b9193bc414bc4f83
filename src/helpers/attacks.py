"""Attacks on a classifier: one loop (gradient, step, project), and the published attacks as names over it.

Every attack takes `model`, a Keras network or any TensorFlow function from images to logits; images `x`, float32
(n, h, w, c) in [0, 1]; integer labels `y` (n,), the true ones, or the wanted ones when `targeted`. It gives
adversarial images of the shape of `x`, float32, and never changes the network (`training=False`). A function is called
anew for every step, since it may be random; with an attribute `randomised = False` it is compiled, as networks are.
Bad input raises before any computation: TypeError for shape and dtype, ValueError for values.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize
import tensorflow as tf

from helpers.checks import check_images, check_labels, check_positive, known
from helpers.losses import LOSSES, TARGETED, cross_entropy, margin, minus_logit, targeted_margin  # noqa: F401
from helpers.models import check_logits, graph_of, inference, inner_graph, predict, traced
from helpers.threat import ThreatModel, diameter, lengths, onto_plane, projection


def input_gradient(network, loss, x, y):
    """Gradient by the images `x` of `loss(network(x), y)`, zero where nothing connects; the losses; the logits."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = network(x)
        losses = loss(logits, y)
    return tape.gradient(losses, x, unconnected_gradients="zero"), losses, logits


def _kept(compile, model, *settings):
    """What `compile` makes of the model, kept on it for the next call with these settings."""
    return graph_of(model, (compile.__name__, *settings), partial(compile, model, *settings))


def _network(model):
    return lambda x: tf.cast(inference(model)(x), tf.float32)


def _compile_loop(model, shape, norm, bounds, loss, targeted, goal):
    """Compile `steps` ascent steps for one network; sizes, eps and step size stay tensors, so nothing is retraced.

    With a `goal` the best of the images at which a gradient was taken is kept, which costs no further pass.
    """
    images, labels, per_image = (tf.TensorSpec((None, *rest), kind) for rest, kind in (
        (shape, tf.float32), ((), tf.int64), ((), tf.float32)))  # fmt: skip
    number, count = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.int32)
    radius = tf.TensorSpec((None, 1, 1, 1), tf.float32)  # one for all images, or one for each
    sign = -1.0 if targeted else 1.0

    def gradient_of(x_adv, y):
        return input_gradient(_network(model), LOSSES.get(loss, loss), x_adv, y)

    gradient_of = inner_graph(gradient_of, model)

    def loop(x_adv, x, y, best, best_score, eps, step_size, steps):
        project = projection(x, norm, eps, bounds)
        for _ in tf.range(steps):
            gradient, _, logits = gradient_of(x_adv, y)
            if goal:
                score = sign * goal(logits, y)
                won = score > best_score
                best = tf.raw_ops.Select(condition=won, x=x_adv, y=best)  # rows; tf.where broadcasts, in twice the time
                best_score = tf.where(won, score, best_score)
            x_adv = project(x_adv + step_size * _direction(sign * gradient, norm))
        return x_adv, best, best_score

    return traced(loop, model, input_signature=[images, images, labels, images, per_image, radius, number, count])


def _direction(gradient, norm):
    """Steepest ascent of unit length in the norm: the sign for linf, the normalised gradient for l2."""
    if norm == "linf":
        return tf.sign(gradient)
    # The squares of a confident network's gradient underflow in float32: scale by the largest entry first.
    gradient /= tf.maximum(tf.reduce_max(tf.abs(gradient), axis=(1, 2, 3), keepdims=True), 1e-30)
    length = tf.sqrt(tf.reduce_sum(gradient**2, axis=(1, 2, 3), keepdims=True))
    return gradient / tf.maximum(length, 1e-12)


def _checked(model, x, y, threat, **positive):
    """Validate the arguments that every attack shares; labels as int64."""
    check_images(x, bounds=threat.bounds)
    check_positive(**positive)
    return check_labels(y, len(x), check_logits(model, x).shape[1])


def _ascend(model, x, y, start, threat, loss, targeted, *, steps, step_size, batch_size, goal=None, compact=False):
    """Run the loop over batches. Returns the last iterates and, with a `goal`, the best before them and its values."""
    loop = _kept(_compile_loop, model, x.shape[1:], threat.norm, threat.bounds, loss, targeted, goal)
    eps = np.full((1, 1, 1, 1), threat.eps)
    current, best, score = start.copy(), start.copy(), np.full(len(x), -np.inf, "float32")
    active, chunk = np.arange(len(x)), 5 if compact else steps
    for done in range(0, steps, chunk):
        for i in range(0, len(active), batch_size):
            b = active[i : i + batch_size]
            out = loop(current[b], x[b], y[b], best[b], score[b], eps, step_size, min(chunk, steps - done))
            current[b], best[b], score[b] = (t.numpy() for t in out)
        if compact:  # images already beaten leave; the others fill whole batches again
            active = active[score[active] <= 0]
    if not np.isfinite(current).all():
        raise FloatingPointError("the model's gradient is not finite on some images: no attack can follow it")
    return current, best, score


def _values(goal, model, x, y, batch_size):
    return goal(tf.constant(predict(model, x, batch_size), tf.float32), y).numpy()


def keep(images, scores, best, score, at):
    """Let those of `images` that score higher replace the rows `at` of `best` and `score`, in place."""
    won = scores > score[at]
    best[at[won]], score[at[won]] = images[won], scores[won]


def fgsm(model, x, y, eps, *, targeted=False, bounds=(0.0, 1.0), batch_size=500):
    """Fast gradient sign method: one step of size `eps` (Goodfellow et al. 2015; paper 02, Eqn. 1)."""
    return bim(model, x, y, eps, steps=1, step_size=eps or 1.0, targeted=targeted, bounds=bounds, batch_size=batch_size)


def bim(model, x, y, eps, *, steps=10, step_size=None, targeted=False, bounds=(0.0, 1.0), batch_size=500):
    """Basic iterative method, I-FGSM: `steps` sign steps from x, clipped to the ball (Kurakin et al. 2017; Eqn. 2).

    `step_size` defaults to eps / steps. Reports the last iterate, as published.
    """
    threat = ThreatModel("linf", eps, bounds)
    y = _checked(model, x, y, threat, steps=steps, step_size=step_size, batch_size=batch_size)
    sizes = {"steps": steps, "step_size": step_size or eps / steps, "batch_size": batch_size}
    return _ascend(model, x, y, x, threat, "cross-entropy", targeted, **sizes)[0]


def pgd(model, x, y, threat, *, steps=40, step_size=None, restarts=1, losses=("cross-entropy",), goal=margin,
        start=None, targeted=False, compact=False, batch_size=500, seed=0):  # fmt: skip
    """Projected gradient descent with random starts (Madry et al. 2018); the best iterate of all restarts is kept.

    A run's last iterate, at which no gradient is taken, is looked at where none before it has won.

    step_size : length of a step in pixel units; default 2.5 * eps / steps.
    restarts : number of random starts; restart r uses loss `losses[r % len(losses)]`, each one of `LOSSES` or a
        function (logits, y) -> (n,) to ascend. The margin does not vanish where the softmax saturates.
    goal : function (logits, y) -> (n,), above 0 where the attack has won; the iterate that it values most is kept.
        When `targeted`, both turn round, as for the margin: below 0 is won, and the lowest value is kept.
    start : images (n, h, w, c) to begin the first run from, e.g. the result at a smaller eps; default a random start.
    compact : let images already beaten leave the batch: the same images are beaten, sooner, and not driven further.
    """
    sizes = {"steps": steps, "step_size": step_size, "batch_size": batch_size}
    y = _checked(model, x, y, threat, restarts=restarts, **sizes)
    sizes["step_size"] = step_size or 2.5 * threat.eps / steps
    if not losses or isinstance(losses, str) or any(not callable(name) and name not in LOSSES for name in losses):
        raise ValueError(f"losses is {losses!r}; expected a tuple of functions or of {tuple(LOSSES)}")
    if start is not None:
        _check_start(start, x, threat)
    best, score, every = x.copy(), np.full(len(x), -np.inf, "float32"), np.arange(len(x))

    def consider(images, at):
        left = score[at] <= 0  # where something has won already, another pass is not worth its time
        if left.any():
            images, at = images[left], at[left]
            values = (-1 if targeted else 1) * _values(goal, model, images, y[at], batch_size)
            keep(images, values, best, score, at)

    if compact:  # what is beaten without an attack is not attacked
        consider(x, every)
    for restart in range(restarts):
        warm = start is not None and restart == 0
        first = threat.project(start, x).numpy() if warm else threat.random_start(x, (seed, restart))
        active = np.flatnonzero(score <= 0) if compact else every
        if not active.size:
            break
        last, *found = _ascend(model, x[active], y[active], first[active], threat, losses[restart % len(losses)],
                               targeted, goal=goal, compact=compact, **sizes)  # fmt: skip
        keep(*found, best, score, active)
        consider(last, active)
    if not compact:
        consider(x, every)
    return best


class Found(NamedTuple):
    """What an attack found.

    images : the best image of each by the goal, (n, h, w, c) float32, within the threat model.
    value : their value, (n,) float32, above 0 where the attack has won.
    steps : how many gradients or queries each image took, (n,) int.
    """

    images: np.ndarray
    value: np.ndarray
    steps: np.ndarray

    def offer(self, images, value, at):
        """Let those of `images` with a higher value replace the rows `at`."""
        keep(images, value, self.images, self.value, at)

    def left(self):
        """Rows of the images that are not beaten."""
        return np.flatnonzero(self.value <= 0)


def _opening(model, x, y, threat, start, goal, batch_size, **positive):
    """Labels, checked, and what is found before the first step: `x`, or `start` in the ball where that is better."""
    y = _checked(model, x, y, threat, batch_size=batch_size, **positive)
    found = Found(x.copy(), _values(goal, model, x, y, batch_size), np.zeros(len(x), int))
    if start is not None:
        _check_start(start, x, threat)
        start = threat.project(start, x).numpy()
        found.offer(start, _values(goal, model, start, y, batch_size), np.arange(len(x)))
    return y, found


def _check_start(start, x, threat):
    check_images(start, "start", threat.bounds)
    if start.shape != x.shape:
        raise ValueError(f"start has shape {start.shape}; expected that of x, {x.shape}")


def _advance(loop, rows, batch_size, changing, fixed, *scalars):
    """Run a compiled `loop` on `rows` of all arrays, in batches; what it returns goes back into those of `changing`."""
    for i in range(0, len(rows), batch_size):
        b = rows[i : i + batch_size]
        for array, part in zip(changing, loop(*(a[b] for a in (*changing, *fixed)), *scalars), strict=True):
            array[b] = part.numpy()


def _classes(model, x, y, batch_size):
    """The wrong classes of each image, (n, classes - 1), from the one with the largest logit to the smallest."""
    logits = predict(model, x, batch_size)
    logits[np.arange(len(x)), y] = np.inf
    return np.argsort(-logits, axis=1, kind="stable")[:, 1:]


def _select(condition, new, old):
    """Rows of `new` where `condition` holds; tf.where broadcasts, in twice the time."""
    return tf.raw_ops.Select(condition=condition, x=new, y=old)


# ── APGD: a step size that follows the progress ──


def _compile_climb(model, shape, norm, bounds, loss, goal):
    """Compile `steps` steps of APGD, between which `apgd` halves step sizes."""
    image, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.float32)
    label, scalar, count = (tf.TensorSpec(*spec) for spec in (((None,), tf.int64), ((), tf.float32), ((), tf.int32)))

    def gradient_of(x_adv, y, target):
        losses = (lambda z, y: TARGETED[loss](z, y, target)) if loss in TARGETED else LOSSES.get(loss, loss)
        return input_gradient(_network(model), losses, x_adv, y)

    gradient_of = inner_graph(gradient_of, model)

    def loop(current, before, gradient, top, top_gradient, best, size, last, top_loss, rises, value,
             x, y, target, eps, steps):  # fmt: skip
        project = projection(x, norm, eps, bounds)
        for _ in tf.range(steps):
            ahead = project(current + size[:, None, None, None] * _direction(gradient, norm))
            new = tf.reduce_all(before == current, axis=(1, 2, 3), keepdims=True)  # no momentum yet
            share = tf.where(new, 1.0, 0.75)
            ahead = project(current + share * (ahead - current) + (1 - share) * (current - before))
            before, current = current, ahead
            gradient, losses, logits = gradient_of(current, y, target)
            rises += tf.cast(losses > last, tf.float32)
            last, higher = losses, losses > top_loss
            top, top_gradient = _select(higher, current, top), _select(higher, gradient, top_gradient)
            top_loss = tf.maximum(losses, top_loss)
            score = goal(logits, y)
            best, value = _select(score > value, current, best), tf.maximum(score, value)
        return current, before, gradient, top, top_gradient, best, size, last, top_loss, rises, value

    return traced(loop, model, input_signature=[*[image] * 6, *[number] * 5, image, label, label, scalar, count])


def _checkpoints(steps):
    """After which steps APGD looks back: first 22 % of all, then intervals shorter by 3 %, 6 % at least."""
    at, length, points = 0.22, 0.22, []
    while at < 1:
        points.append(int(np.ceil(round(at * steps, 6))))
        length = max(length - 0.03, 0.06)
        at += length
    return sorted(set(points))


def _apgd_run(loop, x, y, target, first, found, eps, radius, steps, batch_size):
    """One run in the ball of `radius`. Returns where the loss was highest; `found` gets the best, if that is eps."""
    n, none = len(x), np.zeros_like(x)
    current, before, gradient, top, top_gradient = first.copy(), first.copy(), none, first.copy(), none.copy()
    size, last, rises = np.full(n, 2 * radius, "float32"), np.full(n, np.inf, "float32"), np.zeros(n, "float32")
    top_loss, then, halved = np.full(n, -np.inf, "float32"), np.full(n, -np.inf, "float32"), np.zeros(n, bool)
    best, value = (found.images, found.value) if radius <= eps else (x.copy(), np.full(n, np.inf, "float32"))
    changing = (current, before, gradient, top, top_gradient, best, size, last, top_loss, rises, value)
    points, since = _checkpoints(steps), 0
    stops = sorted({*points, *range(10, steps, 10), steps})
    for begin, stop in zip([-1, *stops], stops, strict=False):  # one more: the gradient at the start
        active = found.left()
        if not active.size:
            break
        _advance(loop, active, batch_size, changing, (x, y, target), radius, stop - max(begin, 0) + (begin < 0))
        found.steps[active] += stop - max(begin, 0) + (begin < 0)
        if stop in points:
            halved = (rises < 0.75 * (stop - since)) | (~halved & (top_loss <= then))
            size[halved] /= 2
            current[halved], before[halved], gradient[halved] = top[halved], top[halved], top_gradient[halved]
            last[halved] = top_loss[halved]
            rises[:], since, then = 0, stop, top_loss.copy()
    if not (np.isfinite(current).all() and np.isfinite(gradient).all()):
        raise FloatingPointError("the model's gradient is not finite on some images: no attack can follow it")
    return top


def apgd(model, x, y, threat, *, loss="log-odds", steps=100, restarts=1, targets=9, radii=(1.0,), start=None,
         goal=margin, batch_size=500, seed=0):  # fmt: skip
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): steps with momentum, of a size that halves where progress stops.

    The first step is 2 * eps long. At a checkpoint it is halved, and the run goes on from its highest loss, where less
    than 3/4 of the steps since the last one rose, or nothing better was found at an undiminished size. Beaten images
    leave.

    loss : name in `LOSSES`, a function (logits, y) -> (n,), or a name in `TARGETED`: then a run for each of the
        `targets` wrong classes with the largest logits.
    restarts : number of runs (of each target), from random starts.
    radii : factors of eps. A run goes through balls of these sizes, the last of which is the ball itself, and divides
        its steps among them: where gradients mislead near the image, the way may be found from farther away.
    start : images to begin the first run from; default a random start.
    """
    if not callable(loss):
        known("loss", loss, LOSSES | TARGETED)
    if not radii or min(radii) < 1 or radii[-1] != 1:
        raise ValueError(f"radii are {radii}; expected factors >= 1 of eps, the last one 1")
    y, found = _opening(model, x, y, threat, start, goal, batch_size, steps=steps, restarts=restarts, targets=targets)
    loop = _kept(_compile_climb, model, x.shape[1:], threat.norm, threat.bounds, loss, goal)
    wrong = _classes(model, x, y, batch_size)[:, :targets].T if loss in TARGETED else y[None]
    for run, target in enumerate(np.repeat(wrong, restarts, axis=0)):
        left = found.left()
        if not left.size or not threat.eps:
            break
        part = Found(*(array[left] for array in found))
        widest = replace(threat, eps=min(radii[0] * threat.eps, diameter(x.shape[1:], threat.norm, threat.bounds)))
        first = part.images if start is not None and run == 0 else widest.random_start(x[left], (seed, run))
        for i, factor in enumerate(radii):
            ball = replace(threat, eps=min(factor * threat.eps, widest.eps))
            share = steps * (i + 1) // len(radii) - steps * i // len(radii)
            first = _apgd_run(loop, x[left], y[left], target[left], ball.project(first, x[left]).numpy(), part,
                              threat.eps, ball.eps, share, batch_size)
        for array, rows in zip(found, part, strict=True):
            array[left] = rows
    return found


# ── FAB: along the boundary to the smallest change ──


def _compile_fab(model, shape, norm, bounds, goal):
    """Compile `steps` steps of FAB towards one class of each image."""
    image, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.float32)
    label = tf.TensorSpec((None,), tf.int64)

    def gradient_of(x_adv, y, target):
        return input_gradient(_network(model), lambda z, y: targeted_margin(z, y, target), x_adv, y)[:2]

    gradient_of = inner_graph(gradient_of, model)
    score_of = inner_graph(lambda x_adv, y: goal(_network(model)(x_adv), y), model)

    def loop(current, best, length, x, y, target, steps):
        for _ in tf.range(steps):
            gradient, height = gradient_of(current, y, target)
            ahead = onto_plane(current, gradient, -height, norm, bounds)
            rise = tf.reduce_sum(gradient * (x - current), axis=(1, 2, 3))
            home = onto_plane(x, gradient, -height - rise, norm, bounds)
            near, far = lengths(ahead, norm), lengths(home, norm)
            share = tf.minimum(near / tf.maximum(near + far, 1e-12), 0.1)[:, None, None, None]
            moved = (1 - share) * (current + 1.05 * ahead) + share * (x + 1.05 * home)
            moved = tf.clip_by_value(moved, *bounds)
            won, change = score_of(moved, y) > 0, lengths(moved - x, norm)
            shorter = won & (change < length)
            best, length = _select(shorter, moved, best), tf.where(shorter, change, length)
            current = _select(won, x + 0.9 * (moved - x), moved)
        return current, best, length

    count = tf.TensorSpec((), tf.int32)
    return traced(loop, model, input_signature=[image, image, number, image, label, label, count])


def fab(model, x, y, threat, *, steps=100, targets=9, smallest=False, start=None, goal=margin, batch_size=500, seed=0):
    """Fast Adaptive Boundary attack, targeted (FAB-T, Croce & Hein 2020): the smallest change that wins.

    Every step goes onto the plane where the linearised network is undecided between the true class and a wrong one,
    within the bounds, drawn a little towards the original; a step that wins goes back a tenth of the way. One run for
    each of the `targets` wrong classes with the largest logits. An image whose change is within eps leaves; others are
    pulled into the ball, and kept if the `goal` likes them better.

    smallest : go on to the smallest change in every image, and return that, whether eps allows it or not; images that
        were never beaten come back unchanged.
    """
    y, found = _opening(model, x, y, threat, start, goal, batch_size, steps=steps, targets=targets)
    loop = _kept(_compile_fab, model, x.shape[1:], threat.norm, threat.bounds, goal)
    best, length = x.copy(), np.where(_values(goal, model, x, y, batch_size) > 0, 0, np.inf).astype("float32")
    reach = 0.0 if smallest else np.float32(threat.eps)
    for target in _classes(model, x, y, batch_size)[:, :targets].T:
        current = x.copy()
        for done in range(0, steps, 10):
            active, chunk = np.flatnonzero(length > reach), min(10, steps - done)
            _advance(loop, active, batch_size, (current, best, length), (x, y, target), chunk)
            found.steps[active] += chunk
    rows = np.flatnonzero((length > reach) & (length < np.inf))
    if rows.size:
        best[rows] = _shortened(goal, model, x[rows], y[rows], best[rows], batch_size)
    if smallest:
        return Found(best, _values(goal, model, best, y, batch_size), found.steps)
    best = threat.project(best, x).numpy()
    found.offer(best, _values(goal, model, best, y, batch_size), np.arange(len(x)))
    return found


def _shortened(goal, model, x, y, images, batch_size):
    """Images that win, on the way from `x` to `images` as near to `x` as ten halvings find."""
    low, high, ahead = np.zeros((len(x), 1, 1, 1), "float32"), np.ones((len(x), 1, 1, 1), "float32"), images.copy()
    for _ in range(10):
        middle = x + (low + high) / 2 * (images - x)
        won = _values(goal, model, middle, y, batch_size) > 0
        ahead[won], high[won], low[~won] = middle[won], (low + high)[won] / 2, (low + high)[~won] / 2
    return ahead


# ── Square: without gradients ──


def _side(fraction, h, w, least):
    """Side of the squares after this `fraction` of the queries: their area, 80 % of the image, is halved nine times."""
    halvings = np.sum(fraction > np.array([0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8]))
    side = max(least, round(np.sqrt(0.8 * 0.5**halvings * h * w)))
    return min(h, w, side + (least > 1 and side % 2 == 0))


def _hills(side, h, w):
    """Changes of unit l2 length, a hill beside a hollow in a square of `side`, and that turned: (2, h, w), the square
    in the corner."""

    def hill(rows, columns):
        row, column = np.mgrid[:rows, :columns]
        away = np.maximum(abs(row - rows // 2), abs(column - columns // 2))
        tails = np.cumsum(1 / np.arange(max(rows, columns) // 2 + 1, 0, -1.0) ** 2)[::-1]
        return tails[away]

    square = np.concatenate([hill(side // 2, side), -hill(side - side // 2, side)])
    both, room = np.stack([square, square.T]) / np.linalg.norm(square), ((0, 0), (0, h - side), (0, w - side))
    return np.pad(both, room).astype("float32")


def _place(pattern, row, column):
    """Move the patterns (n, h, w), which lie in the corner, to these rows and columns (n,): (n, h, w, 1)."""
    h, w = tf.shape(pattern)[1], tf.shape(pattern)[2]
    moved = tf.gather(pattern, (tf.range(h) - row[:, None]) % h, axis=1, batch_dims=1)
    return tf.gather(moved, (tf.range(w) - column[:, None]) % w, axis=2, batch_dims=1)[..., None]


def _compile_square(model, shape, norm, bounds, goal):
    """Compile a number of queries of the Square Attack."""
    image, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.float32)
    (h, w, channels), whole = shape, tf.TensorSpec((), tf.int32)

    score_of = inner_graph(lambda x_adv, y: goal(_network(model)(x_adv), y), model)

    def length(change, axis):
        return tf.sqrt(tf.reduce_sum(change**2, axis=axis, keepdims=True)) + 1e-12

    def recoloured(best, x, eps, window, other, hills, sign):
        return tf.where(window > 0, tf.clip_by_value(x + eps * sign, *bounds), best)

    def moved(best, x, eps, window, other, hills, sign):  # the length of both windows, and what is left, into one
        change = best - x
        unused = tf.maximum(eps**2 - length(change, (1, 2, 3)) ** 2, 0.0) / channels
        budget = tf.sqrt(length(change * tf.maximum(window, other), (1, 2)) ** 2 + unused)
        fresh = sign * hills + change * window / length(change * window, (1, 2))
        change = change * (1 - window) * (1 - other) + fresh / length(fresh, (1, 2)) * budget
        return tf.clip_by_value(x + change / length(change, (1, 2, 3)) * eps, *bounds)

    attempt = recoloured if norm == "linf" else moved

    def loop(best, value, x, y, eps, hills, side, seed, first, queries):
        n = tf.shape(x)[0]
        corner = tf.cast((tf.range(h)[:, None] < side) & (tf.range(w) < side), tf.float32)
        square = tf.broadcast_to(corner, (n, h, w))
        for query in tf.range(first, first + queries):
            u = tf.random.stateless_uniform((n, 5 + channels), [seed, query])
            limits = tf.cast(tf.stack([h, w, h, w]) - side + 1, tf.float32)
            top, left, other_top, other_left = tf.unstack(tf.cast(u[:, :4] * limits, tf.int32), axis=1)
            sign = tf.sign(u[:, None, None, 5:] - 0.5)
            window, other = _place(square, top, left), _place(square, other_top, other_left)
            pattern = _place(tf.gather(hills, tf.cast(u[:, 4] < 0.5, tf.int32)), top, left)
            trial = attempt(best, x, eps, window, other, pattern, sign)
            score = score_of(trial, y)
            best, value = _select(score > value, trial, best), tf.maximum(score, value)
        return best, value

    return traced(loop, model, input_signature=[
        image, number, image, tf.TensorSpec((None,), tf.int64), tf.TensorSpec((), tf.float32),
        tf.TensorSpec((2, h, w), tf.float32), whole, whole, whole, whole])  # fmt: skip


def _first_guess(x, threat, rng):
    """Where Square begins: vertical stripes of +-eps (linf), or hills and hollows in a grid of five by five (l2)."""
    n, h, w, c = x.shape
    if threat.norm == "linf":
        change = threat.eps * rng.choice([-1.0, 1.0], (n, 1, w, c))
    else:
        side = max(1, min(h, w) // 5)
        tile = np.tile(_hills(side, side, side)[0], (h // side, w // side))
        signs = rng.choice([-1.0, 1.0], (n, h // side, w // side, c)).repeat(side, axis=1).repeat(side, axis=2)
        change = np.pad(signs * tile[..., None], ((0, 0), (0, h % side), (0, w % side), (0, 0)))
        change *= threat.eps / np.linalg.norm(change.reshape(n, -1), axis=1).reshape(-1, 1, 1, 1)
    return np.clip(x + change, *threat.bounds).astype("float32")


def square(model, x, y, threat, *, queries=5000, start=None, goal=margin, batch_size=500, seed=0):
    """Random search without gradients (Square Attack, Andriushchenko et al. 2020): it sees what a mask hides from them.

    linf: a square of shrinking side gets a random sign of eps in every channel. l2: a square gets the length of
    another, and what clipping left over, as a hill and a hollow. The change stays where the `goal` grows; beaten images
    leave. `start`: images to begin from where they are better than the attack's own beginning.
    """
    y, found = _opening(model, x, y, threat, start, goal, batch_size, queries=queries)
    h, w, _ = x.shape[1:]
    if (left := found.left()).size:
        first = _first_guess(x[left], threat, np.random.default_rng(seed))
        found.offer(first, _values(goal, model, first, y[left], batch_size), left)
    loop = _kept(_compile_square, model, x.shape[1:], threat.norm, threat.bounds, goal)
    for done in range(0, queries, chunk := max(1, queries // 200)):
        active, count = found.left(), min(chunk, queries - done)
        if not active.size:
            break
        side = _side(done / queries, h, w, 1 if threat.norm == "linf" else 3)
        _advance(loop, active, batch_size, (found.images, found.value), (x, y), threat.eps, _hills(side, h, w), side,
                 seed, done, count)
        found.steps[active] += count
    return found


# ── The standard set ──


STANDARD = {  # cheap ones first: each attacks what those before it left
    "PGD on the margin": partial(apgd, loss="margin", steps=20),
    "APGD on the cross-entropy": partial(apgd, steps=100),
    "APGD through wider balls": partial(apgd, steps=100, radii=(3, 2, 1)),
    "APGD-T": partial(apgd, loss="targeted dlr", steps=100),
    "FAB-T": partial(fab, steps=100),
    "Square": partial(square, queries=5000),
}


def standard(model, x, y, threat, *, attacks=None, surrogate=None, goal=margin, batch_size=500, seed=0):
    """A set of attacks after the manner of AutoAttack (Croce & Hein 2020): each on what those before it left.

    attacks : name -> attack, called as `apgd` is; default `STANDARD`. The last begins from the best images so far.
    surrogate : a network of the same kind, trained apart, from which images are transferred before the last attack.
    Returns `Found`, the worst case of every image, and a table: (attack, images, beaten, steps) of each in its turn.
    """
    y, found = _opening(model, x, y, threat, None, goal, batch_size)
    rows, attacks = [("none", len(x), int((found.value > 0).sum()), 0)], list((attacks or STANDARD).items())
    if surrogate is not None:
        attacks.insert(-1, ("transfer", partial(transfer, surrogate=surrogate)))
    for number, (name, attack) in enumerate(attacks, start=1):
        left = found.left()
        if not left.size:
            break
        start = found.images[left] if number == len(attacks) else None
        part = attack(model, x[left], y[left], threat, start=start, goal=goal, batch_size=batch_size, seed=seed)
        found.offer(part.images, part.value, left)
        found.steps[left] += part.steps
        rows.append((name, len(left), len(left) - len(found.left()), int(part.steps.sum())))
    return found, pd.DataFrame(rows, columns=["attack", "images", "beaten", "steps"])


def transfer(model, x, y, threat, *, surrogate, steps=50, start=None, goal=margin, batch_size=500, seed=0):
    """Images made against a `surrogate`, PGD on its margin, and tried on the model: no gradient of the model's own."""
    y, found = _opening(model, x, y, threat, start, goal, batch_size, steps=steps)
    made = pgd(surrogate, x, y, threat, steps=steps, losses=("margin",), goal=goal, batch_size=batch_size, seed=seed)
    found.offer(made, _values(goal, model, made, y, batch_size), np.arange(len(x)))
    found.steps[:] = steps
    return found


def normalised(model, x, y, target, *, step_size=0.1, steps=1000, loss="cross-entropy", goal=margin,
               bounds=(0.0, 1.0), batch_size=100):  # fmt: skip
    """Targeted descent in steps of one L2 length, until the network says `target` (paper 03, Section 2.1).

    The change is not limited, only clipped to valid pixels. `y` are the true labels, which no target may equal; `loss`
    is one of `LOSSES` or a function to descend: the paper's text has the cross-entropy, its code the class score.
    `goal` (logits, target) -> (n,) is below 0 where an image is done, by default where the target is predicted.

    Returns the images, and how many steps each took, (n,) int: `steps` + 1 where the goal was not reached.
    """
    if not callable(loss):
        known("loss", loss, LOSSES)
    threat = ThreatModel("l2", diameter(np.shape(x)[1:], "l2", bounds), bounds)
    y, target = (_checked(model, x, labels, threat, step_size=step_size, steps=steps, batch_size=batch_size)
                 for labels in (y, target))
    if (same := np.flatnonzero(target == y)).size:
        raise ValueError(f"target equals y for the images {same[:5].tolist()}; expected another class than the true")
    loop, current = _kept(_compile_loop, model, x.shape[1:], "l2", threat.bounds, loss, True, None), x.copy()
    eps = np.full((1, 1, 1, 1), threat.eps)
    taken = np.where(_values(goal, model, x, target, batch_size) < 0, 0, steps + 1)
    for step in range(1, steps + 1):
        active = np.flatnonzero(taken > steps)
        for i in range(0, len(active), batch_size):
            b = active[i : i + batch_size]
            moved = loop(current[b], x[b], target[b], x[b], np.zeros(len(b)), eps, step_size, 1)[0]
            current[b] = moved.numpy()
            taken[b[_values(goal, model, current[b], target[b], batch_size) < 0]] = step
    return current, taken


def ddn(model, x, y, *, steps=100, radius=1.0, gamma=0.05, targeted=False, bounds=(0.0, 1.0), batch_size=100):
    """Smallest L2 change found by decoupling direction and norm (DDN, Rony et al. 2019).

    Every step follows the normalised gradient of the cross-entropy, its length falling along a cosine from `radius` to
    a hundredth of it; then the change is cut to a radius of its own for each image, which shrinks by `gamma` where the
    image is beaten and grows by `gamma` where it is not. The shortest change that wins is kept. Images that are not
    beaten, which may lie too far for so few steps, are tried again with four times the radius, until that holds all
    valid images; those that are never beaten come back unchanged.
    """
    threat = ThreatModel("l2", radius, bounds)
    y = _checked(model, x, y, threat, steps=steps, radius=radius, batch_size=batch_size)
    if not 0 < gamma < 1:
        raise ValueError(f"gamma is {gamma}; expected a number above 0 and below 1")
    loop = _kept(_compile_loop, model, x.shape[1:], "l2", threat.bounds, "cross-entropy", targeted, None)
    sign = -1 if targeted else 1
    won = sign * _values(margin, model, x, y, batch_size) > 0
    best, nearness, current = x.copy(), np.where(won, 0, -np.inf), x.copy()
    reach = np.full(len(x), radius, "float32")
    for step in range(steps):
        size = radius * (0.01 + 0.495 * (1 + np.cos(np.pi * step / steps)))
        for i in range(0, len(x), batch_size):
            b = slice(i, i + batch_size)
            current[b] = loop(current[b], x[b], y[b], x[b], np.zeros(len(x[b])), reach[b, None, None, None], size, 1)[0]
        won, length = sign * _values(margin, model, current, y, batch_size) > 0, threat.distance(current, x)
        keep(current, np.where(won, -length, -np.inf), best, nearness, np.arange(len(x)))
        reach *= np.where(won, 1 - gamma, 1 + gamma).astype("float32")
    left = np.flatnonzero(nearness == -np.inf)
    if left.size and radius < diameter(x.shape[1:], "l2", bounds):
        best[left] = ddn(model, x[left], y[left], steps=steps, radius=4 * radius, gamma=gamma, targeted=targeted,
                         bounds=bounds, batch_size=batch_size)
    return best


def lbfgs(model, x, target, *, searches=8, max_iterations=50, weights=(1e-3, 1e3)):
    """Smallest targeted change found by box-constrained L-BFGS (Szegedy et al. 2014; paper 02, III.2.A).

    Minimises weight * ||r||_2^2 + J(x + r, target) for each image with SciPy's L-BFGS-B, the weight found by
    bisection on a log scale between `weights`: the largest at which x + r is still classified as `target`. The
    smallest r that reaches the target is kept; images that never reach it come back unchanged.
    """
    target = _checked(model, x, target, ThreatModel("linf", 0), searches=searches, max_iterations=max_iterations)
    if not 0 < weights[0] < weights[1] < np.inf:
        raise ValueError(f"weights are {weights}; expected 0 < low < high")
    network = inference(model)

    def gradient_and_value(image, label, original, weight):
        def loss(logits, label):
            return weight * tf.reduce_sum((image - original) ** 2) + cross_entropy(logits, label)

        return input_gradient(network, loss, image, label)[:2]

    gradient_and_value = traced(gradient_and_value, model, reduce_retracing=True)

    def objective(flat, original, label, weight):
        image = tf.constant(flat.reshape(original.shape), tf.float32)
        gradient, value = gradient_and_value(image, label, original, tf.constant(weight, tf.float32))
        return float(value[0]), gradient.numpy().astype("float64").ravel()

    best, options = x.copy(), {"maxiter": max_iterations, "ftol": 1e-6}
    for i in range(len(x)):
        original, (low, high), length = x[i : i + 1], np.log(weights), np.inf
        for _ in range(searches):
            weight = np.exp((low + high) / 2)
            found = scipy.optimize.minimize(
                objective, original.ravel().astype("float64"), (original, target[i : i + 1], weight), jac=True,
                method="L-BFGS-B", bounds=[(0, 1)] * original.size, options=options)  # fmt: skip
            image = found.x.reshape(original.shape).astype("float32")
            reached = int(np.argmax(network(image), axis=1)[0]) == target[i]
            low, high = (np.log(weight), high) if reached else (low, np.log(weight))
            if reached and (shortest := float(np.linalg.norm(image - original))) < length:
                best[i], length = image[0], shortest
    return best
