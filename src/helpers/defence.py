"""What is deployed, and how it may be attacked: the one interface of all defences.

A defence is any object with three members: `randomised`, whether one image may get two answers; a call from images to
`Outputs`, which is what is deployed and needs no gradient; and `paths(seed)`, name -> `Path`, what an attacker may
differentiate in its place. `Network` is the plainest one, `Behind` a network with a filter or purifier in front of it.
Wherever a defence is expected, a Keras network or a function from images to logits will do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import keras
import numpy as np
import tensorflow as tf

from helpers import models
from helpers.checks import check_images, known


class Outputs(NamedTuple):
    """Answers to n images.

    logits : (n, classes); the largest names the class.
    refusal : (n,), above 0 where the defence refuses the image or flags it; -inf where it never does.
    """

    logits: tf.Tensor
    refusal: tf.Tensor


@dataclass(frozen=True, eq=False)
class Path:
    """What an attacker differentiates in the place of what is deployed.

    outputs : function from images (n, h, w, c) to `Outputs`.
    losses : functions (Outputs, y) -> (n,) to climb here; none leaves them to the attack.
    starts : functions (x, y, threat, seed) -> images, from which an attack may begin.
    """

    outputs: Callable
    losses: tuple = ()
    starts: tuple = ()


class Defence(Protocol):
    """What is attacked; a reader's own is any object with these three members."""

    randomised: bool

    def __call__(self, x) -> Outputs:
        """Answer the images `x` (n, h, w, c), a tensor in [0, 1], as deployed."""

    def paths(self, seed=0) -> dict[str, Path]:
        """Ways to attack it by name; `seed` is of what the attacker draws for himself."""


def never(logits):
    """`Outputs` of a defence that never refuses."""
    return Outputs(logits, tf.fill(tf.shape(logits)[:1], tf.constant(-np.inf, logits.dtype)))


@dataclass(frozen=True, eq=False)
class Network:
    """A network as it is: a Keras network in test mode, or any function from images to logits (n, classes)."""

    model: Callable

    @property
    def randomised(self):
        """Whether the network says that it is."""
        return models.randomised(self.model)

    def __call__(self, x):
        """Logits of `x` (n, h, w, c), and no refusal."""
        return never(tf.convert_to_tensor(models.inference(self.model)(x)))

    def paths(self, seed=0):
        """The network itself, and where it is random its mean over draws."""
        return {"exact": Path(self), **({"EOT": Path(Mean(self))} if self.randomised else {})}

    def as_float64(self):
        """The same in float64."""
        return Network(models.as_float64(self.model))


@dataclass(frozen=True, eq=False)
class _Changed:
    """A network that sees what `shown` makes of each image."""

    before: Callable
    network: Callable

    @property
    def randomised(self):
        """Whether one of the two may be."""
        return models.randomised(self.before) or models.randomised(self.network)

    def __call__(self, x):
        """Outputs for the images `x` (n, h, w, c) as they are shown to the network."""
        return as_defence(self.network)(self.shown(x))


@dataclass(frozen=True, eq=False)
class Behind(_Changed):
    """A network behind what changes every image first: a filter, or a purifier.

    before : Keras network, layer or function from images (n, h, w, c) to images of that shape.
    network : Keras network or function from images to logits, or a `Defence`.
    exact : whether `before` has a gradient worth following.
    instead : differentiable function like `before`, whose gradient an attacker may take for it; None: there is none.
    """

    exact: bool = True
    instead: Callable | None = None

    def shown(self, x):
        """What the network sees of `x`."""
        return models.inference(self.before)(x)

    def paths(self, seed=0):
        """The network alone; BPDA, the identity or `instead` on the way back; both as they are; the mean over draws."""
        ways = {"unaware": Path(as_defence(self.network))}
        for name, instead in (("BPDA", tf.identity), ("approximated", self.instead)):
            if instead:
                build = partial(StraightThrough, self.before, self.network, instead)
                ways[name] = Path(models.graph_of(self, name, build))
        if self.exact:
            ways["exact"] = Path(self)
        if self.randomised:
            best = list(ways.values())[-1].outputs
            ways["EOT"] = Path(models.graph_of(self, "EOT", lambda: Mean(best)))
        return ways

    def as_float64(self):
        """The same in float64."""
        return Behind(models.as_float64(self.before), models.as_float64(self.network), self.exact, self.instead)


@dataclass(frozen=True, eq=False)
class StraightThrough(_Changed):
    """BPDA (Athalye et al. 2018): `before` in the forward pass, `instead`, the identity or near it, in the backward."""

    instead: Callable = tf.identity

    def shown(self, x):
        """What the network sees of `x`, with the gradient of `instead`."""
        alike = self.instead(x)
        return alike + tf.stop_gradient(models.inference(self.before)(x) - alike)


