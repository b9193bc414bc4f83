"""Uncertainty by Monte-Carlo dropout: what thinned copies of a network disagree about (paper 04, Sections 3.3-3.4)."""

from functools import partial

import keras
import numpy as np
import tensorflow as tf

from helpers.checks import check_images, check_seed
from helpers.models import graph_of, randomised

METRICS = ("confidence", "entropy", "variance", "mutual information")


def thinned(model, draws, seed=0):
    """Return a TensorFlow function from images (n, h, w, c) to probabilities (draws, n, classes) of thinned networks.

    Each draw is one network: the units that its dropout removes are the same for every image, so that the result for
    an image depends on `seed` alone and not on its batch. For one image this is what `model(x, training=True)` draws
    from. Only dropout is switched on (batch statistics stay frozen), and what precedes it is computed once.

    Raises TypeError unless `model` is a keras.Sequential, ValueError if it is `randomised` beyond its dropout, has no
    dropout or `draws` < 2.
    """
    rates, rng = _rates(model, draws), np.random.default_rng(seed)
    kept = [rng.random((draws, *model.layers[i].output.shape[1:])) >= rate for i, rate in rates.items()]
    masks = [(k / (1 - rate)).astype(_wide(model)) for k, rate in zip(kept, rates.values(), strict=True)]
    return partial(_voter(model, rates), masks=masks)


def fresh(model, draws):
    """Like `thinned`, but a function of images and a seed, a tensor, by which networks are drawn at every call."""
    rates = _rates(model, draws)
    voted = _voter(model, rates)

    def probabilities(x, seed):
        masks = []
        for i, rate in rates.items():
            shape = (draws, *model.layers[i].output.shape[1:])
            kept = tf.random.stateless_uniform(shape, tf.stack([seed, tf.cast(i, seed.dtype)])) >= rate
            masks.append(tf.cast(kept, _wide(model)) / (1 - rate))
        return voted(x, masks)

    return probabilities


def _rates(model, draws):
    """Rate of each dropout layer of `model` by its place, once both arguments are checked."""
    if not isinstance(model, keras.Sequential):
        raise TypeError(f"model is {type(model).__name__}; expected a keras.Sequential network")
    if randomised(model):
        raise ValueError("model is randomised; expected a network that draws nothing but its dropout")
    dropouts = [i for i, layer in enumerate(model.layers) if isinstance(layer, keras.layers.Dropout) and layer.rate > 0]
    if not dropouts:
        raise ValueError("model has no dropout layer with a rate above 0; Monte-Carlo dropout needs one")
    if odd := [model.layers[i].name for i in dropouts if type(model.layers[i]) is not keras.layers.Dropout]:
        raise ValueError(f"model drops whole maps in {odd}; expected keras.layers.Dropout, which drops single units")
    if draws < 2:
        raise ValueError(f"draws is {draws}; expected at least 2 (the paper's T)")
    return {i: model.layers[i].rate for i in dropouts}


def _wide(model):
    """In what probabilities of `model` are counted: float16 has no digits for what draws disagree about."""
    return "float64" if model.compute_dtype == "float64" else "float32"


def _voter(model, rates):
    """Function of images and masks of each dropout: probabilities (draws, n, classes) of the networks that are left."""
    first = min(rates)

    @tf.function  # a graph of its own: faster than the same steps written into the loop over draws
    def vote(hidden, *masks):
        masks = iter(masks)
        for i, layer in enumerate(model.layers[first:], first):
            hidden = hidden * tf.cast(next(masks), hidden.dtype) if i in rates else layer(hidden, training=False)
        return tf.nn.softmax(tf.cast(hidden, _wide(model)))

    def voted(x, masks):
        for layer in model.layers[:first]:
            x = layer(x, training=False)
        return tf.map_fn(lambda masks: vote(x, *masks), masks, fn_output_signature=_wide(model))

    return voted


def sample(model, x, *, draws=50, seed=0, batch_size=500):
    """Probabilities (draws, n, classes) float32 of images `x` (n, h, w, c) in [0, 1] under `thinned(model, draws)`."""
    check_images(x)
    check_seed(seed)
    graph = graph_of(model, ("thinned", draws, seed),
                     lambda: tf.function(thinned(model, draws, seed), reduce_retracing=True))
    return np.concatenate([graph(tf.constant(x[i : i + batch_size])) for i in range(0, len(x), batch_size)], axis=1)


def metrics(p):
    """The paper's four metrics, name -> (n,) float32, of sampled probabilities `p` (draws, n, classes).

    Eqns. 5-8: the confidence and the entropy (nats) of the mean prediction, the variance over the draws averaged over
    classes, and the mutual information (nats), which is the entropy of the mean less the mean of the entropies: as
    printed, Eqn. 8 would add them.

    Raises ValueError unless `p` has that shape with at least two draws and every row sums to 1.
    """
    p = np.asarray(p)
    if p.ndim != 3 or len(p) < 2:
        raise ValueError(f"p has shape {p.shape}; expected (draws, n, classes) with at least 2 draws")
    if not ((p >= 0).all() and np.allclose(p.sum(axis=2), 1, atol=1e-3)):
        raise ValueError("p holds rows that are negative or do not sum to 1; expected probabilities (after a softmax)")
    return {name: value.numpy() for name, value in formulas(p).items()}


def formulas(p):
    """`metrics` on tensors, unchecked and differentiable."""
    mean = tf.reduce_mean(p, axis=0)
    total = _entropy(mean)
    return dict(zip(METRICS, (
        tf.reduce_max(mean, axis=1), total, tf.reduce_mean(tf.math.reduce_variance(p, axis=0), axis=1),
        total - tf.reduce_mean(_entropy(p), axis=0)), strict=True))


def _entropy(p):
    return -tf.reduce_sum(p * tf.math.log(tf.maximum(p, 1e-30)), axis=-1)  # 0 log 0 = 0, with a finite gradient
