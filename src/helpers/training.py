"""Training: plain, on an adversarial set, and with adversarial images made for every batch."""

from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from helpers.checks import check_images, check_labels, check_positive, check_seed
from helpers.defence import as_defence, check_defence
from helpers.evaluation import score
from helpers.losses import cross_entropy
from helpers.models import inference, inner_graph, traced
from helpers.search import input_gradient, single
from helpers.threat import ThreatModel, projection


@dataclass(frozen=True)
class Adversary:
    """The attacker inside the training loop, linf.

    eps : radius in [0, 1] pixel units.
    steps : 1 with `random_start=False` is FGSM (paper 02), several with a random start is PGD (Madry et al. 2018).
    step_size : pixel units; default eps for one step, 2.5 * eps / steps for several.
    mixed : train on the batch and its adversarial images together (paper 02, III.3), or on the latter alone.
    """

    eps: float
    steps: int = 1
    random_start: bool = False
    mixed: bool = True
    step_size: float | None = None

    def __post_init__(self):
        ThreatModel("linf", self.eps)  # validates eps
        check_positive(steps=self.steps, step_size=self.step_size)

    def craft(self, model, x, y, seed):
        """Adversarial images for one batch with the weights of this moment; tensors, for use in a graph."""
        step_size = self.step_size or (self.eps if self.steps == 1 else 2.5 * self.eps / self.steps)
        x_adv = x
        if self.random_start:
            noise = tf.random.stateless_uniform(tf.shape(x), seed, -self.eps, self.eps)
            x_adv = tf.clip_by_value(x + noise, 0.0, 1.0)
        project = projection(x, "linf", self.eps, (0.0, 1.0))
        for _ in range(self.steps):
            gradient, *_ = input_gradient(lambda x: single(inference(model)(x)), cross_entropy, x_adv, y)
            x_adv = project(x_adv + step_size * tf.sign(gradient))
        return tf.stop_gradient(x_adv)


def fit(model, x, y, *, epochs, batch_size=364, learning_rate=1e-3, adversary=None, validation=None, monitor=None,
        seed=0, label=None):
    """Train `model` in place with Adam on cross-entropy.

    x, y : images (n, h, w, c) float32 in [0, 1], integer labels (n,).
    batch_size : clean images a batch; the default is the first of paper 02's "[364, 227]" (Table II).
    adversary : Adversary or None for plain training.
    validation : (x, y) whose loss and accuracy are recorded after every epoch, or None.
    monitor : function(model) -> dict of further numbers to record after every epoch, or None.
    label : text of the progress bar; None shows none.
    Returns a dict of lists, one value an epoch: "loss" and "accuracy" on the batches trained on (dropout on, running
    over the epoch), "validation_loss", "validation_accuracy" (dropout off), and the monitor's.
    """
    check_images(x)
    y = check_labels(y, len(x), check_defence(as_defence(model), x))
    if validation is not None:
        score(model, *validation)  # refuses bad data before the first epoch, not after it

    def losses_of(images, labels, seed):
        if adversary is not None:
            adversarial = adversary.craft(model, images, labels, seed)
            images = tf.concat([images, adversarial], 0) if adversary.mixed else adversarial
            labels = tf.concat([labels, labels], 0) if adversary.mixed else labels
        logits = single(model(images, training=True))
        return cross_entropy(logits, labels), tf.argmax(logits, axis=1) == labels

    def after(model):
        found = {} if validation is None else score(model, *validation)
        return {f"validation_{key}": value for key, value in found.items()} | (monitor(model) if monitor else {})

    return descend(model, losses_of, (x, y), epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
                   after=after, seed=seed, label=label)


def descend(model, losses_of, arrays, *, epochs, batch_size, learning_rate, after=None, owner=None, seed=0, label=None):
    """Train `model` in place with Adam on the mean loss: the loop of networks and purifiers.

    losses_of : function of a batch of each of `arrays` and a seed (2,), differentiated here; gives losses (n,) and
        whether each image was right (n,).
    after : function(model) -> dict of numbers to record after every epoch. owner : whose `randomised` says whether
        graphs may be made; default the model.
    Returns a dict of lists, one value an epoch: "loss", "accuracy" and those of `after`. Raises FloatingPointError for
    a loss that is not finite.
    """
    check_positive(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    check_seed(seed)
    arrays = tuple(map(tf.constant, arrays))
    epoch = _epoch(model, losses_of, arrays, min(batch_size, len(arrays[0])), learning_rate, owner or model)
    rng, history = np.random.default_rng(seed), {}
    for number in tqdm(range(epochs), desc=label, disable=label is None, unit="epoch", leave=True):
        loss, accuracy = epoch(tf.constant(rng.permutation(len(arrays[0]))), tf.constant([seed, number]))
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)} in epoch {number + 1}; try a smaller learning_rate")
        record = {"loss": float(loss), "accuracy": float(accuracy)} | (after(model) if after else {})
        for key, value in record.items():
            history.setdefault(key, []).append(value)
    return history


def _epoch(model, losses_of, arrays, batch_size, learning_rate, owner):
    """Compile one pass over the data, given the order of the images; the last batch may be smaller."""
    optimizer = keras.optimizers.Adam(learning_rate)
    if any(layer.compute_dtype == "float16" for layer in model.layers):  # whose gradients would underflow
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(model.trainable_variables)
    batches = -(-len(arrays[0]) // batch_size)

    def step(*batch):
        with tf.GradientTape() as tape:
            losses, hits = losses_of(*batch)
            loss = optimizer.scale_loss(tf.reduce_mean(losses))
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
        counted = [tf.reduce_sum(losses), tf.reduce_sum(tf.cast(hits, tf.float32)), tf.cast(tf.size(hits), tf.float32)]
        return tf.stack(counted)

    step = inner_graph(step, owner)

    def epoch(order, seed):
        totals = tf.zeros(3)
        for i in tf.range(batches):
            index = order[i * batch_size : (i + 1) * batch_size]
            batch = [tf.ensure_shape(tf.gather(array, index), (None, *array.shape[1:])) for array in arrays]
            totals += step(*batch, seed + tf.stack([0, 1000003 * (i + 1)]))
        return totals[0] / totals[2], totals[1] / totals[2]

    return traced(epoch, owner)