@dataclass(frozen=True, eq=False)
class Mean:
    """Expectation over transformation (Athalye et al. 2018): mean outputs over `draws` calls of what is random.

    Probabilities are averaged, and given back as their logarithms.
    """

    outputs: Callable
    draws: int = 10
    randomised = True

    def __call__(self, x):
        """Mean outputs for `x` (n, h, w, c)."""
        found = [self.outputs(x) for _ in range(self.draws)]
        logs = tf.stack([tf.nn.log_softmax(each.logits) for each in found])
        mean = tf.reduce_logsumexp(logs, axis=0) - np.log(self.draws)
        return Outputs(mean, tf.reduce_mean(tf.stack([each.refusal for each in found]), axis=0))


class OneOf:
    """One of several defences, drawn anew at each call: a filter of random strength, a random network.

    members : the defences, which answer alike in shape. seed : of the draws.
    """

    randomised = True

    def __init__(self, members, seed=0):
        self.members, self.rng = tuple(map(as_defence, members)), np.random.default_rng(seed)
        if not self.members:
            raise ValueError("members is empty; expected one defence or more")

    def __call__(self, x):
        """Outputs of the member that is drawn for `x` (n, h, w, c)."""
        return self.members[self.rng.integers(len(self.members))](x)

    def paths(self, seed=0):
        """One member, guessed; the mean of all, which draws nothing; what the first offers to who knows nothing."""
        guess = self.members[np.random.default_rng(seed).integers(len(self.members))]
        unaware = {name: path for name, path in self.members[0].paths(seed).items() if name == "unaware"}
        return unaware | {"one guess": Path(guess), "EOT": Path(models.graph_of(self, "all", self._all))}

    def _all(self):
        def mean(x):
            found = [member(x) for member in self.members]
            return Outputs(*(tf.reduce_mean(tf.stack(part), axis=0) for part in zip(*found, strict=True)))

        mean.randomised = any(member.randomised for member in self.members)
        return mean


def as_defence(model):
    """`model` if it is a `Defence`, else the `Network` of it, which is kept on it with its graphs."""
    if callable(getattr(model, "paths", None)):
        return model
    if not callable(model):
        raise TypeError(f"defence is {type(model).__name__}; expected a Keras network, a function from images to "
                        "logits, or an object with `randomised`, a call and `paths`")
    return models.graph_of(model, "defence", partial(Network, model))


def answers(defence, x, batch_size=500):
    """`Outputs` of arrays, what `defence` answers to images `x` (n, h, w, c) float32 in [0, 1], in batches."""
    check_images(x)
    defence = as_defence(defence)
    check_defence(defence, x)
    found = models.predict(defence, x, batch_size)
    check_numbers(found.logits, found.refusal)
    return found


def way(defence, path, seed=0):
    """The `Path` that `path` stands for: None for what is deployed, a name of the defence's, a `Path`, or a network."""
    if path is None:
        return Path(defence)
    if isinstance(path, str):
        paths = defence.paths(seed)
        return paths[known("path", path, paths)]
    return path if isinstance(path, Path) else Path(as_defence(path))


def check_defence(defence, x):
    """Number of classes of `defence`, by its answers to the first images of `x`.

    Raises TypeError or ValueError for no `Outputs`, other shapes, probabilities, NaN, no paths, images of another size
    than a Keras network takes, and for answers that differ without `randomised` being true.
    """
    inner = getattr(defence, "model", None)
    if isinstance(inner, keras.Model):
        models.check_size(inner, x)
    paths = defence.paths()
    if not isinstance(paths, Mapping) or not paths or not all(isinstance(path, Path) for path in paths.values()):
        raise TypeError(f"paths() of the defence gives {paths!r:.80}; expected one or more, name -> Path")
    return check_outputs(defence, x)


def check_outputs(outputs, x, name="defence"):
    """Number of classes that `outputs`, a defence or what a path has in its place, gives to the first of `x`."""
    ask = models.forward(outputs, x)
    try:
        found = ask(tf.constant(x[:8]))
    except Exception as error:
        if models.randomised(outputs):  # no graph: the error is its own
            raise
        raise TypeError(f"the {name} answers, but not as a TensorFlow graph ({type(error).__name__}); expected "
                        "TensorFlow's functions, or tf.numpy_function around others") from error
    if not (hasattr(found, "logits") and hasattr(found, "refusal")):
        raise TypeError(f"the {name} gives {type(found).__name__}; expected helpers.defence.Outputs(logits, refusal)")
    logits, refusal = np.asarray(found.logits), np.asarray(found.refusal)
    models.check_logits(logits)
    if refusal.shape != logits.shape[:1]:
        raise ValueError(f"refusal has shape {refusal.shape}; expected {logits.shape[:1]}, one number an image")
    check_numbers(refusal)
    return logits.shape[1]


def check_numbers(*parts):
    """Raise ValueError where one of `parts` of what a defence answers is NaN, which is neither won nor lost."""
    if any(np.isnan(part).any() for part in parts):
        raise ValueError("the defence gives NaN on some images; expected logits, and a refusal above 0 to refuse")
