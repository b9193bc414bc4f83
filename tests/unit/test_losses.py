"""The losses: as in NumPy, finite where the softmax is one-hot, and 0 between what has won and what has not."""

import numpy as np
import pytest
import tensorflow as tf

from helpers import losses
from helpers.defence import Outputs

Z = np.random.default_rng(0).normal(0, 4, (40, 5)).astype("float32")
Y = np.arange(40) % 5
TRUE = Z[np.arange(40), Y]
REFUSAL = np.random.default_rng(1).normal(0, 3, 40).astype("float32")


def outputs(z=Z, refusal=REFUSAL):
    return Outputs(tf.constant(z), tf.constant(refusal))


def test_margin_and_cross_entropy_agree_with_numpy():
    wrong = np.where(np.eye(5, dtype=bool)[Y], -np.inf, Z).max(axis=1)
    np.testing.assert_allclose(losses.margin(Z, Y), wrong - TRUE, rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(Z, Y), np.log(np.exp(Z).sum(axis=1)) - TRUE, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.margin(Z, Y).numpy() > 0, Z.argmax(axis=1) != Y)
    np.testing.assert_array_equal(losses.minus_logit(Z, Y), -TRUE)


def test_the_log_odds_and_the_targeted_losses_agree_with_numpy():
    p, target = np.exp(TRUE) / np.exp(Z).sum(axis=1), (Y + 1) % 5
    np.testing.assert_allclose(losses.log_odds(Z, Y), np.log((1 - p) / p), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(losses.targeted_margin(Z, Y, target), Z[np.arange(40), target] - TRUE, rtol=1e-5)
    top = -np.sort(-Z, axis=1)
    ratio = losses.margin(Z, Y) / (top[:, 0] - top[:, 2])
    np.testing.assert_allclose(losses.dlr(Z, Y), ratio, rtol=1e-5)
    ratio = losses.targeted_margin(Z, Y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
    np.testing.assert_allclose(losses.targeted_dlr(Z, Y, target), ratio, rtol=1e-5)


def test_the_losses_stay_finite_for_a_confident_network():
    z = np.array([[500.0, -500.0], [-500.0, 500.0]], "float32")
    np.testing.assert_allclose(losses.cross_entropy(z, [0, 0]), [0, 1000])
    for loss in (losses.margin, losses.log_odds):
        np.testing.assert_allclose(loss(z, [0, 0]), [-1000, 1000])


def test_arrays_and_tensors_of_float64_are_as_good():
    """What `helpers.defence.answers` gives of a defence that counts in float64."""
    for z in (Z.astype("float64"), tf.constant(Z, tf.float64)):
        both = Outputs(z, REFUSAL.astype("float64"))
        np.testing.assert_allclose(losses.evasion(both, Y), losses.evasion(outputs(), Y), rtol=1e-5)
        for loss in losses.LOSSES.values():
            np.testing.assert_allclose(loss(z, Y), loss(Z, Y), rtol=1e-4, atol=1e-5)


def test_to_evade_is_to_be_wrong_and_not_refused():
    wrong = Z.argmax(axis=1) != Y
    np.testing.assert_array_equal(losses.evasion(outputs(), Y).numpy() > 0, wrong & (REFUSAL <= 0))
    np.testing.assert_array_equal(losses.evasion(outputs(refusal=np.full(40, -np.inf, "float32")), Y),
                                  losses.margin(Z, Y))
    target = (Y + 1) % 5
    np.testing.assert_array_equal(losses.reached(outputs(), target).numpy() > 0,
                                  (Z.argmax(axis=1) == target) & (REFUSAL <= 0))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_of_a_name_leads_out_of_what_is_refused(name):
    """Ascended it is capped by minus the refusal; descended it is the refusal, at least."""
    alone = losses.LOSSES[name](Z, Y)
    np.testing.assert_array_equal(losses.on_outputs(name)(outputs(), Y), np.minimum(alone, -REFUSAL))
    np.testing.assert_array_equal(losses.on_outputs(name, descend=True)(outputs(), Y), np.maximum(alone, REFUSAL))


def test_a_loss_of_ones_own_takes_all_that_the_defence_answers():
    assert losses.on_outputs(losses.evasion) is losses.evasion
    assert losses.on_outputs(losses.evasion, descend=True) is losses.evasion
