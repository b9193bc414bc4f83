"""Tiny images and networks that the tests of attacks share."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from helpers.evaluation import logits
from helpers.losses import margin

SHAPE = (4, 4, 1)
N = 12
rng = np.random.default_rng(0)
X = rng.uniform(0.3, 0.7, (N, *SHAPE)).astype("float32")  # interior: eps up to 0.3 meets no bound
Y = rng.integers(0, 3, N)
W = (rng.choice([-1, 1], 16) * rng.uniform(0.2, 1, 16)).astype("float32")
MANY = rng.normal(0, 2, (16, 3)).astype("float32")


def steady(function):
    """`function`, which says that it is not random, and so becomes a graph."""
    function.randomised = False
    return function


def linear(w=W, bias=0.0):
    """Two logits whose difference, the second minus the first, is w . x + bias."""
    @steady
    def model(x):
        difference = tf.reshape(x, (-1, len(w))) @ tf.constant(w)[:, None] + bias
        return tf.concat([-difference / 2, difference / 2], axis=1)
    return model


@steady
def three_classes(x):
    return tf.reshape(x, (-1, 16)) @ tf.constant(MANY)


@steady
def hill(x):
    """Two logits; the margin of label 0 is highest (-1) where the mean pixel is 0.55 and falls off on both sides."""
    height = -1 - 100 * (tf.reduce_mean(x, axis=(1, 2, 3)) - 0.55) ** 2
    return tf.stack([-height / 2, height / 2], axis=1)


def network(dropout=0.5):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(6, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
        layers.Dropout(dropout), layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(stddev=1.0)),
    ])
    for _ in range(20):
        model(rng_images(64), training=True)  # moves the batch statistics away from 0 and 1
    return model


def rng_images(n, seed=1):
    return np.random.default_rng(seed).uniform(0, 1, (n, *SHAPE)).astype("float32")


def margins(model, x, y):
    return margin(logits(model, x), np.asarray(y)).numpy()


NET = network()
LINEAR = linear()
