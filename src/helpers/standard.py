"""The standard set, after the manner of AutoAttack (Croce & Hein 2020): APGD, FAB, Square, and their cascade.

They are called as those of `helpers.attacks` are, and give back `Found` as well.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from helpers.attacks import pgd
from helpers.checks import known
from helpers.defence import check_numbers, way
from helpers.losses import LOSSES, TARGETED, on_outputs, wrong_classes
from helpers.models import inner_graph, predict, randomised, traced
from helpers.search import Found, advance, check_finite, direction, input_gradient, opened, select, single
from helpers.threat import diameter, lengths, onto_plane, projection


def _begin(aim, x, y, threat, found, start):
    """Look at `x`, and at `start` in the ball, before the first step; the value of `x` as it is deployed."""
    found.value[:] = clean = aim.values(x, y)
    if start is not None:
        start = threat.project(start, x).numpy()
        aim.offer(found, start, y, np.arange(len(x)))
    return clean.copy()


def _classes(aim, x, y):
    return wrong_classes(predict(aim.path.outputs, x, aim.batch_size).logits, y)


# ── APGD: a step size that follows the progress ──


def _compile_climb(outputs, shape, norm, bounds, loss, goal):
    """Compile `steps` steps of APGD, between which `apgd` halves step sizes."""
    image, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.float32)
    label, scalar, count = (tf.TensorSpec(*spec) for spec in (((None,), tf.int64), ((), tf.float32), ((), tf.int32)))

    def gradient_of(x_adv, y, target):
        climbed = on_outputs(loss)
        losses = (lambda answers, y: climbed(answers, y, target)) if loss in TARGETED else climbed
        return input_gradient(lambda x: single(outputs(x)), losses, x_adv, y)

    gradient_of = inner_graph(gradient_of, outputs)

    def loop(current, before, gradient, top, top_gradient, best, size, last, top_loss, rises, value,
             x, y, target, eps, steps):
        project = projection(x, norm, eps, bounds)
        for _ in tf.range(steps):
            ahead = project(current + size[:, None, None, None] * direction(gradient, norm))
            new = tf.reduce_all(before == current, axis=(1, 2, 3), keepdims=True)  # no momentum yet
            share = tf.where(new, 1.0, 0.75)
            ahead = project(current + share * (ahead - current) + (1 - share) * (current - before))
            before, current = current, ahead
            gradient, losses, answers = gradient_of(current, y, target)
            rises += tf.cast(losses > last, tf.float32)
            last, higher = losses, losses > top_loss
            top, top_gradient = select(higher, current, top), select(higher, gradient, top_gradient)
            top_loss = tf.maximum(losses, top_loss)
            score = goal(answers, y)
            best, value = select(score > value, current, best), tf.maximum(score, value)
        return current, before, gradient, top, top_gradient, best, size, last, top_loss, rises, value

    return traced(loop, outputs, input_signature=[*[image] * 6, *[number] * 5, image, label, label, scalar, count])


def _checkpoints(steps):
    """After which steps APGD looks back: first 22 % of all, then intervals shorter by 3 %, 6 % at least."""
    at, length, points = 0.22, 0.22, []
    while at < 1:
        points.append(int(np.ceil(round(at * steps, 6))))
        length = max(length - 0.03, 0.06)
        at += length
    return sorted(set(points))


def _climb(aim, loop, x, y, target, first, found, eps, radius, steps):
    """One run in the ball of `radius`. Returns where the loss was highest; `found` gets the best, if that is eps."""
    n, none = len(x), np.zeros_like(x)
    current, before, gradient, top, top_gradient = first.copy(), first.copy(), none, first.copy(), none.copy()
    size, last, rises = np.full(n, 2 * radius, "float32"), np.full(n, np.inf, "float32"), np.zeros(n, "float32")
    top_loss, then, halved = np.full(n, -np.inf, "float32"), np.full(n, -np.inf, "float32"), np.zeros(n, bool)
    best, value = x.copy(), np.full(n, -np.inf if radius <= eps else np.inf, "float32")
    if aim.direct and radius <= eps:
        best, value = found.images, found.value
    changing = (current, before, gradient, top, top_gradient, best, size, last, top_loss, rises, value)
    points, since = _checkpoints(steps), 0
    stops = sorted({*points, *range(10, steps, 10), steps})
    for begin, stop in zip([-1, *stops], stops, strict=False):  # one more: the gradient at the start
        active = found.left()
        if not active.size:
            break
        taken = stop - max(begin, 0) + (begin < 0)
        advance(loop, active, aim.batch_size, changing, (x, y, target), radius, taken)
        found.steps[active] += taken
        if not aim.direct and radius <= eps:
            for images in (best, current):
                aim.offer(found, images[active], y, active)
        if stop in points:
            halved = (rises < 0.75 * (stop - since)) | (~halved & (top_loss <= then))
            size[halved] /= 2
            current[halved], before[halved], gradient[halved] = top[halved], top[halved], top_gradient[halved]
            last[halved] = top_loss[halved]
            rises[:], since, then = 0, stop, top_loss.copy()
    check_finite(current, gradient)
    check_numbers(value)
    return top


def apgd(defence, x, y, threat, *, loss=None, steps=100, restarts=1, targets=9, radii=(1.0,), path=None, goal=None,
         start=None, batch_size=500, seed=0):
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): steps with momentum, of a size that halves where progress stops.

    The first step is 2 * eps long. At a checkpoint it is halved, and the run goes on from its highest loss, where less
    than 3/4 of the steps since the last one rose, or nothing better was found at an undiminished size. Beaten images
    leave.

    loss : name in `LOSSES`, a function (Outputs, y) -> (n,), or a name in `TARGETED`: then a run for each of the
        `targets` wrong classes with the largest logits. Default the path's first, or else the log-odds.
    restarts : number of runs (of each target), from random starts.
    radii : factors of eps. A run goes through balls of these sizes, the last of which is the ball itself, and divides
        its steps among them: where gradients mislead near the image, the way may be found from farther away.
    start : images to begin the first run from; default a random start.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, goal=goal, start=start, seed=seed, batch_size=batch_size,
                           steps=steps, restarts=restarts, targets=targets)
    loss = (aim.path.losses or ("log-odds",))[0] if loss is None else loss
    if not callable(loss):
        known("loss", loss, LOSSES | TARGETED)
    if not radii or min(radii) < 1 or radii[-1] != 1:
        raise ValueError(f"radii are {radii}; expected factors >= 1 of eps, the last one 1")
    _begin(aim, x, y, threat, found, start)
    loop = aim.compiled(_compile_climb, x.shape[1:], threat.norm, threat.bounds, loss, aim.goal)
    wrong = _classes(aim, x, y)[:, :targets].T if loss in TARGETED else y[None]
    widest = replace(threat, eps=min(radii[0] * threat.eps, diameter(x.shape[1:], threat.norm, threat.bounds)))
    for run, target in enumerate(np.repeat(wrong, restarts, axis=0)):
        left = found.left()
        if not left.size or not threat.eps:
            break
        part = Found(*(array[left] for array in found))
        first = part.images if start is not None and run == 0 else widest.random_start(x[left], (seed, run))
        for i, factor in enumerate(radii):
            ball = replace(threat, eps=min(factor * threat.eps, widest.eps))
            share = steps * (i + 1) // len(radii) - steps * i // len(radii)
            first = ball.project(first, x[left]).numpy()
            first = _climb(aim, loop, x[left], y[left], target[left], first, part, threat.eps, ball.eps, share)
        for array, rows in zip(found, part, strict=True):
            array[left] = rows
    return found


# ── FAB: along the boundary to the smallest change ──


def _compile_fab(outputs, shape, norm, bounds, goal):
    """Compile `steps` steps of FAB towards one class of each image."""
    image, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.float32)
    label = tf.TensorSpec((None,), tf.int64)

    def gradient_of(x_adv, y, target):
        margin = on_outputs("targeted margin")
        return input_gradient(lambda x: single(outputs(x)), lambda z, y: margin(z, y, target), x_adv, y)[:2]

    gradient_of = inner_graph(gradient_of, outputs)
    score_of = inner_graph(lambda x_adv, y: goal(single(outputs(x_adv)), y), outputs)

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
            best, length = select(shorter, moved, best), tf.where(shorter, change, length)
            current = select(won, x + 0.9 * (moved - x), moved)
        return current, best, length

    count = tf.TensorSpec((), tf.int32)
    return traced(loop, outputs, input_signature=[image, image, number, image, label, label, count])


def fab(defence, x, y, threat, *, steps=100, targets=9, smallest=False, path=None, goal=None, start=None,
        batch_size=500, seed=0):
    """Fast Adaptive Boundary attack, targeted (FAB-T, Croce & Hein 2020): the smallest change that wins.

    Every step goes onto the plane where the linearised network is undecided between the true class and a wrong one,
    within the bounds, drawn a little towards the original; a step that wins goes back a tenth of the way. One run for
    each of the `targets` wrong classes with the largest logits. An image whose change is within eps leaves; others are
    pulled into the ball, and kept if the `goal` likes them better.

    smallest : go on to the smallest change in every image, and return that, whether eps allows it or not; images that
        were never beaten come back unchanged.
    start : images that are kept where they win already; nothing begins there.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, goal=goal, start=start, seed=seed, batch_size=batch_size,
                           steps=steps, targets=targets)
    clean = _begin(aim, x, y, threat, found, start)
    loop = aim.compiled(_compile_fab, x.shape[1:], threat.norm, threat.bounds, aim.goal)
    best, length = x.copy(), np.where(clean > 0, 0, np.inf).astype("float32")
    if not smallest:
        length[found.value > 0] = 0
    reach = np.float32(0 if smallest else threat.radius(x.shape[1:]))
    for target in _classes(aim, x, y)[:, :targets].T:
        current = x.copy()
        for done in range(0, steps, 10):
            active, chunk = np.flatnonzero(length > reach), min(10, steps - done)
            advance(loop, active, batch_size, (current, best, length), (x, y, target), chunk)
            found.steps[active] += chunk
        check_finite(current)
    rows = np.flatnonzero((length > reach) & (length < np.inf))
    if rows.size:
        best[rows] = _shortened(aim, x[rows], y[rows], best[rows])
    if smallest:
        value = aim.values(best, y)
        failed = (value <= 0) & (length > 0)  # won on the path alone
        best[failed] = x[failed]
        return Found(best, np.where(failed, clean, value), found.steps)
    aim.offer(found, threat.project(best, x).numpy(), y, np.arange(len(x)))
    return found


