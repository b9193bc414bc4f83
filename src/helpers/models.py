"""The papers' networks. Every one ends in logits: a softmax inside the network would spoil the attacks' gradients."""

import json
from functools import partial

import keras
import numpy as np
from keras import layers


def two_conv(input_shape=(28, 28, 1), classes=10, *, strided=True, batch_norm=True, dropout=0.5, seed=0):
    """Two convolutions of 32 and 64 filters (3x3), a dense layer of 128, logits.

    Paper 02 states two convolution layers and a softmax (Table II), nothing else: whether they stride or are
    followed by max-pooling, and whether they are normalised, is left to the caller.

    Returns
    -------
    keras.Sequential from images (n, *input_shape) in [0, 1] to logits (n, classes). Sets Keras' random seed.
    """
    keras.utils.set_random_seed(seed)
    stack = [layers.Input(input_shape)]
    for filters in (32, 64):
        stack.append(layers.Conv2D(filters, 3, 2 if strided else 1, padding="same", activation="relu"))
        stack += [layers.BatchNormalization()] if batch_norm else []
        stack += [] if strided else [layers.MaxPooling2D()]
    stack += [layers.Flatten(), layers.Dense(128, activation="relu")]
    stack += [layers.BatchNormalization()] if batch_norm else []
    return keras.Sequential([*stack, layers.Dropout(dropout), layers.Dense(classes)])


def deep_conv(input_shape=(28, 28, 1), classes=10, *, dropout=0.5, seed=0):
    """The base network of paper 01 (Table 1): 2 x 32 and 2 x 64 convolutions with pooling, 200, 200, logits.

    Returns
    -------
    keras.Sequential from images (n, *input_shape) in [0, 1] to logits (n, classes). Sets Keras' random seed.
    """
    keras.utils.set_random_seed(seed)
    stack = [layers.Input(input_shape)]
    for filters in (32, 64):
        for _ in range(2):
            stack.append(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        stack.append(layers.MaxPooling2D())
    stack.append(layers.Flatten())
    for _ in range(2):
        stack += [layers.Dense(200, activation="relu"), layers.Dropout(dropout)]
    return keras.Sequential([*stack, layers.Dense(classes)])


def as_float64(model):
    """A copy of `model` that computes in float64, for checks of gradients by finite differences."""
    config = json.loads(json.dumps(model.get_config()).replace('"float32"', '"float64"'))
    copy = type(model).from_config(config)
    copy.set_weights(model.get_weights())
    return copy


def inference(model):
    """Function from images to logits in test mode: dropout off, batch statistics frozen; any callable passes as it is."""
    return partial(model, training=False) if isinstance(model, keras.Model) else model


def check_logits(model, x):
    """Logits (m, classes) of the first images of `x`; raise if they look like probabilities.

    Raises
    ------
    ValueError
        If the outputs are not of shape (m, classes), or every row is non-negative and sums to 1 (a softmax).
    """
    logits = np.asarray(inference(model)(x[:8]))
    if logits.ndim != 2:
        raise ValueError(f"model gives shape {logits.shape}; expected logits of shape (n, classes)")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise ValueError("model gives probabilities (rows >= 0 that sum to 1); expected logits: drop its softmax")
    return logits
