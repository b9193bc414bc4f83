"""The threat model: projections, random starts, noise and distances."""

from dataclasses import FrozenInstanceError

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings

from helpers.threat import NORMS, ThreatModel, noise, onto_plane

SHAPE = (3, 4, 4, 2)
quickly = settings(max_examples=30, deadline=None, derandomize=True)
norms = st.sampled_from(NORMS)
radii = st.floats(0, 1, width=32)
images = arrays.arrays("float32", SHAPE, elements=st.floats(0, 1, width=32))
anything = arrays.arrays("float32", SHAPE, elements=st.floats(-3, 3, width=32))


def grey(shape=SHAPE):
    return np.full(shape, 0.5, "float32")


@quickly
@given(norms, radii, images, anything)
def test_a_projection_is_within_the_ball_and_the_bounds(norm, eps, x, away):
    threat = ThreatModel(norm, eps)
    projected = threat.project(away, x).numpy()
    assert projected.dtype == np.float32 and projected.shape == x.shape
    assert threat.distance(projected, x).max() <= eps + 1e-6
    assert projected.min() >= 0 and projected.max() <= 1


@quickly
@given(norms, radii, images, anything)
def test_projecting_twice_changes_nothing(norm, eps, x, away):
    threat = ThreatModel(norm, eps)
    once = threat.project(away, x).numpy()
    np.testing.assert_allclose(threat.project(once, x).numpy(), once, atol=1e-6)


@quickly
@given(norms, radii, images, anything)
def test_a_projection_keeps_what_is_inside_already(norm, eps, x, away):
    inside = ThreatModel(norm, eps / 2).project(away, x).numpy()
    np.testing.assert_allclose(ThreatModel(norm, eps).project(inside, x).numpy(), inside, atol=1e-7)


@quickly
@given(radii, images, anything)
def test_the_linf_projection_is_the_nearest_point(eps, x, away):
    nearest = np.clip(away, np.maximum(x - np.float32(eps), 0), np.minimum(x + np.float32(eps), 1))
    found = ThreatModel("linf", eps).project(away, x).numpy()
    np.testing.assert_allclose(found, nearest, rtol=0, atol=1e-37)  # TensorFlow may flush subnormal numbers to zero


def test_the_l2_projection_keeps_the_direction():
    x, away = grey(), grey()
    away[:, 0, 0, 0] += 3.0
    away[:, 1, 1, 1] -= 4.0
    delta = ThreatModel("l2", 0.4).project(away, x).numpy() - x
    np.testing.assert_allclose(delta[:, 0, 0, 0], 0.24, atol=1e-6)
    np.testing.assert_allclose(delta[:, 1, 1, 1], -0.32, atol=1e-6)
    assert (delta != 0).sum() == 2 * len(x)


@quickly
@given(norms, radii, images, st.integers(0, 2**31))
def test_a_random_start_is_allowed_and_repeats_with_its_seed(norm, eps, x, seed):
    threat = ThreatModel(norm, eps)
    start = threat.random_start(x, seed)
    assert start.dtype == np.float32 and start.shape == x.shape
    assert threat.distance(start, x).max() <= eps + 1e-6
    assert start.min() >= 0 and start.max() <= 1
    np.testing.assert_array_equal(start, threat.random_start(x, seed))
    np.testing.assert_array_equal(ThreatModel(norm, 0).random_start(x, seed), x)


