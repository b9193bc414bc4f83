"""Attacks on a classifier: one loop (gradient, step, project), and the published attacks as names over it.

Every attack takes `model`, a Keras network or any TensorFlow function from images to logits; images `x`, float32
(n, h, w, c) in [0, 1]; integer labels `y` (n,), the true ones, or the wanted ones when `targeted`. It gives
adversarial images of the shape of `x`, float32, and never changes the network (`training=False`). A function is called
anew for every step, since it may be random; with an attribute `randomised = False` it is compiled, as networks are.
Bad input raises before any computation: TypeError for shape and dtype, ValueError for values.
"""

from functools import partial

import numpy as np
import scipy.optimize
import tensorflow as tf

from helpers.models import check_logits, graph_of, inference, own_graph, predict, randomised, traced
from helpers.profiles import known
from helpers.threat import ThreatModel, check_images, check_labels, check_positive, diameter, projection


def margin(logits, y):
    """Largest wrong logit minus the true logit, (n,): positive where the prediction is wrong."""
    true = tf.one_hot(y, tf.shape(logits)[1], on_value=True, off_value=False)
    return tf.reduce_max(tf.where(true, -np.inf, logits), axis=1) - tf.gather(logits, y, batch_dims=1)


def cross_entropy(logits, y):
    """Cross-entropy of each image in nats, (n,), from logits."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)


def minus_logit(logits, y):
    """Minus the logit of `y`, (n,): to descend it is to raise the class, whatever the others do."""
    return -tf.gather(logits, y, batch_dims=1)


LOSSES = {"cross-entropy": cross_entropy, "margin": margin, "logit": minus_logit}


def input_gradient(network, loss, x, y):
    """Gradient by the images `x` of `loss(network(x), y)`, zero where nothing connects; the losses; the logits."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = network(x)
        losses = loss(logits, y)
    return tape.gradient(losses, x, unconnected_gradients="zero"), losses, logits


def _loop(model, *settings):
    """The compiled loop of `_compile`, kept on the model for the next call with these settings."""
    return graph_of(model, ("loop", *settings), partial(_compile, model, *settings))


def _compile(model, shape, norm, bounds, loss, targeted, goal):
    """Compile `steps` ascent steps for one network; sizes, eps and step size stay tensors, so nothing is retraced.

    With a `goal` the best of the images at which a gradient was taken is kept, which costs no further pass.
    """
    images, labels, per_image = (tf.TensorSpec((None, *rest), kind) for rest, kind in (
        (shape, tf.float32), ((), tf.int64), ((), tf.float32)))  # fmt: skip
    number, count = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.int32)
    radius = tf.TensorSpec((None, 1, 1, 1), tf.float32)  # one for all images, or one for each
    sign = -1.0 if targeted else 1.0

    def network(x):
        return tf.cast(inference(model)(x), tf.float32)

    def gradient_of(x_adv, y):
        return input_gradient(network, LOSSES.get(loss, loss), x_adv, y)

    if not randomised(model):
        gradient_of = own_graph(gradient_of)

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
    loop = _loop(model, x.shape[1:], threat.norm, threat.bounds, loss, targeted, goal)
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
        check_images(start, "start", threat.bounds)
        if start.shape != x.shape:
            raise ValueError(f"start has shape {start.shape}; expected that of x, {x.shape}")
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


def square(model, x, y, eps, *, queries=500, batch_size=500, seed=0):
    """Gradient-free random search over squares of +-eps in linf (Square Attack, Andriushchenko et al. 2020).

    A square of shrinking side gets a random sign in every channel; the change stays where the margin grows.
    It cannot be fooled by a masked gradient, which is what it is for.
    """
    threat = ThreatModel("linf", eps)
    y, rng = _checked(model, x, y, threat, queries=queries, batch_size=batch_size), np.random.default_rng(seed)
    n, h, w, c = x.shape
    best, score = x.copy(), _values(margin, model, x, y, batch_size)
    stripes = np.clip(x + eps * rng.choice([-1.0, 1.0], (n, 1, w, c)), 0, 1).astype("float32")
    keep(stripes, _values(margin, model, stripes, y, batch_size), best, score, np.arange(n))
    for query in range(1, queries):
        active = np.flatnonzero(score <= 0)
        side = min(h, w, max(1, round(np.sqrt(0.8 * 0.5 ** (8 * query / queries) * h * w))))
        for i in range(0, len(active), batch_size):
            b = active[i : i + batch_size]
            row, column = rng.integers(0, h - side + 1, len(b)), rng.integers(0, w - side + 1, len(b))
            inside = (np.abs(np.arange(h) - row[:, None] - (side - 1) / 2) < side / 2)[:, :, None, None]
            inside = inside & (np.abs(np.arange(w) - column[:, None] - (side - 1) / 2) < side / 2)[:, None, :, None]
            signs = rng.choice([-1.0, 1.0], (len(b), 1, 1, c))
            trial = np.where(inside, np.clip(x[b] + eps * signs, 0, 1), best[b]).astype("float32")
            keep(trial, _values(margin, model, trial, y[b], batch_size), best, score, b)
    return best


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
    loop, current = _loop(model, x.shape[1:], "l2", threat.bounds, loss, True, None), x.copy()
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
    loop, sign = _loop(model, x.shape[1:], "l2", threat.bounds, "cross-entropy", targeted, None), -1 if targeted else 1
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
