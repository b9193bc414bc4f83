"""Attacks that follow gradients: one loop (gradient, step, project), and the published attacks as names over it.

Every attack is a call `attack(defence, x, y, threat, ...)` and gives back `Found`: images `x`, float32 (n, h, w, c) in
[0, 1], integer labels `y` (n,), the true ones, and a `ThreatModel`. `defence` is a `helpers.defence.Defence`, a Keras
network or a function from images to logits, and is never changed. `path` is what is differentiated in its place: a name
of its own paths, a `Path` or a network. The best image on what is deployed is kept, whatever path it was found by. With
a `target`, the wanted classes (n,), losses are descended, and an image has won where its target is predicted. Bad input
raises before any step: TypeError for shape and dtype, ValueError for values.
"""

import numpy as np
import scipy.optimize
import tensorflow as tf

from helpers.losses import LOSSES, cross_entropy, evasion, margin, on_outputs  # noqa: F401
from helpers.models import inner_graph, traced
from helpers.search import Found, advance, check_finite, direction, input_gradient, opened, select, single
from helpers.threat import diameter, projection


def _compile_loop(outputs, shape, norm, bounds, loss, descend, goal):
    """Compile `steps` steps on one path; sizes, eps and step size stay tensors, so nothing is retraced.

    With a `goal` the best of the images at which a gradient was taken is kept, which costs no further pass.
    """
    images, label, value = (tf.TensorSpec((None, *rest), kind) for rest, kind in (
        (shape, tf.float32), ((), tf.int64), ((), tf.float32)))
    number, count = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.int32)
    radius = tf.TensorSpec((None, 1, 1, 1), tf.float32)  # one for all images, or one for each
    sign = -1.0 if descend else 1.0

    def gradient_of(x_adv, y):
        return input_gradient(lambda x: single(outputs(x)), on_outputs(loss, descend), x_adv, y)

    gradient_of = inner_graph(gradient_of, outputs)

    def loop(x_adv, best, best_score, x, y, eps, step_size, steps):
        project = projection(x, norm, eps, bounds)
        for _ in tf.range(steps):
            gradient, _, answers = gradient_of(x_adv, y)
            if goal:
                score = goal(answers, y)
                best, best_score = select(score > best_score, x_adv, best), tf.maximum(score, best_score)
            x_adv = project(x_adv + step_size * direction(sign * gradient, norm))
        return x_adv, best, best_score

    return traced(loop, outputs, input_signature=[images, images, value, images, label, radius, number, count])


def _loop(aim, x, threat, loss, goal=None):
    """The compiled loop for this aim, kept on the path."""
    return aim.compiled(_compile_loop, x.shape[1:], threat.norm, threat.bounds, loss, aim.descend, goal)


def _move(aim, x, y, threat, loss, rows, current, reach, step_size, steps):
    """Take `steps` steps from the `rows` of `current`, in place, each image within `reach` (n,) of its original."""
    loop = _loop(aim, x, threat, loss)

    def moved(current, x, y, reach, none, *rest):
        return loop(current, x, none, x, y, reach[:, None, None, None], *rest)[:1]

    reach = np.asarray(reach, "float32")
    advance(moved, rows, aim.batch_size, (current,), (x, y, reach, np.zeros_like(reach)), step_size, steps)


def fgsm(defence, x, y, threat, *, loss="cross-entropy", target=None, path=None, batch_size=500):
    """Fast gradient sign method: one step of length eps (Goodfellow et al. 2015; paper 02, Eqn. 1).

    In l2 the step follows the normalised gradient.
    """
    return bim(defence, x, y, threat, steps=1, loss=loss, target=target, path=path, batch_size=batch_size)


def bim(defence, x, y, threat, *, steps=10, step_size=None, loss="cross-entropy", target=None, path=None,
        batch_size=500):
    """Basic iterative method, I-FGSM: `steps` steps from x in the ball (Kurakin et al. 2017; paper 02, Eqn. 2).

    `step_size` defaults to eps / steps. Reports the last iterate, as published.
    """
    aim, y, _ = opened(defence, x, y, threat, path=path, target=target, batch_size=batch_size, steps=steps,
                       step_size=step_size)
    _check_losses([loss])
    current, step_size = x.copy(), step_size or threat.radius(x.shape[1:]) / steps
    _move(aim, x, y, threat, loss, np.arange(len(x)), current, np.full(len(x), threat.eps), step_size, steps)
    check_finite(current)
    return Found(current, aim.values(current, y), np.full(len(x), steps))


def _check_losses(losses):
    if not losses or isinstance(losses, str) or any(not callable(name) and name not in LOSSES for name in losses):
        raise ValueError(f"losses is {losses!r}; expected a tuple of functions or of {tuple(LOSSES)}")


