"""Closeness: density, divergence and local dimension are those of scikit-learn, SciPy and their formulas."""

from dataclasses import replace

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings
from keras import layers
from scipy.special import logsumexp, rel_entr, softmax
from sklearn.neighbors import KernelDensity

from helpers import closeness
from helpers.closeness import Closeness
from helpers.models import as_float64

D, CLASSES = 6, 3
rng = np.random.default_rng(0)
LABELS = np.repeat(np.arange(CLASSES), [9, 14, 5])
POINTS = np.maximum(rng.normal(LABELS[:, None], 1, (len(LABELS), D)), 0).astype("float32")  # as after a ReLU
OF_CLASS = np.split(POINTS, [9, 9 + 14])
QUERIES = np.maximum(rng.normal(1, 1.5, (11, D)), 0).astype("float32")
ASKED = np.arange(11) % CLASSES
SIGMA = 1.7
NEAR = Closeness.fit(POINTS, LABELS, SIGMA, CLASSES)
SHAPE = (4, 4, 1)
X = rng.uniform(0, 1, (5, *SHAPE)).astype("float32")


def of_sklearn(points, queries, sigma):
    """Mean of exp(-|x - y|^2 / sigma^2), in the logarithm: scikit-learn's density without its normalisation."""
    tree = KernelDensity(bandwidth=sigma / np.sqrt(2)).fit(points.astype("float64"))
    return tree.score_samples(queries.astype("float64")) + points.shape[1] / 2 * np.log(np.pi * sigma**2)


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(4, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
        layers.Dense(D, "tanh"), layers.Dropout(0.5), layers.Dense(CLASSES),
    ])
    for _ in range(20):
        model(X, training=True)
    return model


# ── The last hidden layer ──


def test_activations_are_what_enters_the_last_layer_in_test_mode():
    model, hidden = network(), X
    for layer in model.layers[:-1]:
        hidden = layer(hidden, training=False)
    found = closeness.activations(model, X, batch_size=2)
    assert found.shape == (len(X), D) and found.dtype == np.float32
    np.testing.assert_allclose(found, hidden, atol=1e-6)
    np.testing.assert_allclose(model.layers[-1](found), model(X, training=False), atol=1e-5)


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="^x lies in"):
        closeness.activations(network(), 255 * X)


# ── Kernel density ──


@settings(max_examples=25)
@given(n=st.integers(1, 30), d=st.integers(1, 40), sigma=st.floats(0.3, 5), away=st.sampled_from([0, 1, 10, 300]),
       origin=st.sampled_from([0, 20]), seed=st.integers(0, 999))
def test_the_log_density_is_that_of_scikit_learn(n, d, sigma, away, origin, seed):
    """Far away too, where the density itself is zero in floating point, and far from the origin."""
    draw = np.random.default_rng(seed)
    points = (origin + draw.normal(0, 2, (n, d))).astype("float32")
    queries = (origin + draw.normal(0, 2, (7, d)) + away).astype("float32")
    found = Closeness((points,), sigma).log_density(queries, np.zeros(7, int))
    expected = of_sklearn(points, queries, sigma)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * 4 * d / sigma**2)  # terms of that size cancel


def test_a_density_that_underflows_still_has_its_logarithm():
    far = QUERIES + 100
    expected = of_sklearn(NEAR.points[0], far, SIGMA)
    assert (np.exp(expected) == 0).all()
    np.testing.assert_allclose(NEAR.log_density(far, np.zeros(11, int)), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 500])
def test_the_log_density_compares_every_image_with_the_points_of_its_own_class(batch_size):
    found = NEAR.log_density(QUERIES, ASKED, batch_size)
    for i, c in enumerate(ASKED):
        np.testing.assert_allclose(found[i], of_sklearn(OF_CLASS[c], QUERIES[i : i + 1], SIGMA)[0], rtol=1e-5)


def test_on_a_single_point_the_density_is_the_kernel():
    near = Closeness.fit(POINTS[:1], np.array([0]), 0.5, 1)
    moved = POINTS[:1] + np.eye(1, D, dtype="float32") * 0.25  # 0.25 away: exp(-(0.25 / 0.5)^2)
    found = near.log_density(np.concatenate([POINTS[:1], moved]), np.zeros(2, int))
    np.testing.assert_allclose(found, [0, -0.25], atol=1e-6)


def test_members_restrict_the_points():
    members = ASKED[:, None] == LABELS[None, :]
    found = closeness.log_density(tf.constant(QUERIES), tf.constant(POINTS), SIGMA, members)
    np.testing.assert_allclose(found, NEAR.log_density(QUERIES, ASKED), rtol=1e-5)
    everyone = closeness.log_density(tf.constant(QUERIES), tf.constant(POINTS), SIGMA)
    np.testing.assert_allclose(everyone, of_sklearn(POINTS, QUERIES, SIGMA), rtol=1e-5)