def _shortened(aim, x, y, images):
    """Images that win, on the way from `x` to `images` as near to `x` as ten halvings find."""
    low, high, ahead = np.zeros((len(x), 1, 1, 1), "float32"), np.ones((len(x), 1, 1, 1), "float32"), images.copy()
    for _ in range(10):
        middle = x + (low + high) / 2 * (images - x)
        won = aim.values(middle, y) > 0
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


def _compile_square(outputs, shape, norm, bounds, goal):
    """Compile a number of queries of the Square Attack."""
    image, number = tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.float32)
    (h, w, channels), whole = shape, tf.TensorSpec((), tf.int32)

    score_of = inner_graph(lambda x_adv, y: goal(single(outputs(x_adv)), y), outputs)

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
            best, value = select(score > value, trial, best), tf.maximum(score, value)
        return best, value

    return traced(loop, outputs, input_signature=[
        image, number, image, tf.TensorSpec((None,), tf.int64), tf.TensorSpec((), tf.float32),
        tf.TensorSpec((2, h, w), tf.float32), whole, whole, whole, whole])


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


def square(defence, x, y, threat, *, queries=5000, path=None, goal=None, start=None, batch_size=500, seed=0):
    """Random search without gradients (Square Attack, Andriushchenko et al. 2020): it sees what a mask hides from them.

    linf: a square of shrinking side gets a random sign of eps in every channel. l2: a square gets the length of
    another, and what clipping left over, as a hill and a hollow. The change stays where the `goal` grows; beaten images
    leave. Only what is deployed is asked, whatever the `path`; a random defence once a query, and in the end as often
    as its value needs. `start`: images to begin from where they are better than the attack's own beginning.
    """
    aim, y, found = opened(defence, x, y, threat, path=path, goal=goal, start=start, seed=seed, batch_size=batch_size,
                           queries=queries)
    aim, threat = aim._replace(path=way(aim.defence, None)), replace(threat, eps=threat.radius(x.shape[1:]))
    clean = _begin(aim, x, y, threat, found, start)
    h, w, _ = x.shape[1:]
    if (left := found.left()).size:
        first = _first_guess(x[left], threat, np.random.default_rng(seed))
        found.offer(first, aim.values(first, y[left]), left)
    loop = aim.compiled(_compile_square, x.shape[1:], threat.norm, threat.bounds, aim.goal)
    for done in range(0, queries, chunk := max(1, queries // 200)):
        active, count = found.left(), min(chunk, queries - done)
        if not active.size:
            break
        side = _side(done / queries, h, w, 1 if threat.norm == "linf" else 3)
        advance(loop, active, batch_size, (found.images, found.value), (x, y), threat.eps, _hills(side, h, w), side,
                seed, done, count)
        found.steps[active] += count
    if randomised(aim.defence):  # one lucky draw is no win
        found.value[:] = aim.values(found.images, y)
        worse = found.value < clean
        found.images[worse], found.value[worse] = x[worse], clean[worse]
    return found


# ── The cascade ──


STANDARD = {  # cheap ones first: each attacks what those before it left; on every path but the last, which needs none
    "PGD on the margin": partial(apgd, loss="margin", steps=20),
    "APGD on the cross-entropy": partial(apgd, loss="log-odds", steps=100),
    "APGD through wider balls": partial(apgd, loss="log-odds", steps=100, radii=(3, 2, 1)),
    "APGD-T": partial(apgd, loss="targeted dlr", steps=100),
    "FAB-T": partial(fab, steps=100),
    "Square": partial(square, queries=5000),
}


def standard(defence, x, y, threat, *, attacks=None, paths=None, surrogate=None, goal=None, batch_size=500, seed=0,
             label=None):
    """A set of attacks, each on what those before it left; the last one asks the deployed defence alone.

    attacks : name -> attack, called as `apgd` is; default `STANDARD`. All but the last run on every path. The last
        begins from the best images so far.
    paths : names of the defence's paths; default all of them. Losses of a path's own, and its starts, are tried first.
    surrogate : a network of the same kind, trained apart, from which images are transferred before the last attack.
    label : text of the progress bar; None shows none.

    Returns
    -------
    `Found`, the worst case of every image, and a table (attack, path, images, beaten, steps) of each in its turn.
    """
    aim, y, found = opened(defence, x, y, threat, goal=goal, batch_size=batch_size, seed=seed)
    found.value[:] = aim.values(x, y)
    rows = [("none", "", len(x), int((found.value > 0).sum()), 0)]
    cascade = list(_cascade(aim.defence, paths, dict(attacks or STANDARD), surrogate, seed))
    for name, path, attack in tqdm(cascade, desc=label, disable=label is None, unit="attack"):
        if not (left := found.left()).size:
            break
        options = {"start": found.images[left]} if path is None else {"path": path[1]}
        part = attack(aim.defence, x[left], y[left], threat, goal=goal, batch_size=batch_size, seed=seed, **options)
        found.offer(part.images, part.value, left)
        found.steps[left] += part.steps
        rows.append((name, path[0] if path else "", len(left), len(left) - len(found.left()), int(part.steps.sum())))
    return found, pd.DataFrame(rows, columns=["attack", "path", "images", "beaten", "steps"])


def _cascade(defence, names, attacks, surrogate, seed):
    """(name, (name of the path, path) or None, attack) in the order in which they are run."""
    paths = defence.paths(seed)
    paths = {known("paths", name, paths): paths[name] for name in (paths if names is None else names)}
    *gradient, last = attacks.items()
    for name, path in paths.items():
        for number, loss in enumerate(path.losses, start=1):
            yield f"APGD on the path's loss {number}", (name, path), partial(apgd, loss=loss)
        for number, make in enumerate(path.starts, start=1):
            yield f"APGD from the path's start {number}", (name, path), partial(_from_start, make=make)
    for name, attack in gradient:
        for path in paths.items():
            yield name, path, attack
    if surrogate is not None:
        yield "transfer", ("surrogate", way(defence, surrogate)), partial(pgd, steps=50, losses=("margin",))
    yield last[0], None, last[1]


def _from_start(defence, x, y, threat, *, make, seed=0, **options):
    return apgd(defence, x, y, threat, start=make(x, y, threat, seed), seed=seed, **options)
