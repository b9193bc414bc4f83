"""The checks of arguments: what they name, what they let pass, and that an image is checked once on its way in."""

import sys

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from keras import layers

from helpers import attacks, closeness, defence, detection, evaluation, filters, rejection, standard, uncertainty
from helpers.checks import check_images, check_labels, check_positive
from helpers.threat import ThreatModel

SHAPE = (3, 4, 4, 2)
quickly = settings(max_examples=30, deadline=None, derandomize=True)
images = arrays.arrays("float32", SHAPE, elements=st.floats(0, 1, width=32))
X = np.random.default_rng(0).uniform(0, 1, (60, 4, 4, 1)).astype("float32")
Y = (X[:, :2].mean(axis=(1, 2, 3)) > X[:, 2:].mean(axis=(1, 2, 3))).astype("int64")
LINF = ThreatModel("linf", 0.1)


def grey(shape=SHAPE):
    return np.full(shape, 0.5, "float32")


def with_pixel(value):
    x = grey()
    x[1, 2, 3, 0] = value
    return x


@pytest.mark.parametrize(("x", "error", "message"), [
    (grey().astype("float64"), TypeError, "photos is float64"),
    ((255 * grey()).astype("uint8"), TypeError, "photos is uint8"),
    (grey((4, 4, 2)), TypeError, r"shape \(n, height, width, channels\)"),
    (grey().tolist(), TypeError, "photos is list"),
    (grey((0, 4, 4, 2)), ValueError, "photos is empty"),
    (255 * grey(), ValueError, r"\[127.5, 127.5\]; expected pixels in \[0.0, 1.0\]"),
    (with_pixel(-0.01), ValueError, r"photos lies in \[-0.01, 0.5\]"),
    (with_pixel(1.01), ValueError, r"photos lies in \[0.5, 1.01\]"),
    (with_pixel(np.nan), ValueError, "photos holds NaN"),
    (with_pixel(np.inf), ValueError, "photos holds NaN or infinite"),
])
def test_bad_images_are_named(x, error, message):
    with pytest.raises(error, match=message):
        check_images(x, "photos")


@pytest.mark.parametrize(("y", "error", "message"), [
    ([0, 1, 3], ValueError, "y lies in 0...3; expected labels in 0...2"),
    ([0, -1, 2], ValueError, "y lies in -1...2"),
    ([0.0, 1.0, 2.0], TypeError, "y is float64"),
    ([True, False, True], TypeError, "y is bool"),
    ([0, 1], TypeError, r"\(2,\); expected 3 integer labels"),
    ([[0], [1], [2]], TypeError, r"\(3, 1\); expected 3"),
    (np.eye(3, dtype=int), TypeError, r"\(3, 3\); expected 3"),
])
def test_bad_labels_are_named(y, error, message):
    with pytest.raises(error, match=message):
        check_labels(y, 3, 3)


def test_an_error_bears_the_name_of_the_argument():
    with pytest.raises(ValueError, match="target lies in 0...3"):
        check_labels([0, 1, 3], 3, 3, "target")


@quickly
@given(images)
def test_good_images_and_labels_pass(x):
    check_images(x)
    check_labels([0, 1, 2], 3, 3)
    check_labels(np.array([2, 2, 0], "uint8"), 3, 3)


@pytest.mark.parametrize(("name", "number", "expected"), [
    ("gamma", 0, "finite"), ("gamma", -1.0, "finite"), ("gamma", np.nan, "finite"), ("gamma", np.inf, "finite"),
    ("steps", 0, "whole"), ("steps", 2.5, "whole"), ("restarts", 2.0, "whole"), ("batch_size", -1, "whole"),
    ("batch_size", None, "whole"), ("epochs", np.nan, "whole"), ("queries", np.float64(3), "whole"),
])
def test_numbers_that_are_not_positive_or_not_whole_are_named(name, number, expected):
    with pytest.raises(ValueError, match=f"{name} is {number}; expected a {expected} number > 0"):
        check_positive(eps=1, **{name: number})


def test_positive_and_whole_numbers_pass():
    check_positive(gamma=1e-300, C=np.float32(0.1), step_size=None, steps=1, batch_size=np.int64(7), epochs=True)


# ── Once at the public door ──


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([layers.Input((4, 4, 1)), layers.Flatten(), layers.Dense(6, "relu"), layers.Dropout(0.3),
                             layers.Dense(2)])


@pytest.fixture(scope="module")
def near(network):
    return closeness.Closeness.fit(closeness.activations(network, X), Y, 1.0, 2)


@pytest.fixture(scope="module")
def fitted(network):
    return rejection.fit(network, X, Y, layers=(1, 2))


@pytest.mark.parametrize("call", [
    lambda network, fitted, near: attacks.pgd(network, X, Y, ThreatModel("l2", 0.1), steps=2),
    lambda network, fitted, near: attacks.fgsm(filters.defend(network, "bits", 3), X, Y, LINF, path="BPDA"),
    lambda network, fitted, near: standard.square(network, X, Y, LINF, queries=3),
    lambda network, fitted, near: defence.answers(network, X),
    lambda network, fitted, near: evaluation.correct(network, X, Y),
    lambda network, fitted, near: filters.apply(X, "median", 3),
    lambda network, fitted, near: uncertainty.sample(network, X, draws=2),
    lambda network, fitted, near: detection.features(network, X, near.thin(20), draws=2),
    lambda network, fitted, near: rejection.fit(network, X, Y, layers=(1, 2)),
    lambda network, fitted, near: rejection.prepare(network, X, (1, 2)),
    lambda network, fitted, near: evaluation.outcomes(fitted, X, Y),
], ids=["pgd", "path", "square", "answers", "correct", "filter", "sample", "features", "fit", "prepare", "outcomes"])
def test_an_image_is_checked_once(call, network, fitted, near, monkeypatch):
    checked = []
    for name, module in list(sys.modules.items()):
        if name.startswith("helpers.") and hasattr(module, "check_images"):
            monkeypatch.setattr(module, "check_images", lambda x, *rest, **options: checked.append(x))
    call(network, fitted, near)
    assert len(checked) == 1