@pytest.mark.parametrize("away", [0, 50])
@pytest.mark.parametrize("restricted", [False, True])
def test_the_gradient_of_the_log_density_is_that_of_finite_differences(away, restricted):
    points, x, h = tf.constant(POINTS, tf.float64), tf.constant(QUERIES + away, tf.float64), 1e-5
    members = ASKED[:, None] == LABELS[None, :] if restricted else True
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = closeness.log_density(x, points, SIGMA, members)
    gradient = tape.gradient(values, x).numpy()
    for j, unit in enumerate(np.eye(D)):
        ahead, behind = (closeness.log_density(x + s * unit, points, SIGMA, members) for s in (h, -h))
        np.testing.assert_allclose(gradient[:, j], (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)
    assert np.abs(gradient).min(axis=0).max() > 1e-3


# ── KL divergence ──


def by_hand(features, pmf):
    """Distributions in float64, a row an image."""
    exact = np.atleast_2d(features).astype("float64")
    return softmax(exact, axis=1) if pmf == "softmax" else exact / np.maximum(exact.sum(axis=1, keepdims=True), 1e-7)


@pytest.mark.parametrize("pmf", closeness.DISTRIBUTIONS)
def test_kl_is_that_of_scipy(pmf):
    found = replace(NEAR, pmf=pmf).kl(QUERIES, ASKED)
    for i, c in enumerate(ASKED):
        p, q = by_hand(QUERIES[i], pmf)[0], by_hand(OF_CLASS[c], pmf).mean(axis=0)
        np.testing.assert_allclose(found[i], rel_entr(p, q).sum(), rtol=1e-5, atol=1e-6)
        if pmf == "softmax":  # SciPy's makes sums of 1 by itself
            np.testing.assert_allclose(found[i], scipy.stats.entropy(p, q), rtol=1e-5, atol=1e-6)
    assert (found > 0.01).all()


def test_a_unit_that_a_class_never_uses_costs_much_and_not_infinitely_much():
    near = Closeness((np.array([[1.0, 0.0]], "float32"),), 1.0)
    found = near.kl(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]], "float32"), np.zeros(3, int))
    expected = np.log(0.5) - 0.5 * np.log(closeness.FLOOR)
    np.testing.assert_allclose(found, [0, expected, 0], rtol=1e-5, atol=1e-6)  # no activation at all: no divergence


def test_negative_activations_have_no_shares():
    with pytest.raises(ValueError, match="features go down to -1.*softmax"):
        Closeness.fit(-POINTS / POINTS.max(), LABELS, SIGMA, CLASSES)
    near = Closeness.fit(-POINTS / POINTS.max(), LABELS, SIGMA, CLASSES, pmf="softmax")
    assert near.pmf == near.thin(2).pmf == "softmax"
    with pytest.raises(ValueError, match="pmf"):
        Closeness.fit(POINTS, LABELS, SIGMA, CLASSES, pmf="L2")


def test_the_divergence_from_itself_is_zero():
    near = Closeness.fit(POINTS[[0, 10, 20]], np.arange(3), SIGMA, 3)
    np.testing.assert_allclose(near.kl(POINTS[[0, 10, 20]], np.arange(3)), 0, atol=1e-6)
    assert (near.kl(POINTS[[0, 10, 20]], np.array([1, 2, 0])) > 0.01).all()


def test_divergences_are_from_every_class():
    found = closeness.divergences(tf.constant(QUERIES), NEAR.means()).numpy()
    np.testing.assert_allclose(found, np.stack([NEAR.kl(QUERIES, np.full(11, c)) for c in range(CLASSES)], axis=1))
    np.testing.assert_allclose(replace(NEAR, pmf="softmax").means().sum(axis=1), 1, rtol=1e-6)


# ── Local intrinsic dimensionality ──


@pytest.mark.parametrize("neighbours", [1, 4, 11])
def test_lid_is_its_formula(neighbours):
    """Over the k nearest: -1 / mean of log (r_i / r), with the distance r of the next one as the scale."""
    distance = np.sort(np.linalg.norm(QUERIES[:, None].astype("float64") - POINTS[None], axis=2), axis=1)
    ratios = np.log(distance[:, :neighbours] / distance[:, neighbours : neighbours + 1])
    np.testing.assert_allclose(NEAR.lid(QUERIES, neighbours), -1 / ratios.mean(axis=1), rtol=1e-3)


def test_lid_takes_the_first_points_of_every_class():
    np.testing.assert_allclose(NEAR.lid(QUERIES, 5, reference=4), NEAR.thin(4).lid(QUERIES, 5), rtol=1e-6)
    assert np.abs(NEAR.lid(QUERIES, 5, reference=4) - NEAR.lid(QUERIES, 5)).max() > 0.01


