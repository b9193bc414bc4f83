"""What an attacker climbs: functions of logits (n, classes) and labels (n,), above 0 or higher where he gets nearer.

The targeted ones, `TARGETED`, take the wanted wrong class (n,) besides the true one. `evasion` takes all that a defence
answers, `helpers.defence.Outputs`.
"""

import numpy as np
import tensorflow as tf


def margin(logits, y):
    """Largest wrong logit minus the true logit, (n,): positive where the prediction is wrong."""
    return tf.reduce_max(wrong(logits, y), axis=1) - tf.gather(logits, y, batch_dims=1)


def cross_entropy(logits, y):
    """Cross-entropy of each image in nats, (n,), from logits."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)


def minus_logit(logits, y):
    """Minus the logit of `y`, (n,): to descend it is to raise the class, whatever the others do."""
    return -tf.gather(logits, y, batch_dims=1)


def log_odds(logits, y):
    """Log of the odds against `y`, log((1 - p) / p), (n,): rises with the cross-entropy, and its gradient has the same
    direction, but it does not vanish where the softmax saturates, as the cross-entropy's does in float32."""
    return tf.reduce_logsumexp(wrong(logits, y), axis=1) - tf.gather(logits, y, batch_dims=1)


def dlr(logits, y):
    """Difference of logits ratio, (n,): the margin over the largest minus the third largest logit (Croce & Hein 2020).

    Positive where the prediction is wrong; the same for logits times a constant. With two classes the margin alone.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = tf.math.top_k(logits, 3).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_margin(logits, y, target):
    """Logit of `target` minus the true logit, (n,)."""
    return tf.gather(logits, target, batch_dims=1) - tf.gather(logits, y, batch_dims=1)


def targeted_dlr(logits, y, target):
    """The targeted margin over the largest logit minus the mean of the third and fourth, (n,) (Croce & Hein 2020).

    The same for logits times a constant. With three classes or fewer the targeted margin alone.
    """
    if logits.shape[1] < 4:
        return targeted_margin(logits, y, target)
    top = tf.math.top_k(logits, 4).values
    return targeted_margin(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def evasion(outputs, y):
    """Margin of a defence's answers, capped by minus the refusal, (n,): above 0 where it is wrong and not refused."""
    return tf.minimum(margin(outputs.logits, y), -outputs.refusal)


def reached(outputs, wanted):
    """`evasion` towards a wanted class, (n,): above 0 where `wanted` is predicted and the image is not refused."""
    return tf.minimum(-margin(outputs.logits, wanted), -outputs.refusal)


def on_outputs(loss, descend=False):
    """`loss` as a function of what a defence answers.

    A name in `LOSSES` or `TARGETED` is of the logits, capped by minus the refusal (to `descend`: at least the refusal),
    so that who follows it leaves the region where he is refused. A function of (Outputs, y) is taken as it is.
    """
    if callable(loss):
        return loss
    of_logits = (LOSSES | TARGETED)[loss]
    if descend:
        return lambda outputs, *labels: tf.maximum(of_logits(outputs.logits, *labels), outputs.refusal)
    return lambda outputs, *labels: tf.minimum(of_logits(outputs.logits, *labels), -outputs.refusal)


def wrong(logits, y):
    """`logits` (n, classes) with minus infinity in the place of the true class `y` (n,)."""
    logits = tf.convert_to_tensor(logits)  # of an array in float64 tf.where would make one in float32
    return tf.where(tf.one_hot(y, tf.shape(logits)[1], on_value=True, off_value=False), -np.inf, logits)


LOSSES = {"cross-entropy": cross_entropy, "margin": margin, "logit": minus_logit, "log-odds": log_odds, "dlr": dlr}
TARGETED = {"targeted margin": targeted_margin, "targeted dlr": targeted_dlr}


def wrong_classes(logits, y):
    """The wrong classes of each image, (n, classes - 1), from the one with the largest of `logits` to the smallest."""
    logits = np.array(logits)
    logits[np.arange(len(y)), y] = np.inf
    return np.argsort(-logits, axis=1, kind="stable")[:, 1:]
