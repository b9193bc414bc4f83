"""Could the attack have found something? The binarization test and the six indicators of attack failure, as flags.

An attack is here any function (defence, x, y, threat) -> `Found`, such as `standard.apgd` or a `partial` of it. Both
tests run it on one image at a time, on defences of their own making, and never look inside.
"""

import weakref
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf
from sklearn.svm import SVC

from helpers import flags
from helpers.checks import check_images, check_labels, check_positive
from helpers.defence import Outputs, Path, as_defence, check_defence, way
from helpers.losses import evasion
from helpers.models import inference, part, predict, randomised
from helpers.search import single
from helpers.threat import along, diameter

# ── The binarization test ──


class Readout:
    """Two logits read from the features of a network, by weights that are set anew for each image."""

    def __init__(self, features, width):
        self.features, self.randomised = inference(features), randomised(features)
        self.weights, self.bias = tf.Variable(tf.zeros((width, 1))), tf.Variable(0.0)

    def __call__(self, x):
        """Logits (n, 2); the second is larger where the features lie beyond the boundary."""
        score = tf.cast(self.features(x), tf.float32) @ self.weights + self.bias
        return tf.concat([-score / 2, score / 2], axis=1)

    def fit(self, inner, outer, spread, closeness):
        """Put the boundary between the features `inner` (n, width) and the one `outer`, and close to that.

        Its logits then spread as widely as the network's. Returns whether `outer` lies beyond the boundary.
        """
        h, scale = np.vstack([inner, outer]).astype("float64"), max(np.abs(inner).max(), 1e-12)
        svm = SVC(kernel="linear", C=1e6).fit(h / scale, np.arange(len(h)) == len(inner))
        weights, bias = svm.coef_[0] / scale, svm.intercept_[0]
        score = h @ weights + bias
        factor = spread / max(np.abs(score).max(), 1e-12)
        self.weights.assign(factor * weights[:, None])
        self.bias.assign(factor * (bias - closeness * score[-1]))
        return score[-1] > 0


def binarization(defence, attack, x, threat, *, path=None, features=None, inner=None, closeness=0.999, draws=200,
                 seed=0):
    """Does `attack` find an adversarial image that is known to exist? (Zimmermann et al. 2022)

    For each image the last layer of the network gives way to a readout with two classes: it tells points within
    0.95 eps of the image from one point at eps, and its boundary lies close to that point. An attack that is strong
    enough for the network finds such a point; one that does not would have found nothing on the network either.

    path : what is differentiated in the place of the `defence`, and read here.
    features : network or function from images to features (n, width) that the readout reads; default what enters the
        last dense layer of a Keras network, behind what comes before it, and the logits of anything else.
    inner : points within; default as many as a linear boundary can always tell from the last, width - 1, at most 999.
    closeness : where the boundary lies between the points within (0) and the one at eps (1).
    draws : random points of the ball that are tried on each image: where they find one, the test asks too little.
    Returns two rows of `helpers.flags`: the attack's success, and that of random points.
    Raises ValueError where no image has a readout that tells its points apart.
    """
    check_images(x, bounds=threat.bounds)
    check_positive(draws=draws)
    defence = as_defence(defence)
    check_defence(defence, x)
    outputs = way(defence, path).outputs
    features = _features(outputs) if features is None else features
    width = predict(features, x[:1], 1).shape[1]
    readout, none, found, lucky = Readout(features, width), np.zeros(1, "int64"), [], []
    for i in range(len(x)):
        image, rng = x[i : i + 1], np.random.default_rng((seed, i))
        within, at_eps = _points(image, threat, min(999, width - 1) if inner is None else inner, rng)
        h, z = predict(features, np.vstack([within, at_eps]), 500), predict(outputs, within, 500).logits
        if not readout.fit(h[:-1], h[-1:], np.ptp(z) / 2 or 1.0, closeness):
            continue
        adversarial = attack(readout, image, none, threat).images
        found.append(threat.contains(adversarial, image)[0] and predict(readout, adversarial, 1).argmax() == 1)
        tried = threat.random_start(np.repeat(image, draws, axis=0), (seed, i, 1))
        lucky.append((predict(readout, tried, 500).argmax(axis=1) == 1).any())
    if not found:
        raise ValueError(f"on none of {len(x)} images a readout tells the point at eps from those within; expected "
                         "fewer `inner` points or other `features`")
    return [flags.share("binarization test: success of the attack", np.array(found), 0.95),
            flags.share("binarization test: success of random points", np.array(lucky), 0.5, "<=")]


class Shown:
    """Features (n, width) of images as `outputs`, a network behind something, shows them to that network."""

    def __init__(self, outputs, features):
        self.outputs, self.features, self.randomised = outputs, features, outputs.randomised

    def __call__(self, x):
        """Features of `x` (n, h, w, c)."""
        return inference(self.features)(self.outputs.shown(x))


def _features(outputs):
    """What enters the last layer of a Keras network, if that is dense, behind what comes before it; else the logits."""
    model = getattr(outputs, "model", None)
    if isinstance(model, keras.Model) and isinstance(model.layers[-1], keras.layers.Dense):
        return part(model, model.layers[-1].input)
    if hasattr(outputs, "shown"):
        return Shown(outputs, _features(as_defence(outputs.network)))

    def logits(x):
        return outputs(x).logits

    logits.randomised = randomised(outputs)
    return logits


def _points(image, threat, n, rng):
    """The image and `n` - 1 random points within 0.95 eps, and one at eps, as far as the bounds allow."""
    many = np.repeat(image, n, axis=0)
    within = replace(threat, eps=0.95 * threat.eps).random_start(many, rng.integers(2**31))
    within[0] = image[0]
    noise = rng.standard_normal(image.shape) if threat.norm == "l2" else rng.uniform(-1, 1, image.shape)
    return within, along(image, noise, threat.eps, threat.norm, threat.bounds)


