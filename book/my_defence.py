"""A defence for the arena: it refuses what a blurred copy makes it doubt.

Attack it by: make arena DEFENCE=book/my_defence.py
"""

import numpy as np
import tensorflow as tf

from helpers import data, filters, models, training
from helpers.defence import Network, Outputs, Path
from helpers.losses import cross_entropy


class Doubter:
    """A network and a threshold: the three members that a defence has."""

    randomised = False  # the same answer every time

    def __init__(self, network, threshold=0.0):
        self.network, self.threshold = Network(network), threshold

    def __call__(self, x):
        """What is deployed: logits, and a number above 0 where it refuses."""
        sharp = self.network(x).logits
        blurred = self.network(filters.gaussian(x, 1.0)).logits
        apart = cross_entropy(blurred, tf.argmax(sharp, axis=1))  # in nats
        return Outputs(sharp, apart - self.threshold)

    def paths(self, seed=0):
        """How it may be attacked, the strongest way last."""
        return {"unaware": Path(self.network), "exact": Path(self)}


def defence():
    """What the arena calls."""
    d = data.load("digits").split(300)
    network = models.two_conv(d.x_train.shape[1:], 10)
    training.fit(network, d.x_train, d.y_train, epochs=6, batch_size=50)
    apart = Doubter(network)(tf.constant(d.x_val)).refusal
    return Doubter(network, float(np.quantile(apart, 0.95)))  # refuses 5 %
