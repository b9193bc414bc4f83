"""Monte-Carlo dropout: the four metrics are their equations, and a draw is one thinned network for every image."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings
from keras import layers
from scipy.special import log_softmax, softmax, xlogy

from helpers.uncertainty import METRICS, formulas, fresh, metrics, sample, thinned

SHAPE = (4, 4, 1)
X = np.random.default_rng(0).uniform(0, 1, (7, *SHAPE)).astype("float32")
PAIR = np.array([1, 0.5], "float32").reshape(1, 1, 2, 1)


def dense(units, **options):
    return layers.Dense(units, kernel_initializer=keras.initializers.RandomNormal(stddev=1.0), **options)


def network(rate=0.4, batch_norm=True):
    """Dropout behind the convolution and before the last layer; moved batch statistics in front of both."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(4, 3, activation="relu"), *[layers.BatchNormalization()] * batch_norm,
        layers.Dropout(rate), layers.Flatten(), dense(8, activation="relu"),
        *[layers.BatchNormalization()] * batch_norm, layers.Dropout(rate), dense(3),
    ])
    for _ in range(20 * batch_norm):
        model(X, training=True)
    return model


def two_units(*rates):
    """A network whose two logits are the two pixels of an image, dropped out at each rate in turn."""
    return keras.Sequential([layers.Input(PAIR.shape[1:]), layers.Flatten(), *map(layers.Dropout, rates),
                             layers.Dense(2, kernel_initializer="identity")])


NET, PLAIN = network(), network(batch_norm=False)

probabilities = arrays.arrays(
    "float64", st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-60, 60),
).map(lambda z: softmax(z, axis=2).astype("float32"))


# ── The metrics ──


@given(probabilities)
def test_metrics_are_equations_5_to_8(p):
    mean = p.astype("float64").sum(axis=0) / len(p)
    entropy = -xlogy(mean, mean).sum(axis=1)
    variance = ((p - mean) ** 2).sum(axis=0) / len(p)
    expected = {"confidence": mean.max(axis=1), "entropy": entropy, "variance": variance.sum(axis=1) / p.shape[2],
                "mutual information": entropy + xlogy(p, p).sum(axis=(0, 2)) / len(p)}
    found = metrics(p)
    assert tuple(found) == METRICS
    for name in METRICS:
        assert found[name].shape == (p.shape[1],) and found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@given(probabilities)
def test_metrics_keep_their_bounds(p):
    found, classes, slack = metrics(p), p.shape[2], 1e-5
    assert (found["confidence"] >= 1 / classes - slack).all() and (found["confidence"] <= 1 + slack).all()
    assert (found["variance"] >= 0).all() and (found["variance"] <= 0.25 + slack).all()
    assert (found["mutual information"] >= -slack).all()
    assert (found["mutual information"] <= found["entropy"] + slack).all()
    assert (found["entropy"] <= np.log(classes) + slack).all()


def test_draws_that_agree_have_neither_variance_nor_mutual_information():
    found = metrics(np.tile(softmax([[0.0, 1, 2], [3, 0, 0]], axis=1), (6, 1, 1)))
    np.testing.assert_allclose(found["variance"], 0, atol=1e-12)
    np.testing.assert_allclose(found["mutual information"], 0, atol=1e-7)
    assert (found["entropy"] > 0.2).all()


def test_two_certain_draws_of_opposite_opinion_differ_by_log_2():
    found = metrics(np.array([[[1.0, 0, 0]], [[0, 1, 0]]]))
    for name, value in {"confidence": 1 / 2, "entropy": np.log(2), "variance": (1 / 4 + 1 / 4 + 0) / 3,
                        "mutual information": np.log(2)}.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-6, err_msg=name)


def test_the_metrics_have_a_finite_gradient_where_a_probability_is_zero():
    p = tf.constant([[[1.0, 0, 0]], [[0, 1, 0]]])
    with tf.GradientTape() as tape:
        tape.watch(p)
        total = tf.add_n([tf.reduce_sum(value) for value in formulas(p).values()])
    assert np.isfinite(tape.gradient(total, p)).all()


@pytest.mark.parametrize(("p", "message"), [
    (np.full((4, 3), 1 / 3), "p has shape"), (np.full((1, 4, 3), 1 / 3), "p has shape .1, 4, 3.*2 draws"),
    (np.full((2, 4, 3), 1 / 2), "p holds rows.*sum to 1"), (np.array([[[2.0, -1]]] * 2), "p holds rows.*negative"),
    (np.full((2, 4, 3), np.nan), "p holds rows"),
])
def test_what_is_no_sample_of_probabilities_is_refused(p, message):
    with pytest.raises(ValueError, match=message):
        metrics(p)


# ── The samples ──


def test_a_sample_holds_probabilities_that_differ_between_draws():
    p = sample(NET, X, draws=6)
    assert p.shape == (6, len(X), 3) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(axis=2), 1, rtol=1e-5)
    assert all(np.abs(p[a] - p[b]).max() > 1e-3 for a in range(6) for b in range(a))


def test_the_same_seed_gives_the_same_sample_and_another_seed_another():
    first = sample(NET, X, draws=4, seed=1)
    np.testing.assert_array_equal(first, sample(network(), X, draws=4, seed=1))
    assert np.abs(first - sample(NET, X, draws=4, seed=2)).max() > 0.01


@settings(max_examples=10)
@given(st.permutations(range(len(X))), st.integers(1, len(X)), st.integers(1, len(X)))
def test_a_result_depends_neither_on_the_batch_nor_on_the_other_images(order, n, batch_size):
    order = order[:n]
    np.testing.assert_allclose(sample(NET, X[order], draws=3, batch_size=batch_size),
                               sample(NET, X, draws=3)[:, order], atol=1e-6)