# ── The indicators of attack failure ──


class Watched:
    """A model that takes down, for one image, the goal's value of each other image in the ball that it is asked about,
    and whether each gradient that comes back is there."""

    def __init__(self, outputs, goal, threat):
        self.outputs, self.goal, self.threat, self.randomised = outputs, goal, threat, randomised(outputs)

    def begin(self, image, label):
        """Forget what was taken down, and watch the attack on this image (1, h, w, c) with this label (1,)."""
        self.image, self.label, self.gradients = image, label, []
        self.values = list(self.goal(single(self.outputs(tf.constant(image))), label).numpy())

    def __call__(self, x):
        """The model's outputs."""
        answers = self.outputs(self._watched(x))
        tf.numpy_function(_weakly(self._value), [x, *single(answers)], [])
        return answers

    def paths(self, seed=0):
        """Itself."""
        return {"exact": Path(self)}

    def _watched(self, x):
        seen = _weakly(self._gradient)

        @tf.custom_gradient
        def same(x):
            def backwards(gradient):
                tf.numpy_function(seen, [gradient], [])
                return gradient

            return tf.identity(x), backwards

        return same(x)

    def _value(self, x, *answers):
        inside = self.threat.contains(x, np.repeat(self.image, len(x), axis=0)) & (x != self.image).any(axis=(1, 2, 3))
        values = self.goal(Outputs(*map(tf.constant, answers)), np.repeat(self.label, len(x))).numpy()
        self.values.extend(values[inside])

    def _gradient(self, gradient):
        self.gradients.append(bool(np.isfinite(gradient).all() and gradient.any()))


def _weakly(method):
    """`method` for a graph that must not keep its object: TensorFlow never forgets one with a gradient of its own."""
    of = weakref.WeakMethod(method)
    return lambda *arguments: of()(*arguments)


def indicators(defence, attack, x, y, threat, *, path=None, goal=evasion, noise=0.01, draws=20, seed=0):
    """The six indicators of attack failure (Pintor et al. 2022), from the attack on each image by itself.

    unavailable gradients : half or more of those that the attack took were zero or not finite.
    unstable predictions : under uniform noise of +-`noise` the goal moves by a tenth or more of its median size.
    silent success : the attack came through an image that wins and gives back one that does not.
    incomplete optimisation : it fails, and the last tenth of what it tried still brought more than a twentieth of all
        that it gained.
    transfer failure : it wins on the `path`, what the attacker differentiates in the place of what is deployed, and
        fails on that.
    unconstrained failure : it fails where all valid images are allowed.

    Images that are wrong without an attack are left out. Returns six rows of `helpers.flags`, shares of images.
    Raises ValueError where no image is left.
    """
    check_images(x, bounds=threat.bounds)
    check_positive(noise=noise, draws=draws)
    defence = as_defence(defence)
    y, path = check_labels(y, len(x), check_defence(defence, x)), way(defence, path, seed)
    there = path.outputs
    stand = np.flatnonzero(~_won(goal, defence, x, y) & ~_won(goal, there, x, y))
    if not stand.size:
        raise ValueError(f"all {len(x)} images win without an attack; none is left to try it on")
    x, y = x[stand], y[stand]
    watched, far = Watched(there, goal, threat), replace(threat, eps=diameter(x.shape[1:], threat.norm, threat.bounds))
    runs = [_watch(watched, attack, x[i : i + 1], y[i : i + 1], threat) for i in range(len(x))]
    images, blind, silent, unfinished = (np.concatenate(part) for part in zip(*runs, strict=True))
    fooled, deployed = _won(goal, there, images, y), _won(goal, defence, images, y)
    free = np.concatenate([attack(defence, x[i : i + 1], y[i : i + 1], far, path=path).value for i in range(len(x))])
    unstable = _unstable(goal, there, x, y, noise, draws, seed)
    hits = {"unavailable gradients": (blind, 0.1), "unstable predictions": (unstable, 0.1),
            "silent success": (silent & ~fooled, 0.0), "incomplete optimisation": (unfinished & ~fooled, 0.1),
            "transfer failure": (fooled & ~deployed, 0.0), "unconstrained failure": (free <= 0, 0.01)}
    return [flags.share(f"indicator: {name}", each, limit, "<=") for name, (each, limit) in hits.items()]


def _watch(watched, attack, image, label, threat):
    """What the attack gives back for one image; are gradients missing, did it pass a win, was it still rising? (1,)"""
    watched.begin(image, label)
    found = attack(watched, image, label, threat).images
    best, there = np.maximum.accumulate(watched.values), watched.gradients
    rest = best[-1] - best[-1 - min(len(best) - 1, max(1, len(best) // 10))]
    return (found, *(np.array([answer]) for answer in (
        len(there) > 0 and np.mean(there) <= 0.5, best[-1] > 0, rest > 0.05 * (best[-1] - best[0]))))


def _won(goal, outputs, x, y):
    return _goal(goal, outputs, x, y) > 0


def _goal(goal, outputs, x, y):
    return goal(single(predict(outputs, x, 500)), y).numpy()


def _unstable(goal, outputs, x, y, noise, draws, seed):
    rng, here, ends = np.random.default_rng(seed), _goal(goal, outputs, x, y), (x.min(), x.max())
    near = [np.clip(x + rng.uniform(-noise, noise, x.shape), *ends).astype("float32") for _ in range(draws)]
    moved = np.abs(np.array([_goal(goal, outputs, images, y) for images in near]) - here).mean(axis=0)
    return moved >= 0.1 * max(np.median(np.abs(here)), 1e-12)