@pytest.mark.parametrize("norm", NORMS)
def test_another_seed_starts_elsewhere(norm):
    threat = ThreatModel(norm, 0.3)
    starts = [threat.random_start(grey(), seed) for seed in (0, 1, (0, 1), (1, 1))]
    assert len({start.tobytes() for start in starts}) == 4


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball_evenly(norm):
    x = grey((2000, 2, 2, 1))
    delta = ThreatModel(norm, 0.2).random_start(x, 0) - x
    if norm == "linf":
        uniform = (delta.ravel() / 0.2 + 1) / 2
    else:  # the share of the ball's volume within the radius
        uniform = (np.linalg.norm(delta.reshape(len(x), -1), axis=1) / 0.2) ** 4
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 0.01
    assert abs(delta.mean()) < 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_noise_has_the_full_length(norm):
    x = grey((200, 3, 3, 1))
    threat = ThreatModel(norm, 0.1)
    noisy = threat.noise(x, 5)
    assert noisy.dtype == np.float32
    np.testing.assert_allclose(threat.distance(noisy, x), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(noisy, threat.noise(x, 5))
    assert not np.array_equal(noisy, threat.noise(x, 6))
    delta = (noisy - x).reshape(200, -1) / 0.1
    assert np.abs(delta.mean(axis=0)).max() < 4 / np.sqrt(200)  # no direction is preferred
    if norm == "linf":
        np.testing.assert_allclose(np.abs(delta), 1, rtol=1e-5)
    np.testing.assert_array_equal(ThreatModel(norm, 0).noise(x, 5), x)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_may_have_another_length_for_every_image_and_is_clipped(norm):
    x, lengths = grey((4, 3, 3, 1)), np.array([0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(ThreatModel(norm, 1).distance(noise(x, norm, lengths), x), lengths, atol=1e-6)
    clipped = ThreatModel(norm, 0.5, (-0.1, 0.6)).noise(0 * x)
    assert clipped.min() >= np.float32(-0.1) and clipped.max() <= np.float32(0.6) and clipped.max() > 0.15


def test_linf_noise_is_the_sign_of_a_random_start():
    """As chapter 05 and the sanity checks have always drawn it."""
    threat, x = ThreatModel("linf", 0.3), np.random.default_rng(0).uniform(0, 1, (9, 5, 5, 1)).astype("float32")
    x[:, 0] = 0
    expected = np.clip(x + 0.3 * np.sign(threat.random_start(x, (1, 2)) - x), 0, 1).astype("float32")
    np.testing.assert_array_equal(threat.noise(x, (1, 2)), expected)


def test_the_distance_is_that_of_the_norm():
    x, moved = np.zeros((2, 2, 2, 1), "float32"), np.zeros((2, 2, 2, 1), "float32")
    moved[0, 0, 0], moved[0, 1, 1], moved[1, 1, 0] = 0.3, -0.4, 0.25
    np.testing.assert_allclose(ThreatModel("linf", 1).distance(moved, x), [0.4, 0.25], rtol=1e-6)
    np.testing.assert_allclose(ThreatModel("l2", 1).distance(moved, x), [0.5, 0.25], rtol=1e-6)
    assert ThreatModel("l2", 1).distance(moved, x).dtype == np.float64


def test_other_bounds_hold():
    threat, x = ThreatModel("linf", 1.5, (-1, 1)), np.full(SHAPE, -0.5, "float32")
    assert threat.project(x - 9, x).numpy().min() == -1
    assert threat.project(x + 9, x).numpy().max() == 1
    start = threat.random_start(x, 0)
    assert start.min() == -1 and start.max() <= 1


@pytest.mark.parametrize(("arguments", "message"), [
    (("l1", 0.1), "norm is 'l1'"),
    (("l2", -0.1), "eps is -0.1"),
    (("linf", float("nan")), "eps is nan"),
    (("linf", float("-inf")), "eps is -inf"),
    (("linf", 8), "0-255 units"),
    (("linf", 25.5), "0-255 units"),
    (("linf", 0.1, (1, 0)), "bounds are"),
    (("linf", 0.1, (0.5, 0.5)), "bounds are"),
    (("linf", 0.1, (0, float("nan"))), "bounds are"),
])
def test_a_threat_model_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(*arguments)


@pytest.mark.parametrize("norm", NORMS)
def test_infinity_allows_every_valid_image(norm):
    free, x = ThreatModel(norm, np.inf), np.random.default_rng(0).uniform(0, 1, SHAPE).astype("float32")
    corner, start = np.round(1 - x), free.random_start(x, 0)
    np.testing.assert_allclose(free.project(corner, x).numpy(), corner, atol=1e-6)
    np.testing.assert_array_equal(free.project(corner + 1, x).numpy().min(), np.float32(1))
    assert free.contains(corner, x).all() and free.contains(start, x).all() and not np.array_equal(start, x)
    assert not free.contains(corner + 0.1, x).any()
    assert free.radius(SHAPE[1:]) == (1 if norm == "linf" else np.sqrt(32))
    assert ThreatModel(norm, 0.3).radius(SHAPE[1:]) == 0.3


@pytest.mark.parametrize("norm", NORMS)
def test_a_threat_model_contains_what_differs_by_rounding_alone(norm):
    threat, x = ThreatModel(norm, 0.1), grey()
    at_eps = threat.noise(x)
    assert threat.contains(x, x).all() and threat.contains(at_eps, x).all()
    outside = x + np.float32(1.001) * (at_eps - x)
    assert not threat.contains(outside, x).any()
    outside[0] = x[0]
    np.testing.assert_array_equal(threat.contains(outside, x), [True, False, False])


def test_a_threat_model_is_a_value():
    threat = ThreatModel("linf", 0.1, [0, 1])
    assert threat == ThreatModel("linf", 0.1) and hash(threat) == hash(ThreatModel("linf", 0.1))
    with pytest.raises(FrozenInstanceError):
        threat.eps = 0.2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_the_change_onto_a_plane_is_the_smallest_within_the_bounds(norm, scale):
    """Against SciPy: a linear programme in linf, a quadratic one in l2; the last gaps lie out of reach."""
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0, 1, (30, 3, 2, 1)).astype("float32"), rng.normal(size=(30, 3, 2, 1)).astype("float32")
    w *= rng.uniform(size=w.shape) < 0.8
    gap = (rng.normal(size=30) * np.repeat([0.2, 1, 5], 10)).astype("float32")
    change = onto_plane(*map(tf.constant, (x, scale * w, np.float32(scale) * gap)), norm, (0.0, 1.0)).numpy()
    assert (x + change).min() >= 0 and (x + change).max() <= 1
    least, most = (((w * side > 0) - x) * w for side in (-1, 1))
    reached = np.clip(gap, least.sum(axis=(1, 2, 3)), most.sum(axis=(1, 2, 3)))
    np.testing.assert_allclose((change * w).sum(axis=(1, 2, 3)), reached, atol=1e-5)
    assert (reached != gap).sum() > 3
    for length, *row in zip(ThreatModel(norm, 1).distance(x + change, x), x, w, reached, strict=True):
        assert length <= 1.01 * shortest(norm, *(part.ravel().astype("float64") for part in row[:2]), row[2])


def shortest(norm, x, w, gap):
    """Length of the smallest change that reaches 0.9999 of the gap within the bounds, by SciPy.

    All of the gap may be a rounding error out of reach; the last of it may take a per cent of the length.
    """
    box, gap, one = [(-pixel, 1 - pixel) for pixel in x], 0.9999 * gap, np.ones((len(x), 1))
    if norm == "linf":
        sides = np.vstack([np.hstack([np.eye(len(x)), -one]), np.hstack([-np.eye(len(x)), -one])])
        return scipy.optimize.linprog(np.r_[0 * x, 1], sides, np.zeros(2 * len(x)), np.r_[w, 0][None], [gap],
                                      [*box, (0, None)]).fun
    plane = {"type": "eq", "fun": lambda change: change @ w - gap, "jac": lambda change: w}
    return np.sqrt(scipy.optimize.minimize(lambda change: change @ change, 0 * x, jac=lambda change: 2 * change,
                                           bounds=box, constraints=plane, method="SLSQP").fun)
