"""What all attacks share: they stay within the threat model, repeat, harm no network, and refuse bad input."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from keras import layers
from toys import LINEAR, NET, SHAPE, N, X, Y, linear, margins, network, steady, three_classes

from helpers import attacks, losses
from helpers.defence import Outputs, as_defence
from helpers.evaluation import logits
from helpers.search import DRAWS, Found, direction, input_gradient
from helpers.standard import apgd, fab, square, standard
from helpers.threat import ThreatModel

quickly = settings(max_examples=6, deadline=None, derandomize=True)


def other(y):
    return np.where(np.asarray(y) == 0, 1, 0)


ATTACKS = {  # defence, x, y, threat, seed -> Found
    "fgsm": lambda m, x, y, threat, seed=0, **o: attacks.fgsm(m, x, y, threat, **o),
    "bim": lambda m, x, y, threat, seed=0, **o: attacks.bim(m, x, y, threat, steps=3, **o),
    "pgd-linf": lambda m, x, y, threat, seed=0, **o: attacks.pgd(
        m, x, y, threat, steps=6, restarts=2, losses=("cross-entropy", "margin"), seed=seed, **o),
    "pgd-l2": lambda m, x, y, threat, seed=0, **o: attacks.pgd(m, x, y, threat, steps=3, seed=seed, **o),
    "pgd-compact": lambda m, x, y, threat, seed=0, **o: attacks.pgd(
        m, x, y, threat, steps=7, restarts=2, compact=True, seed=seed, **{"batch_size": 5} | o),
    "normalised": lambda m, x, y, threat, seed=0, **o: attacks.normalised(
        m, x, y, threat, **{"target": other(y)} | o, steps=3),
    "ddn": lambda m, x, y, threat, seed=0, **o: attacks.ddn(m, x, y, threat, steps=4, **o),
    "lbfgs": lambda m, x, y, threat, seed=0, **o: attacks.lbfgs(
        m, x, y, threat, **{"target": other(y)} | o, searches=2, max_iterations=3),
    "apgd-linf": lambda m, x, y, threat, seed=0, **o: apgd(m, x, y, threat, steps=6, seed=seed, **o),
    "apgd-l2": lambda m, x, y, threat, seed=0, **o: apgd(
        m, x, y, threat, steps=6, radii=(2, 1), loss="targeted dlr", seed=seed, **{"batch_size": 5} | o),
    "fab-linf": lambda m, x, y, threat, seed=0, **o: fab(m, x, y, threat, steps=4, **o),
    "fab-l2": lambda m, x, y, threat, seed=0, **o: fab(m, x, y, threat, steps=4, **{"batch_size": 5} | o),
    "square-linf": lambda m, x, y, threat, seed=0, **o: square(m, x, y, threat, queries=8, seed=seed, **o),
    "square-l2": lambda m, x, y, threat, seed=0, **o: square(
        m, x, y, threat, queries=8, seed=seed, **{"batch_size": 5} | o),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)
WARM = ("pgd-linf", "apgd-l2", "fab-l2", "square-linf")
TARGETED = ("fgsm", "bim", "pgd-linf", "normalised", "ddn", "lbfgs")
IN_L2 = ("pgd-compact", "normalised", "ddn", "lbfgs")


def threat_of(name, eps=0.1):
    return ThreatModel("l2" if name.endswith("l2") or name in IN_L2 else "linf", eps)


def run(name, model, x=X, y=Y, eps=0.1, **options):
    return ATTACKS[name](model, x, y, threat_of(name, eps), **options)


# ── Within the threat model ──


@every_attack
@quickly
@given(data=st.data())
def test_results_stay_within_the_threat_model(name, data):
    x = data.draw(arrays.arrays("float32", (5, *SHAPE), elements=st.floats(0, 1, width=32)))
    y = data.draw(arrays.arrays("int64", 5, elements=st.integers(0, 2)))
    eps = data.draw(st.floats(0, 1, width=32))
    x_before, y_before = x.copy(), y.copy()
    found = run(name, NET, x, y, eps, seed=data.draw(st.integers(0, 99)))
    assert found.images.dtype == np.float32 and found.images.shape == x.shape and np.isfinite(found.images).all()
    assert found.value.shape == found.steps.shape == (5,) and found.steps.dtype.kind == "i"
    assert threat_of(name, eps).distance(found.images, x).max() <= eps + 1e-6
    assert found.images.min() >= 0 and found.images.max() <= 1
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(y, y_before)


@every_attack
def test_no_radius_no_change(name):
    for eps in (0, 0.0):
        np.testing.assert_array_equal(run(name, NET, eps=eps).images, X)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@every_attack
def test_without_a_limit_every_valid_image_is_allowed(name, norm):
    if name in IN_L2[1:] and norm == "linf":
        return
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel(norm, np.inf)
    found = ATTACKS[name](NET, X, y, threat)
    assert threat.contains(found.images, X).all() and np.isfinite(found.value).all()
    assert (found.value > 0).mean() > 0.4  # in a few steps


# ── Seeds ──


@every_attack
def test_the_same_seed_gives_the_same_images(name):
    hard, y = linear(bias=-9.0), np.zeros(N, int)  # nothing is beaten, so that every query and restart is spent
    for model, labels in ((hard, y), (NET, Y)):
        first, again = (run(name, model, y=labels, seed=3) for _ in range(2))
        for one, two in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, two)


# ── What an attack must not do to a network, and which networks it takes ──


def state(model):
    return {variable.path: variable.numpy() for variable in model.variables}


@every_attack
def test_an_attack_leaves_the_network_as_it_was(name):
    """Weights, batch statistics and the seed of dropout, which would move if dropout were on."""
    before = state(NET)
    assert any("moving_mean" in path for path in before) and any("seed" in path for path in before)
    run(name, NET)
    assert all(np.array_equal(before[path], value) for path, value in state(NET).items())


WITHOUT = network(dropout=0.0)
WITHOUT.set_weights(NET.get_weights())


@every_attack
def test_dropout_is_off_in_an_attack(name):
    np.testing.assert_array_equal(run(name, NET).images, run(name, WITHOUT).images)


@steady  # so that both run as the same graph: other sums may send an attack another way
def function(x):
    return NET(x, training=False)


@every_attack
def test_a_function_is_attacked_like_the_network_it_calls(name):
    np.testing.assert_allclose(run(name, function).images, run(name, NET).images, atol=1e-6)


@pytest.mark.parametrize("name", ["fgsm", "pgd-l2", "apgd-l2", "square-linf"])
def test_a_function_may_compute_in_float64(name):
    y = np.zeros(N, int)
    exact = run(name, steady(lambda x: tf.cast(LINEAR(x), tf.float64)), y=y)
    np.testing.assert_allclose(exact.images, run(name, LINEAR, y=y).images, atol=1e-5)
    assert exact.value.dtype == np.float32


SOFT = keras.Sequential([NET, layers.Softmax()])


@every_attack
def test_a_network_that_ends_in_a_softmax_is_refused(name):
    with pytest.raises(ValueError, match="probabilities.*expected logits"):
        run(name, SOFT)


@pytest.mark.parametrize("mask", [tf.stop_gradient, tf.round], ids=["stopped", "rounded"])
def test_a_network_without_gradients_is_attacked_without_success(mask):
    """No error: the attack fails, and the sanity checks are what finds the reason."""
    masked = steady(lambda x: LINEAR(mask(x)))
    for name in ATTACKS:
        assert np.isfinite(run(name, masked, y=Y % 2).images).all()
    np.testing.assert_array_equal(run("bim", masked, y=Y % 2).images, X)


# ── What is random ──


@every_attack
def test_an_attack_calls_a_random_model_anew_in_every_step(name):
    calls = []

    def model(x):  # a graph would keep the first shift for ever
        calls.append(np.random.normal(scale=1e-4))  # noqa: NPY002
        return LINEAR(x + calls[-1])

    sure = np.abs(margins(LINEAR, X, Y % 2)) > 0.1  # never beaten within so small a radius
    x, y = X[sure], logits(LINEAR, X[sure]).argmax(axis=1)
    steps = {"fgsm": 1, "bim": 3, "pgd-linf": 12, "pgd-l2": 3, "pgd-compact": 3 * 14, "normalised": 3,
             "apgd-linf": 7, "apgd-l2": 3 * 8}.get(name, 8)
    for _ in range(2):
        before = len(calls)
        assert (run(name, model, x, y, 0.001).value < 0).all()
        assert len(calls) - before >= steps + DRAWS
    assert len(set(calls)) == len(calls)


def test_a_random_network_is_attacked_where_it_says_so():
    class Shift(layers.Layer):
        def call(self, x):
            return x + np.random.normal(scale=0.1)  # noqa: NPY002

    random = keras.Sequential([layers.Input(SHAPE), Shift(), NET])
    with pytest.raises(ValueError, match="model answers differently when it is called again"):
        attacks.fgsm(random, X, Y, ThreatModel("linf", 0.1))
    random.randomised = True
    once, again = (attacks.pgd(random, X, Y, ThreatModel("l2", 0.3), steps=3).images for _ in range(2))
    assert np.abs(once - again).max() > 1e-4


@every_attack
def test_a_function_is_attacked_alike_with_and_without_a_graph(name):
    """What may be random is not asked again once an image has won, and so another win may be kept of it."""
    declared, said_nothing = run(name, three_classes), run(name, lambda x: three_classes(x))
    np.testing.assert_array_equal(declared.value > 0, said_nothing.value > 0)
    rows = declared.left()
    np.testing.assert_allclose(declared.images[rows], said_nothing.images[rows], atol=1e-5)
    np.testing.assert_allclose(declared.value[rows], said_nothing.value[rows], atol=1e-5)


# ── What was found ──


def test_what_is_better_is_kept_row_by_row():
    found = Found(np.zeros((4, *SHAPE), "float32"), np.array([1, -1, -1, 0], "float32"), np.zeros(4, int))
    found.offer(np.ones((2, *SHAPE), "float32"), np.array([-2.0, 0.5]), np.array([1, 2]))
    np.testing.assert_array_equal(found.value, [1, -1, 0.5, 0])
    np.testing.assert_array_equal(found.images.max(axis=(1, 2, 3)), [0, 0, 1, 0])
    np.testing.assert_array_equal(found.left(), [1, 3])  # a value of 0 is no win


def test_probability_and_cross_entropy_have_one_direction():
    def minus_probability(logits, y):
        return -tf.gather(tf.nn.softmax(logits), y, batch_dims=1)

    x, y = tf.constant(X), tf.constant(Y)
    ways = [input_gradient(three_classes, loss, x, y)[0] for loss in (
        losses.cross_entropy, minus_probability, losses.minus_logit)]
    text, code, logit = (direction(way, "l2") for way in ways)
    np.testing.assert_allclose(text, code, atol=1e-5)
    assert np.abs(text - logit).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(text.numpy().reshape(N, -1), axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(direction(ways[0], "linf"), np.sign(ways[0]))


# ── Bad input ──

BAD_IMAGES = {
    "0-255": (255 * X, ValueError, "expected pixels in"),
    "negative": (X - 0.9, ValueError, "expected pixels in"),
    "nan": (np.where(X > 0.5, np.nan, X).astype("float32"), ValueError, "NaN"),
    "rank": (X[..., 0], TypeError, "expected a float32 NumPy array of shape"),
    "float64": (X.astype("float64"), TypeError, "x is float64"),
    "uint8": ((255 * X).astype("uint8"), TypeError, "x is uint8"),
    "list": (X.tolist(), TypeError, "x is list"),
    "empty": (X[:0], ValueError, "x is empty"),
}
BAD_LABELS = {
    "too large": (Y + 3, ValueError, "expected labels in 0...2"),
    "negative": (Y - 3, ValueError, "expected labels in 0...2"),
    "float": (Y.astype(float), TypeError, "integer labels"),
    "short": (Y[:-1], TypeError, "integer labels"),
    "one-hot": (np.eye(3, dtype=int)[Y], TypeError, "integer labels"),
}


@every_attack
@pytest.mark.parametrize(("x", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused(name, x, error, message):
    with pytest.raises(error, match=message):
        run(name, NET, x, Y[: len(x)])


@every_attack
@pytest.mark.parametrize(("y", "error", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_refused(name, y, error, message):
    with pytest.raises(error, match=message):
        run(name, NET, y=y)


@every_attack
def test_bad_radii_batches_and_other_things_are_refused(name):
    for eps in (-0.1, np.nan):
        with pytest.raises(ValueError, match=f"eps is {eps}"):
            run(name, NET, eps=eps)
    if name != "lbfgs":  # which takes one image after the other
        with pytest.raises(ValueError, match="batch_size is 0"):
            run(name, NET, batch_size=0)
    with pytest.raises(TypeError, match="defence is str; expected a Keras network, a function .* or an object"):
        run(name, "network")
    with pytest.raises(ValueError, match="path: unknown 'BPDA', expected one of exact"):
        run(name, NET, path="BPDA")
    with pytest.raises(TypeError, match="defence is int; expected"):
        run(name, NET, path=3)


@pytest.mark.parametrize("name", WARM)
@pytest.mark.parametrize(("start", "message"), [
    (255 * X, "start lies in"), (np.full_like(X, np.nan), "start holds NaN"), (X[:3], "start has shape"),
])
def test_bad_starts_are_refused(name, start, message):
    with pytest.raises(ValueError, match=message):
        run(name, NET, start=start)


@pytest.mark.parametrize("name", TARGETED)
def test_the_true_class_is_no_target(name):
    target = (Y + 1) % 3
    target[[2, 5]] = Y[[2, 5]]
    with pytest.raises(ValueError, match=r"target equals y for the images \[2, 5\]"):
        run(name, NET, target=target)
    for bad, error, message in BAD_LABELS.values():
        with pytest.raises(error, match=f"target .*{message}"):
            run(name, NET, target=bad)


def test_a_radius_in_0_to_255_units_is_refused():
    with pytest.raises(ValueError, match="0-255 units"):
        run("fgsm", NET, eps=25.5)


def test_the_standard_set_checks_its_arguments_like_an_attack():
    for x, error, message in BAD_IMAGES.values():
        with pytest.raises(error, match=message):
            standard(NET, x, Y[: len(x)], threat_of("fgsm"))


def test_a_surrogate_of_other_classes_is_refused():
    two = as_defence(steady(lambda x: LINEAR(x)))
    for path in (LINEAR, two):
        with pytest.raises(ValueError, match="the path gives 2 classes; expected 3, those of the defence"):
            attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), path=path)


def test_the_outputs_of_a_goal_are_those_of_the_defence():
    seen = []

    def goal(outputs, y):
        seen.append(outputs)
        return losses.evasion(outputs, y)

    attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), goal=goal, steps=1)
    assert seen and all(isinstance(each, Outputs) and each.logits.dtype == tf.float32 for each in seen)
