"""Attacks on a classifier: one loop (gradient, step, project), and the published attacks as names over it.

Every attack takes `model`, a Keras network or any TensorFlow function from images to logits; images `x`, float32
(n, h, w, c) in [0, 1]; integer labels `y` (n,), the true ones, or the wanted ones when `targeted`. It gives
adversarial images of the shape of `x`, float32, and never changes the network (`training=False`).
Bad input raises before any computation: TypeError for shape and dtype, ValueError for values.
"""

from functools import lru_cache

import numpy as np
import scipy.optimize
import tensorflow as tf

from helpers.models import check_logits, compiled, inference
from helpers.threat import ThreatModel, check_images, check_labels, project


def margin(logits, y):
    """Largest wrong logit minus the true logit, (n,): positive where the prediction is wrong."""
    true = tf.one_hot(y, tf.shape(logits)[1], on_value=True, off_value=False)
    return tf.reduce_max(tf.where(true, -np.inf, logits), axis=1) - tf.gather(logits, y, batch_dims=1)


def cross_entropy(logits, y):
    """Cross-entropy of each image in nats, (n,), from logits."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)


LOSSES = {"cross-entropy": cross_entropy, "margin": margin}


@lru_cache(maxsize=32)
def _loop(model, shape, norm, bounds, loss, targeted, keep_best, success=margin):
    """Compile `steps` ascent steps for one network; sizes, eps and step size stay tensors, so nothing is retraced."""
    images, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((), tf.float32)
    per_image = tf.TensorSpec((None,), tf.float32)
    labels, count = tf.TensorSpec((None,), tf.int64), tf.TensorSpec((), tf.int32)
    objective, sign = LOSSES.get(loss, loss), -1.0 if targeted else 1.0

    def logits_of(x):
        return tf.cast(inference(model)(x), tf.float32)

    def better(x_adv, logits, y, best, best_score):
        score = sign * success(logits, y)
        won = score > best_score
        return tf.where(won[:, None, None, None], x_adv, best), tf.where(won, score, best_score)

    @tf.function(input_signature=[images, images, labels, images, per_image, number, number, count])
    def loop(x_adv, x, y, best, best_score, eps, step_size, steps):
        for _ in tf.range(steps):
            with tf.GradientTape() as tape:
                tape.watch(x_adv)
                logits = logits_of(x_adv)
                value = sign * objective(logits, y)
            gradient = tape.gradient(value, x_adv, unconnected_gradients="zero")
            if keep_best:
                best, best_score = better(x_adv, logits, y, best, best_score)
            x_adv = project(x_adv + step_size * _direction(gradient, norm), x, norm, eps, bounds)
        if keep_best:
            best, best_score = better(x_adv, logits_of(x_adv), y, best, best_score)
        return x_adv, best, best_score

    return loop


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
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; expected a number > 0")
    y = np.asarray(y)
    check_labels(y, len(x), check_logits(model, x).shape[1])
    return y.astype("int64")


def _ascend(
    model, x, y, start, threat, *, steps, step_size, loss, targeted, keep_best, compact, batch_size, success=margin
):
    """Run the loop over batches. Returns (images, scores): last iterates, or the best ones with `keep_best`."""
    loop = _loop(model, x.shape[1:], threat.norm, threat.bounds, loss, targeted, keep_best, success)
    current, best, score = start.copy(), start.copy(), np.full(len(x), -np.inf, "float32")
    active, chunk = np.arange(len(x)), 5 if compact else steps
    for done in range(0, steps, chunk):
        for i in range(0, len(active), batch_size):
            b = active[i : i + batch_size]
            out = loop(current[b], x[b], y[b], best[b], score[b], threat.eps, step_size, min(chunk, steps - done))
            current[b], best[b], score[b] = (t.numpy() for t in out)
        if compact:  # images already beaten leave; the others fill whole batches again
            active = active[score[active] <= 0]
    if not np.isfinite(current).all():
        raise FloatingPointError("the model's gradient is not finite on some images: no attack can follow it")
    return (best, score) if keep_best else (current, score)


def _margins(model, x, y, batch_size, success=margin):
    graph, parts = compiled(model), range(0, len(x), batch_size)
    logits = np.concatenate([graph(tf.constant(x[i : i + batch_size])) for i in parts])
    return success(tf.constant(logits, tf.float32), y).numpy()


def fgsm(model, x, y, eps, *, targeted=False, bounds=(0.0, 1.0), batch_size=500):
    """Fast gradient sign method: one step of size `eps` (Goodfellow et al. 2015; paper 02, Eqn. 1)."""
    return bim(model, x, y, eps, steps=1, step_size=eps or 1.0, targeted=targeted, bounds=bounds, batch_size=batch_size)


def bim(model, x, y, eps, *, steps=10, step_size=None, targeted=False, bounds=(0.0, 1.0), batch_size=500):
    """Basic iterative method, I-FGSM: `steps` sign steps from x, clipped to the ball (Kurakin et al. 2017; Eqn. 2).

    `step_size` defaults to eps / steps. Reports the last iterate, as published.
    """
    threat = ThreatModel("linf", eps, bounds)
    y = _checked(model, x, y, threat, steps=steps, step_size=step_size, batch_size=batch_size)
    return _ascend(
        model, x, y, x, threat, steps=steps, step_size=step_size or eps / steps, loss="cross-entropy",
        targeted=targeted, keep_best=False, compact=False, batch_size=batch_size,
    )[0]  # fmt: skip


def pgd(
    model, x, y, threat, *, steps=40, step_size=None, restarts=1, losses=("cross-entropy",), start=None,
    targeted=False, compact=False, success=margin, batch_size=500, seed=0,
):  # fmt: skip
    """Projected gradient descent with random starts (Madry et al. 2018); the best iterate of all restarts is kept.

    Parameters
    ----------
    threat : ThreatModel, linf or l2.
    step_size : length of a step in pixel units; default 2.5 * eps / steps.
    restarts : number of random starts; restart r uses loss `losses[r % len(losses)]`, each "cross-entropy",
        "margin" or a function (logits, y) -> (n,) to ascend. The margin does not vanish where the softmax saturates.
    start : images (n, h, w, c) to begin the first run from, e.g. the result at a smaller eps; default a random start.
    compact : let images already beaten leave the batch. The same images are beaten, in less time; the
        margins of the beaten ones are then not driven further.
    success : function (logits, y) -> (n,) by which the best iterate is chosen, positive where an image is beaten.
    """
    y = _checked(model, x, y, threat, steps=steps, step_size=step_size, restarts=restarts, batch_size=batch_size)
    if not losses or isinstance(losses, str) or any(not callable(name) and name not in LOSSES for name in losses):
        raise ValueError(f"losses is {losses!r}; expected a tuple of functions or of {tuple(LOSSES)}")
    if start is not None:
        check_images(start, "start", threat.bounds)
        if start.shape != x.shape:
            raise ValueError(f"start has shape {start.shape}; expected that of x, {x.shape}")
    best, score = x.copy(), (-1 if targeted else 1) * _margins(model, x, y, batch_size, success)
    for restart in range(restarts):
        warm = start is not None and restart == 0
        first = threat.project(start, x).numpy() if warm else threat.random_start(x, (seed, restart))
        active = np.flatnonzero(score <= 0) if compact else np.arange(len(x))
        if not active.size:
            break
        images, scores = _ascend(
            model, x[active], y[active], first[active], threat, steps=steps,
            step_size=step_size or 2.5 * threat.eps / steps, loss=losses[restart % len(losses)],
            targeted=targeted, keep_best=True, compact=compact, batch_size=batch_size, success=success,
        )  # fmt: skip
        won = scores > score[active]
        best[active[won]], score[active[won]] = images[won], scores[won]
    return best


def square(model, x, y, eps, *, queries=500, batch_size=500, seed=0):
    """Gradient-free random search over squares of +-eps in linf (Square Attack, Andriushchenko et al. 2020).

    A square of shrinking side gets a random sign in every channel; the change stays where the margin grows.
    It cannot be fooled by a masked gradient, which is what it is for.
    """
    threat = ThreatModel("linf", eps)
    y, rng = _checked(model, x, y, threat, queries=queries, batch_size=batch_size), np.random.default_rng(seed)
    n, h, w, c = x.shape
    best, score = x.copy(), _margins(model, x, y, batch_size)
    stripes = np.clip(x + eps * rng.choice([-1.0, 1.0], (n, 1, w, c)), 0, 1).astype("float32")
    stripes_score = _margins(model, stripes, y, batch_size)
    won = stripes_score > score
    best[won], score[won] = stripes[won], stripes_score[won]
    for query in range(1, queries):
        active = np.flatnonzero(score <= 0)
        if not active.size:
            break
        side = min(h, w, max(1, round(np.sqrt(0.8 * 0.5 ** (8 * query / queries) * h * w))))
        for i in range(0, len(active), batch_size):
            b = active[i : i + batch_size]
            row, column = rng.integers(0, h - side + 1, len(b)), rng.integers(0, w - side + 1, len(b))
            inside = (np.abs(np.arange(h) - row[:, None] - (side - 1) / 2) < side / 2)[:, :, None, None]
            inside = inside & (np.abs(np.arange(w) - column[:, None] - (side - 1) / 2) < side / 2)[:, None, :, None]
            signs = rng.choice([-1.0, 1.0], (len(b), 1, 1, c))
            trial = np.where(inside, np.clip(x[b] + eps * signs, 0, 1), best[b]).astype("float32")
            trial_score = _margins(model, trial, y[b], batch_size)
            won = trial_score > score[b]
            best[b[won]], score[b[won]] = trial[won], trial_score[won]
    return best


def lbfgs(model, x, target, *, searches=8, max_iterations=50, weights=(1e-3, 1e3)):
    """Smallest targeted change found by box-constrained L-BFGS (Szegedy et al. 2014; paper 02, III.2.A).

    Minimises weight * ||r||_2^2 + J(x + r, target) for each image with SciPy's L-BFGS-B, the weight found by
    bisection on a log scale between `weights`: the largest at which x + r is still classified as `target`. The
    smallest r that reaches the target is kept; images that never reach it come back unchanged.
    """
    target = _checked(model, x, target, ThreatModel("linf", 0), searches=searches, max_iterations=max_iterations)
    logits_of = inference(model)

    @tf.function(reduce_retracing=True)
    def value_and_gradient(image, label, original, weight):
        with tf.GradientTape() as tape:
            tape.watch(image)
            value = weight * tf.reduce_sum((image - original) ** 2) + cross_entropy(logits_of(image), label)[0]
        return value, tape.gradient(value, image, unconnected_gradients="zero")

    def minimise(original, label, weight):
        def objective(flat):
            image = tf.constant(flat.reshape(original.shape), tf.float32)
            value, gradient = value_and_gradient(image, label, original, tf.constant(weight, tf.float32))
            return float(value), gradient.numpy().astype("float64").ravel()

        found = scipy.optimize.minimize(
            objective, original.ravel().astype("float64"), jac=True, method="L-BFGS-B",
            bounds=[(0, 1)] * original.size, options={"maxiter": max_iterations, "ftol": 1e-6},
        )  # fmt: skip
        return found.x.reshape(original.shape).astype("float32")

    best = x.copy()
    for i in range(len(x)):
        (low, high), length = np.log(weights), np.inf
        for _ in range(searches):
            weight = np.exp((low + high) / 2)
            image = minimise(x[i : i + 1], target[i : i + 1], weight)
            reached = int(np.argmax(logits_of(image), axis=1)[0]) == target[i]
            low, high = (np.log(weight), high) if reached else (low, np.log(weight))
            if reached and (shortest := float(np.linalg.norm(image - x[i]))) < length:
                best[i], length = image[0], shortest
    return best
