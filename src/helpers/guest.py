"""A guest of the arena: a reader's own defence, brought from a file and looked at before it is attacked."""

import importlib.util
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from helpers import models
from helpers.defence import Path as Way
from helpers.defence import answers, as_defence, never


class ArenaError(Exception):
    """A defence that cannot be evaluated; the message says which, why, and what was expected."""


def opened(path, randomised=False):
    """What a file holds: the network of a .keras, or what `defence()` of a Python file gives.

    randomised : whether a network of a file, which cannot say so itself, may give one image two answers.
    Raises ArenaError for another file, a missing `defence`, or one that raises. A Python file is executed: it is the
    reader's own.
    """
    path = Path(path)
    if path.suffix == ".keras":
        try:
            network = keras.saving.load_model(path, compile=False, safe_mode=True)
            if randomised:
                network.randomised = True
            return network
        except Exception as error:  # Keras raises many kinds for a file that is none
            raise ArenaError(f"{path}: no network of Keras ({said(error)})") from error
    if path.suffix != ".py":
        raise ArenaError(f"{path}: expected a Python file with a function `defence`, or a network saved as .keras")
    spec = importlib.util.spec_from_file_location(f"guest_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.insert(0, folder)  # and it stays: what is called later may import as well
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "defence", None)):
            raise ArenaError(f"{path}: no function `defence`; expected one without arguments that gives a Keras "
                             "network, a function from images to logits, or a defence of three members")
        return module.defence()
    except ArenaError:
        raise
    except (Exception, SystemExit) as error:
        raise ArenaError(f"{path}{_line_in(error, path)}: {said(error)}") from error


def said(error):
    """Kind and first lines of `error`, (str): a long trace of TensorFlow would hide the sentence."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _line_in(error, path):
    """", line n", the last one of the file that is on the way to the error."""
    trace, found = error.__traceback__, ""
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve():
            found = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def brought(model, x, name="defence"):
    """`model` as a `Defence` that is known to answer images like `x` (n, h, w, c) as one should.

    A function of images that says nothing of itself is asked whether it is random; where TensorFlow cannot follow it,
    it is one of `Arrays`.
    Raises ArenaError, in words, for what is no defence, raises, takes other images, gives NaN or probabilities, or
    answers differently when it is asked again without saying that it is `randomised`.
    """
    few = x[:8]
    try:
        if isinstance(model, keras.Model):
            models.check_size(model, few)
        if callable(model) and not isinstance(model, keras.Layer) and not hasattr(model, "paths"):
            model = _function(model, few)
        defence = as_defence(model)
        _ask(defence, few)
        answers(defence, few)
        return defence
    except ArenaError as error:
        raise ArenaError(f"{name}: {error}") from error
    except Exception as error:
        hint = "; of votes or probabilities, give the logarithm" if "probabilities" in str(error) else ""
        raise ArenaError(f"{name}: {said(error)}{hint}") from error


def _ask(defence, x):
    """What `defence` answers to images, given as a tensor; ArenaError where it raises."""
    try:
        return defence(tf.constant(x))
    except Exception as error:
        raise ArenaError(f"it raises on images of shape {x.shape}, float32 in [0, 1], channels last: "
                         f"{said(error)}") from error


def _function(function, x):
    """A function of images as one that says whether it is random, and of which a graph can be made."""
    try:
        first = _ask(function, x)
    except ArenaError:
        first = _ask(lambda images: function(images.numpy()), x)  # it may want arrays
    if hasattr(first, "logits"):
        raise ArenaError("it answers with logits and refusal and has no `paths(seed)`; expected all three members: "
                         "`randomised`, the call and `paths`")
    logits = np.asarray(first)
    models.check_logits(logits)
    if models.randomised(function) and hasattr(function, "randomised"):
        return function
    if any(not np.allclose(logits, np.asarray(_array(function, x)), rtol=1e-3, atol=1e-3) for _ in range(2)):
        raise ArenaError("it answers differently when it is asked again; expected the same each time, or an attribute "
                         "`randomised = True` that says so: then draws are averaged")
    return _steady(function, x, logits)


def _array(function, x):
    try:
        return function(tf.constant(x))
    except Exception:
        return function(x)


def _steady(function, x, logits):
    """`function`, declared not to be random; `Arrays` of it where a graph cannot be made."""
    def followed(images):
        return tf.cast(tf.convert_to_tensor(function(images)), tf.float32)

    try:
        same = np.allclose(tf.function(followed)(tf.constant(x)), logits, rtol=1e-3, atol=1e-3)
    except Exception:  # NumPy within, most often
        same = False
    followed.randomised = False
    return followed if same else Arrays(function)


class Arrays:
    """A function of arrays as a `Defence` without a gradient, asked once about each batch.

    It says that it is random to be kept out of graphs: a graph of the function's own, within another one, may wait for
    a thread for ever.
    """

    randomised = True

    def __init__(self, function):
        self.function, self.known = function, {}

    def __call__(self, x):
        """Logits of `x` (n, h, w, c), and no refusal."""
        key = x.numpy().tobytes()
        if key not in self.known:
            while len(self.known) >= 4:
                del self.known[next(iter(self.known))]
            self.known[key] = tf.constant(np.asarray(self.function(x.numpy())), tf.float32)
        return never(self.known[key])

    def paths(self, seed=0):
        """Itself."""
        return {"exact": Way(self)}