def _check_l2(threat):
    if threat.norm != "l2":
        raise ValueError(f"threat has the norm {threat.norm!r}; expected 'l2'")


def pgd(defence, x, y, threat, *, steps=40, step_size=None, restarts=1, losses=None, path=None, goal=None, target=None,
        start=None, compact=False, batch_size=500, seed=0):
    """Projected gradient descent with random starts (Madry et al. 2018); the best iterate of all restarts is kept.

    A run's last iterate, at which no gradient is taken, is looked at where none before it has won. Where the path is
    not what is deployed, every fifth iterate is tried on that.

    step_size : length of a step in pixel units; default 2.5 * eps / steps.
    restarts : number of random starts; restart r uses loss `losses[r % len(losses)]`, each one of `LOSSES` or a
        function (Outputs, y) -> (n,) to ascend; default those of the path, or else the log-odds, whose gradient has
        the direction of the cross-entropy's and does not vanish where the softmax saturates.
    goal : function (Outputs, labels) -> (n,), above 0 where the attack has won; the iterate that it values most is
        kept. Default `losses.evasion`, with a target `losses.reached`.
    start : images (n, h, w, c) to begin the first run from, e.g. the result at a smaller eps; default a random start.
    compact : let images already beaten leave the batch: the same images are beaten, sooner, and not driven further.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, goal=goal, target=target, start=start, seed=seed,
                           batch_size=batch_size, restarts=restarts, steps=steps, step_size=step_size)
    losses, every = losses if losses is not None else aim.path.losses or ("log-odds",), np.arange(len(x))
    _check_losses(losses)
    step_size = step_size or 2.5 * threat.radius(x.shape[1:]) / steps
    if compact:  # what is beaten without an attack is not attacked
        aim.offer(found, x, y, every)
    for restart in range(restarts):
        rows = found.left() if compact else every
        if not rows.size:
            break
        if start is not None and restart == 0:
            first = threat.project(start, x).numpy()
        else:
            first = threat.random_start(x, (seed, restart))
        loss = losses[restart % len(losses)]
        _ascend(aim, x, y, threat, loss, first, rows, found, steps, step_size, compact)
    if not compact:
        aim.offer(found, x, y, every)
    return found


def _ascend(aim, x, y, threat, loss, first, rows, found, steps, step_size, compact):
    """One run from `first` on the images `rows`; what it finds goes into `found`."""
    loop, eps = _loop(aim, x, threat, loss, aim.goal), np.full((1, 1, 1, 1), threat.eps, "float32")
    current, best, score = first.copy(), first.copy(), np.full(len(x), -np.inf, "float32")
    active, chunk = rows, 5 if compact or not aim.direct else steps
    for done in range(0, steps, chunk):
        advance(lambda *rest: loop(*rest[:5], eps, *rest[5:]), active, aim.batch_size,
                (current, best, score), (x, y), step_size, min(chunk, steps - done))
        found.steps[active] += min(chunk, steps - done)
        if not aim.direct:
            aim.offer(found, current[active], y, active)
        if compact:  # images already beaten leave; the others fill whole batches again
            active = active[(score if aim.direct else found.value)[active] <= 0]
        if not active.size:
            break
    check_finite(current)
    if aim.direct:
        found.offer(best[rows], score[rows], rows)
    else:
        aim.offer(found, best[rows], y, rows)
    aim.offer(found, current[rows], y, rows)


def normalised(defence, x, y, threat, *, target, step_size=0.1, steps=1000, loss="cross-entropy", path=None, goal=None,
               batch_size=100):
    """Targeted descent in steps of one l2 length, until the defence says `target` (paper 03, Section 2.1).

    The paper does not limit the change: its threat is l2 with eps = inf. `loss` is one of `LOSSES` or a function to
    descend: the paper's text has the cross-entropy, its code the class score. Asks what is deployed after every step;
    an image stops where the `goal` is reached, and has taken `steps` + 1 where it never is.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, goal=goal, target=target, batch_size=batch_size,
                           steps=steps, step_size=step_size)
    _check_losses([loss])
    _check_l2(threat)
    found.value[:], reach = aim.values(x, y), np.full(len(x), threat.eps)
    found.steps[:] = np.where(found.value > 0, 0, steps + 1)
    for step in range(1, steps + 1):
        if not (active := np.flatnonzero(found.steps > steps)).size:
            break
        _move(aim, x, y, threat, loss, active, found.images, reach, step_size, 1)
        found.value[active] = aim.values(found.images[active], y[active])
        found.steps[active[found.value[active] > 0]] = step
    return found