@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_lid_estimates_the_dimension_of_a_cloud(dimension):
    """Points spread evenly over a cube of that dimension, within a space of more."""
    draw = np.random.default_rng(0)
    cloud = np.zeros((4200, 10), "float32")
    cloud[:, :dimension] = draw.uniform(-1, 1, (4200, dimension))
    near = Closeness((cloud[200:],), 1.0)
    inner = cloud[:200] / 4  # away from the faces
    assert near.lid(inner, 30, 4000).mean() == pytest.approx(dimension, rel=0.15)


# ── The points ──


def test_points_are_sorted_by_class():
    order = rng.permutation(len(LABELS))
    near = Closeness.fit(POINTS[order], LABELS[order], 1, CLASSES)
    assert near.bandwidth == 1.0 and len(near.points) == CLASSES
    for c in range(CLASSES):
        np.testing.assert_array_equal(near.points[c], POINTS[order][LABELS[order] == c])
        assert near.points[c].dtype == np.float32


def test_thin_keeps_the_first_points_of_each_class_and_the_rest_as_it_was():
    thin = NEAR.thin(7)
    assert [len(members) for members in thin.points] == [7, 7, 5] and thin.bandwidth == SIGMA
    assert [len(members) for members in NEAR.points] == [9, 14, 5]
    for few, members in zip(thin.points, NEAR.points, strict=True):
        np.testing.assert_array_equal(few, members[:7])


@pytest.mark.parametrize(("labels", "options", "error", "message"), [
    (LABELS, {"classes": 5}, ValueError, r"labels lack the classes \[3, 4\]"),
    (np.where(LABELS == 1, 0, LABELS), {}, ValueError, r"labels lack the classes \[1\]"),
    (LABELS, {"bandwidth": 0.0}, ValueError, "bandwidth is 0.0"),
    (LABELS, {"bandwidth": -1.0}, ValueError, "bandwidth is -1.0"),
    (LABELS, {"bandwidth": np.nan}, ValueError, "bandwidth is nan"),
    (LABELS[1:], {}, TypeError, "expected 28 integer labels"),
    (LABELS.astype(float), {}, TypeError, "y is float64.*integer labels"),
    (LABELS - 1, {}, ValueError, "labels in 0...2"),
    (LABELS + 1, {}, ValueError, "labels in 0...2"),
])
def test_bad_points_are_refused(labels, options, error, message):
    with pytest.raises(error, match=message):
        Closeness.fit(POINTS, labels, **{"bandwidth": SIGMA, "classes": CLASSES} | options)


@pytest.mark.parametrize("measure", [NEAR.log_density, NEAR.kl])
def test_the_classes_asked_for_are_checked(measure):
    np.testing.assert_array_equal(measure(QUERIES, ASKED.tolist()), measure(QUERIES, ASKED))
    for classes, error in [(ASKED + 1, ValueError), (ASKED - 1, ValueError), (ASKED[1:], TypeError), (0, TypeError)]:
        with pytest.raises(error, match="expected (11 integer labels|labels in 0...2)"):
            measure(QUERIES, classes)


def test_densities_and_divergences_compute_in_float64_too():
    """As `detection.Guarded` needs them for checks by finite differences."""
    model, exact = network(), as_float64(network())
    hidden = closeness.last_hidden(exact)(tf.constant(X, tf.float64))
    assert hidden.dtype == tf.float64
    np.testing.assert_allclose(hidden, closeness.activations(model, X), atol=1e-5)
    members = OF_CLASS[0].astype("float64")
    expected = logsumexp(-((QUERIES[:, None] - members[None]) ** 2).sum(axis=2) / SIGMA**2, axis=1) - np.log(9)
    found = closeness.log_density(tf.constant(QUERIES, tf.float64), tf.constant(members), SIGMA)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_class_mean_that_underflows_leaves_the_divergence_finite():
    far = np.array([[200.0, 0.0, 0.0]], "float32")
    assert Closeness((far,), 1.0).kl(far, np.zeros(1, int)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("neighbours", [0, 4])
def test_lid_needs_more_points_than_neighbours(neighbours):
    points = np.eye(4, dtype="float32")
    with pytest.raises(ValueError, match=f"neighbours is {neighbours}; expected 1 to 3"):
        Closeness((points,), 1.0).lid(points, neighbours)


def test_an_offset_that_all_features_share_costs_no_digits():
    h = np.random.default_rng(0).normal(100, 0.01, (20, 12544)).astype("float32")
    wide = h.astype("float64")
    exact = ((wide[:, None] - wide) ** 2).sum(axis=-1)
    found = closeness.squared_distances(tf.constant(h), tf.constant(h)).numpy()
    np.testing.assert_allclose(found, exact, atol=1e-5)  # about 2.5