def test_a_thinned_network_is_the_same_for_every_image():
    p = sample(NET, np.concatenate([X, X]), draws=4)
    np.testing.assert_allclose(p[:, : len(X)], p[:, len(X) :], atol=1e-6)


@pytest.mark.parametrize("rates", [(0.5,), (0.25,), (0.75,), (0.5, 0.25)])
def test_units_are_dropped_and_scaled_at_the_rate_of_every_layer(rates):
    """The share `kept` of units stays, scaled by its inverse: a value of the log-odds for each subset of the two."""
    p, kept = sample(two_units(*rates), PAIR, draws=4000)[:, 0], np.prod([1 - rate for rate in rates])
    log_odds = np.log(p[:, 0] / p[:, 1])
    shares = {0: (1 - kept) ** 2, 1: kept * (1 - kept), -0.5: kept * (1 - kept), 0.5: kept**2}
    found = {value: np.isclose(log_odds, value / kept, atol=1e-4).mean() for value in shares}
    for value, share in shares.items():
        np.testing.assert_allclose(found[value], share, atol=4.5 * np.sqrt(share * (1 - share) / 4000))
    np.testing.assert_allclose(sum(found.values()), 1)


def test_one_images_draws_are_distributed_as_those_of_keras():
    """`model(x, training=True)` draws anew for every image of a batch: a batch of copies is a sample."""
    n, x = 3000, X[:1]
    ours, keras_draws = sample(PLAIN, x, draws=n)[:, 0], softmax(PLAIN(np.repeat(x, n, axis=0), training=True), axis=1)
    error = np.sqrt((ours.var(axis=0) + keras_draws.var(axis=0)) / n)
    assert (error < 0.02).all() and (np.abs(ours.mean(axis=0) - keras_draws.mean(axis=0)) < 4 * error).all()
    assert min(scipy.stats.ks_2samp(ours[:, c], keras_draws[:, c]).pvalue for c in range(3)) > 1e-3


def test_fresh_networks_are_as_thinned_ones_and_others_at_every_seed():
    model = network()
    draw = fresh(model, 3000)
    first, again, other = (draw(tf.constant(X), tf.constant(seed, tf.int64)).numpy() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    fixed = thinned(model, 3000)(tf.constant(X)).numpy()
    error = np.sqrt((first.var(axis=0) + fixed.var(axis=0)) / 3000)
    assert (np.abs(first.mean(axis=0) - fixed.mean(axis=0)) < 5 * error + 1e-4).all()
    np.testing.assert_allclose(first.std(axis=0), fixed.std(axis=0), rtol=0.15, atol=1e-3)


def test_only_dropout_is_switched_on():
    """At a rate next to nothing every draw is the prediction of test mode; batch statistics would change it."""
    model = network(rate=1e-9)
    with_batch_statistics = softmax(model(X, training=True), axis=1)
    expected = softmax(model(X, training=False), axis=1)
    assert np.abs(with_batch_statistics - expected).max() > 0.01
    np.testing.assert_allclose(sample(model, X, draws=3), np.stack([expected] * 3), atol=1e-6)


def test_the_network_stays_as_it_was():
    before = [weights.copy() for weights in NET.get_weights()]
    sample(NET, X, draws=3, seed=5)
    for a, b in zip(before, NET.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_network_that_is_trained_further_is_sampled_anew():
    model = network()
    before = sample(model, X, draws=3)
    model.layers[-1].kernel.assign(-model.layers[-1].kernel)
    after = sample(model, X, draws=3)
    np.testing.assert_allclose(log_softmax(-np.log(before), axis=2), np.log(after), atol=1e-4)  # no bias: logits turn


class Count(layers.Layer):
    """Count the batches that pass."""

    def build(self, shape):
        self.batches = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.batches.assign_add(1.0)
        return x


def test_what_precedes_the_first_dropout_is_computed_once():
    before, after = Count(), Count()
    model = keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dropout(0.0), before, layers.Dropout(0.5),
                              after, dense(3)])
    sample(model, X, draws=9, batch_size=3)  # seven images: three batches
    assert float(before.batches) == 3 and float(after.batches) == 3 * 9


# ── Bad input ──


def functional():
    image = keras.Input(SHAPE)
    return keras.Model(image, dense(3)(layers.Dropout(0.5)(layers.Flatten()(image))))


@pytest.mark.parametrize(("model", "draws", "error", "message"), [
    (network(rate=0.0), 5, ValueError, "model has no dropout"),
    (keras.Sequential([layers.Input(SHAPE), layers.Flatten(), dense(3)]), 5, ValueError, "model has no dropout"),
    (functional(), 5, TypeError, "model is Functional.*Sequential"),
    (lambda x: x, 5, TypeError, "model is function.*Sequential"),
    (NET, 1, ValueError, "draws is 1.*at least 2"),
])
def test_networks_that_cannot_be_thinned_are_refused(model, draws, error, message):
    with pytest.raises(error, match=message):
        thinned(model, draws)
    with pytest.raises(error, match=message):
        sample(model, X, draws=draws)


@pytest.mark.parametrize(("x", "error"), [(X * 255, ValueError), (X[0], TypeError), (X.astype("float64"), TypeError)])
def test_bad_images_are_refused(x, error):
    with pytest.raises(error, match="^x "):
        sample(NET, x)


def test_a_dropout_of_whole_maps_is_refused():
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.SpatialDropout2D(0.5), keras.layers.Flatten(),
                              keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="drops whole maps"):
        thinned(model, 2)