def ddn(defence, x, y, threat, *, steps=100, radius=1.0, gamma=0.05, target=None, path=None, batch_size=100):
    """Smallest l2 change found by decoupling direction and norm (DDN, Rony et al. 2019); eps of `threat` may be inf.

    Every step follows the normalised gradient of the cross-entropy, its length falling along a cosine from `radius` to
    a hundredth of it; then the change is cut to a radius of its own for each image, which shrinks by `gamma` where the
    image is beaten and grows by `gamma` where it is not. The shortest change that wins is kept. Images that are not
    beaten, which may lie too far for so few steps, are tried again with four times the radius, until that holds all
    valid images; those that are never beaten come back unchanged.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, target=target, batch_size=batch_size, steps=steps,
                           radius=radius)
    _check_l2(threat)
    if not 0 < gamma < 1:
        raise ValueError(f"gamma is {gamma}; expected a number above 0 and below 1")
    found.value[:] = aim.values(x, y)
    nearness, left, largest = np.where(found.value > 0, 0, -np.inf), np.arange(len(x)), diameter(x.shape[1:], "l2",
                                                                                                 threat.bounds)
    while left.size:
        _ddn(aim, x, y, threat, found, nearness, left, steps, radius, gamma)
        left, radius = np.flatnonzero(nearness == -np.inf), 4 * radius
        if radius >= 4 * largest:
            break
    return found


def _ddn(aim, x, y, threat, found, nearness, rows, steps, radius, gamma):
    """One run of DDN from `radius` on the images `rows`; shorter changes that win go into `found` and `nearness`."""
    current, reach = x.copy(), np.full(len(x), radius, "float32")
    for step in range(steps):
        size = radius * (0.01 + 0.495 * (1 + np.cos(np.pi * step / steps)))
        _move(aim, x, y, threat, "cross-entropy", rows, current, np.minimum(reach, threat.eps), size, 1)
        value, length = aim.values(current[rows], y[rows]), threat.distance(current[rows], x[rows])
        better = (value > 0) & (-length > nearness[rows])
        at = rows[better]
        found.images[at], found.value[at], nearness[at] = current[at], value[better], -length[better]
        reach[rows] *= np.where(value > 0, 1 - gamma, 1 + gamma).astype("float32")
    found.steps[rows] += steps


def lbfgs(defence, x, y, threat, *, target, searches=8, max_iterations=50, weights=(1e-3, 1e3), path=None):
    """Smallest targeted change found by box-constrained L-BFGS (Szegedy et al. 2014; paper 02, III.2.A).

    Minimises weight * ||r||_2^2 + J(x + r, target) for each image with SciPy's L-BFGS-B, the weight found by
    bisection on a log scale between `weights`: the largest at which x + r is still classified as `target`. The
    smallest r that reaches the target is kept, if eps of `threat`, l2, allows it; images that never reach it come back
    unchanged.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, target=target, searches=searches,
                           max_iterations=max_iterations)
    _check_l2(threat)
    if not 0 < weights[0] < weights[1] < np.inf:
        raise ValueError(f"weights are {weights}; expected 0 < low < high")
    found.value[:], options = aim.values(x, y), {"maxiter": max_iterations, "ftol": 1e-6}
    objective = aim.compiled(_compile_objective)
    for i in range(len(x)):
        original, (low, high), length = x[i : i + 1], np.log(weights), np.inf
        for _ in range(searches):
            weight = np.exp((low + high) / 2)
            result = scipy.optimize.minimize(
                objective, original.ravel().astype("float64"), (original, y[i : i + 1], weight), jac=True,
                method="L-BFGS-B", bounds=[threat.bounds] * original.size, options=options)
            image = result.x.reshape(original.shape).astype("float32")
            value, change = aim.values(image, y[i : i + 1])[0], threat.distance(image, original)[0]
            low, high = (np.log(weight), high) if value > 0 else (low, np.log(weight))
            found.steps[i] += result.nfev
            if value > 0 and change < min(length, threat.eps):
                found.images[i], found.value[i], length = image[0], value, change
    return found


def _compile_objective(outputs):
    """weight * ||r||_2^2 + J and its gradient by the image, as functions of flat float64 arrays for SciPy."""
    def gradient_and_value(image, label, original, weight):
        def loss(answers, label):
            change = weight * tf.reduce_sum((image - original) ** 2)
            return change + on_outputs("cross-entropy", descend=True)(answers, label)

        return input_gradient(lambda x: single(outputs(x)), loss, image, label)[:2]

    gradient_and_value = traced(gradient_and_value, outputs, reduce_retracing=True)

    def objective(flat, original, label, weight):
        image = tf.constant(flat.reshape(original.shape), tf.float32)
        gradient, value = (part.numpy() for part in gradient_and_value(image, label, original,
                                                                       tf.constant(weight, tf.float32)))
        check_finite(gradient, value)  # SciPy would stop at once, as if there were nothing to find
        return float(value[0]), gradient.astype("float64").ravel()

    return objective
