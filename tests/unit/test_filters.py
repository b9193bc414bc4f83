"""The filters: equal to SciPy's and scikit-image's, gradients that are right, paths around them, arguments checked."""

import io

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import scipy.ndimage
import skimage.filters
import skimage.restoration
import tensorflow as tf
from hypothesis import given, settings
from PIL import Image

from helpers import attacks, evaluation, filters, models
from helpers.filters import Filter
from helpers.threat import ThreatModel

rng = np.random.default_rng(0)
X = rng.uniform(0, 1, (4, 13, 17, 3)).astype("float32")  # not square: rows and columns must not be mixed up
KINDS = {"gaussian": 1.5, "median": 3, "jpeg": 50, "bits": 3, "tv": 0.1}
every_kind = pytest.mark.parametrize(("kind", "value"), KINDS.items(), ids=KINDS)
quickly = settings(max_examples=10, deadline=None, derandomize=True)


def images(side=9):
    shapes = st.tuples(st.integers(1, 3), st.just(side), st.just(side), st.sampled_from([1, 3]))
    return arrays.arrays("float32", shapes, elements=st.floats(0, 1, width=32))


# ── Equal to the libraries at the same boundary mode ──


@pytest.mark.parametrize("sigma", [0, 0.3, 0.5, 1, 1.5, 2, 3])
def test_gaussian_equals_scipy(sigma):
    expected = scipy.ndimage.gaussian_filter(X, (0, sigma, sigma, 0), mode="reflect") if sigma else X
    np.testing.assert_allclose(filters.apply(X, "gaussian", sigma), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_median_equals_scikit_image(size):
    found = filters.apply(X, "median", size)
    for image, result in zip(X, found, strict=True):
        for channel in range(3):
            expected = skimage.filters.median(image[..., channel], np.ones((size, size)), mode="reflect")
            np.testing.assert_array_equal(result[..., channel], expected)


def test_jpeg_is_near_that_of_another_library_and_loses_more_at_lower_quality():
    smooth = scipy.ndimage.gaussian_filter(X, (0, 4, 4, 0))
    for image, found in zip(smooth, filters.apply(smooth, "jpeg", 50), strict=True):
        file = io.BytesIO()
        Image.fromarray(np.uint8(255 * image + 0.5)).save(file, "jpeg", quality=50)
        assert np.abs(found - np.asarray(Image.open(file)) / 255).mean() < 0.01
    losses = [np.abs(filters.apply(smooth, "jpeg", quality) - smooth).mean() for quality in (100, 50, 5)]
    assert losses[0] < 0.01 and losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.5])
def test_total_variation_equals_scikit_image(weight):
    found = filters.apply(X, "tv", weight)
    for image, result in zip(X, found, strict=True):
        expected = skimage.restoration.denoise_tv_chambolle(
            image, weight, eps=0, max_num_iter=filters.TV_STEPS + 1, channel_axis=-1)
        np.testing.assert_allclose(result, np.clip(expected, 0, 1), atol=1e-4)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_bits_leave_so_many_grey_levels(depth):
    found = filters.apply(X, "bits", depth)
    assert len(np.unique(found)) <= 2**depth
    assert np.abs(found - X).max() <= 0.5 / (2**depth - 1) + 1e-6
    np.testing.assert_allclose(filters.apply(found, "bits", depth), found, atol=1e-6)


@every_kind
def test_large_input_goes_in_batches(kind, value):
    many = np.concatenate([X] * 4)
    np.testing.assert_array_equal(filters.apply(many, kind, value, batch_size=3), filters.apply(many, kind, value))


# ── Properties ──


@quickly
@given(images(), st.sampled_from(sorted(KINDS.items())))
def test_a_filter_keeps_shape_range_and_its_input(x, filter):
    before = x.copy()
    found = filters.apply(x, *filter)
    assert found.shape == x.shape and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    np.testing.assert_array_equal(x, before)


@quickly
@given(images(), st.floats(0.3, 2))
def test_gaussian_is_a_contraction_that_keeps_the_mean(x, sigma):
    found = filters.apply(x, "gaussian", sigma)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), x.mean(axis=(1, 2)), atol=1e-5)  # mirrored: nothing is lost
    assert np.linalg.norm(found) <= np.linalg.norm(x) * (1 + 1e-5)


@quickly
@given(images(), st.sampled_from([3, 5]), st.booleans())
def test_median_commutes_with_order_and_mirroring(x, size, mirrored):
    """The median of monotone images of the pixels is the image of the median; so is that of the mirrored picture."""
    found = filters.apply(x, "median", size)
    np.testing.assert_allclose(filters.apply(x**2, "median", size), found**2, atol=1e-6)
    np.testing.assert_array_equal(filters.apply(x[:, :, ::-1].copy(), "median", size), found[:, :, ::-1])


def test_a_flat_image_passes_unchanged():
    flat = np.full((1, 12, 12, 3), 0.4, "float32")
    for kind, value in (("gaussian", 2.0), ("median", 5)):
        np.testing.assert_allclose(filters.apply(flat, kind, value), flat, atol=1e-6)


# ── Gradients ──


def gradient(layer, x, weight):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(layer(x) * weight)
    return tape.gradient(value, x, unconnected_gradients="zero").numpy()


@pytest.mark.parametrize(("kind", "value"), [("gaussian", 1.0), ("median", 3), ("median", 5), ("tv", 0.1)])
def test_the_exact_gradient_agrees_with_finite_differences(kind, value):
    x, weight = rng.uniform(0, 1, (1, 8, 9, 2)), rng.standard_normal((1, 8, 9, 2))
    layer = Filter(kind, value, dtype="float64")
    exact = gradient(layer, x, weight)
    for at in [(0, 0, 0, 0), (0, 7, 8, 1), (0, 3, 4, 0), (0, 5, 1, 1), (0, 2, 2, 0)]:
        ahead, behind = x.copy(), x.copy()
        ahead[at] += 1e-7
        behind[at] -= 1e-7
        slope = (tf.reduce_sum(layer(tf.constant(ahead)) * weight) - tf.reduce_sum(layer(tf.constant(behind)) * weight))
        np.testing.assert_allclose(slope / 2e-7, exact[at], atol=1e-5)


def test_the_median_shares_its_gradient_among_ties():
    flat = np.full((1, 6, 6, 1), 0.5)
    found = gradient(Filter("median", 3, dtype="float64"), flat, np.ones_like(flat))
    assert found.sum() == pytest.approx(36) and (found > 0).all()


@every_kind
def test_bpda_pretends_that_the_filter_is_the_identity(kind, value):
    weight = rng.standard_normal(X.shape).astype("float32")
    exact, pretended = Filter(kind, value), filters.defend(network(), kind, value).paths()["BPDA"].outputs.shown
    np.testing.assert_allclose(pretended(X), exact(X), atol=1e-6)
    np.testing.assert_allclose(gradient(pretended, X, weight), weight, atol=1e-6)
    if kind in ("jpeg", "bits"):
        assert not gradient(exact, X, weight).any()
    else:
        assert np.abs(gradient(exact, X, weight) - weight).max() > 0.1


@pytest.mark.parametrize("quality", [30, 75])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stand_in_for_jpeg_is_near_it_and_has_its_gradient(quality, channels):
    """Near as pictures: on noise, which no file keeps, it differs. The gradient is that of the stand-in."""
    smooth = scipy.ndimage.gaussian_filter(X, (0, 4, 4, 0))[..., :channels]
    near = filters.jpeg_like(tf.constant(smooth), quality).numpy()
    assert np.abs(near - filters.apply(smooth, "jpeg", quality)).mean() < 0.01
    assert near.shape == smooth.shape and near.min() >= 0 and near.max() <= 1
    x, weight = smooth[:1].astype("float64"), rng.standard_normal(smooth[:1].shape)
    slope = (gradient(lambda x: filters.jpeg_like(x, quality), x, weight) * weight).sum()
    ends = [tf.reduce_sum(filters.jpeg_like(tf.constant(x + s * weight), quality) * weight) for s in (1e-7, -1e-7)]
    assert slope == pytest.approx(float(ends[0] - ends[1]) / 2e-7, rel=1e-4) and abs(slope) > 1


# ── Surrogates: the filter on the way there, something like it on the way back ──


@every_kind
def test_surrogates_are_like_the_filter_and_have_a_gradient(kind, value):
    """On a smooth picture all are near the filter, the identity and the smooth one as near as the filter is to it."""
    smooth = scipy.ndimage.gaussian_filter(X, (0, 4, 4, 0))
    for name, surrogate in filters.surrogates(kind, value).items():
        near = np.abs(np.asarray(surrogate(tf.constant(smooth))) - filters.apply(smooth, kind, value)).mean()
        assert near < 0.08, name
        assert gradient(surrogate, smooth, rng.standard_normal(X.shape).astype("float32")).any(), name


@every_kind
def test_what_is_held_back_is_no_surrogate_yet_and_has_a_gradient(kind, value):
    spare, known = filters.held_back(kind, value), filters.surrogates(kind, value)
    assert not spare.keys() & known.keys() and bool(spare) == (kind in ("median", "jpeg", "bits"))
    assert list(filters.attacked(network(), kind, value, spare=True).paths()) == ["unaware", *known, *spare]
    for surrogate in spare.values():
        assert gradient(surrogate, X, rng.standard_normal(X.shape).astype("float32")).any()


@every_kind
def test_every_surrogate_is_a_path_with_the_filter_s_answers_and_its_own_gradient(kind, value):
    net, weight = network(), rng.standard_normal(X.shape).astype("float32")
    defended, own = filters.attacked(net, kind, value), filters.surrogates(kind, value)
    paths = defended.paths()
    assert list(paths) == ["unaware", *own]
    expected = evaluation.logits(filters.defend(net, kind, value), X)
    np.testing.assert_allclose(evaluation.logits(defended, X), expected, atol=1e-5)
    for name, surrogate in own.items():
        np.testing.assert_allclose(paths[name].outputs(tf.constant(X)).logits, expected, atol=1e-4)
        np.testing.assert_allclose(gradient(paths[name].outputs.shown, X, weight), gradient(surrogate, X, weight),
                                   atol=1e-4)


def test_the_soft_median_shares_its_gradient_among_near_pixels():
    x = np.linspace(0.4, 0.41, 36, dtype="float32").reshape(1, 6, 6, 1)
    soft, sharp = (gradient(lambda x, f=f: f(x, 3), x, np.ones_like(x)) for f in (filters.soft_median, filters.median))
    assert soft.sum() == pytest.approx(36, rel=1e-4) and soft.std() < sharp.std()


# ── Where a change lives ──


def test_white_noise_has_the_same_power_at_all_frequencies_and_a_wave_at_one():
    white = filters.power_by_frequency(rng.standard_normal((200, 16, 16, 3)))
    np.testing.assert_allclose(white, 1, atol=0.2)
    wave = np.broadcast_to(np.sin(2 * np.pi * np.arange(16) / 4)[:, None, None], (2, 16, 16, 1))
    power = filters.power_by_frequency(wave)
    assert power[4] == pytest.approx(256 / 32) and np.delete(power, 4).max() < 1e-9  # a ring of 32 of 256 frequencies
    assert not filters.power_by_frequency(0 * wave).any()


# ── Attackers who try one surrogate after the other ──


def test_survivors_fall_with_every_path_and_every_eps():
    net = network()
    defended = filters.attacked(net, "jpeg", 50)
    y = evaluation.logits(defended, X).argmax(axis=1)
    y[0] = (y[0] + 1) % 3  # wrong without an attack
    grid, names = np.array([2, 32]) / 255, list(defended.surrogates)
    standing, stored = filters.survivors(defended, grid, X, y, names=names, steps=3)
    assert standing.shape == (len(names), 2, len(X)) and stored.shape == (2, len(X))
    assert not standing[:, :, 0].any() and not stored[:, 0].any()
    assert (standing[1:] <= standing[:-1]).all() and (standing[:, 1:] <= standing[:, :-1]).all()
    alone = filters.survivors(defended, grid, X, y, names=names[:1], steps=3)[0]
    np.testing.assert_array_equal(alone[0], standing[0])
    assert (stored[1] <= stored[0]).all()


@pytest.mark.parametrize(("grid", "names", "message"), [
    ([0.1, 0.05], ["identity"], "^grid is .*rising"), ([0.0, 0.1], ["identity"], "> 0"), ([], ["identity"], "grid is"),
    ([0.1], ["identiti"], "names: unknown 'identiti', did you mean 'identity'")])
def test_arguments_of_survivors_are_checked(grid, names, message):
    with pytest.raises(ValueError, match=message):
        filters.survivors(filters.attacked(network(), "bits", 3), grid, X, np.zeros(4, int), names=names)


def test_surrogates_of_what_is_no_filter_are_refused():
    with pytest.raises(ValueError, match="kind: unknown 'gaussian2', did you mean 'gaussian'"):
        filters.surrogates("gaussian2", 1.0)
    with pytest.raises(ValueError, match="value is 4"):
        filters.surrogates("median", 4)


# ── In front of a network ──


def network():
    """Quick to compile: every path has graphs of its own."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(X.shape[1:]), keras.layers.Conv2D(4, 3, 2, activation="relu"),
                             keras.layers.Flatten(), keras.layers.Dense(3)])


@every_kind
def test_a_defended_network_sees_the_filtered_image(kind, value):
    net = models.inception(X.shape[1:], 3, width=2)
    defended, expected = filters.defend(net, kind, value), evaluation.logits(net, filters.apply(X, kind, value))
    np.testing.assert_allclose(evaluation.logits(defended, X), expected, atol=1e-4)
    paths, strongest = defended.paths(), dict.fromkeys(["gaussian", "median", "tv"], ["exact"]) | {
        "jpeg": ["approximated"]}
    assert list(paths) == ["unaware", "BPDA", *strongest.get(kind, [])]
    for name, path in paths.items():
        seen = evaluation.logits(net, X) if name == "unaware" else expected
        np.testing.assert_allclose(path.outputs(tf.constant(X)).logits, seen, atol=1e-4)


@every_kind
def test_every_path_is_judged_by_what_is_deployed(kind, value):
    """An image counts as it is seen behind the filter, whatever its way was; a filter without a gradient has no other
    way than around it."""
    net, threat = network(), ThreatModel("linf", 0.1)
    defended = filters.defend(net, kind, value)
    y = evaluation.logits(defended, X).argmax(axis=1)
    for path in defended.paths():
        found = attacks.pgd(defended, X, y, threat, steps=3, path=path)
        seen = evaluation.logits(net, filters.apply(found.images, kind, value))
        np.testing.assert_array_equal(found.value > 0, seen.argmax(axis=1) != y)
    assert evaluation.has_gradient(defended.paths()["BPDA"], X, y).all()
    assert evaluation.has_gradient(defended, X, y).any() == (kind in ("gaussian", "median", "tv"))


@every_kind
def test_a_filter_can_be_saved_in_front_of_a_network(kind, value, tmp_path):
    def in_front(kind, value):
        return keras.Sequential([keras.Input(X.shape[1:]), Filter(kind, value), network()])

    whole = in_front(kind, value)
    name = models.save(whole, tmp_path)
    np.testing.assert_allclose(models.load(tmp_path / name)(X), whole(X), atol=1e-5)
    others = [in_front("gaussian", 0.7), in_front("bits", 7), network()]
    assert len({name, *(models.save(other, tmp_path) for other in others)}) == 4  # same weights, other networks


@pytest.mark.parametrize(("kind", "value"), [("gaussian", 1.5), ("median", 3)])
def test_the_filter_has_no_weights_and_a_float64_copy(kind, value):
    defended = filters.defend(models.inception(X.shape[1:], 3, width=2), kind, value)
    assert not defended.before.weights and defended.as_float64().before.compute_dtype == "float64"
    errors, kinked = evaluation.gradient_errors(defended, X, np.zeros(len(X), int))
    assert kinked.mean() <= 0.1 and errors[~kinked].max() < 1e-4


def test_a_filter_comes_back_from_its_configuration():
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(Filter("median", 3))).value == 3


# ── Bad input ──


@pytest.mark.parametrize(("kind", "value", "message"), [
    ("median", 4, "value is 4.*odd"), ("median", 0, "odd"), ("median", 2.5, "odd"),
    ("gaussian", -1, "value is -1.*>= 0"), ("gaussian", np.nan, "finite"), ("gaussian", np.inf, "finite"),
    ("jpeg", 0, "1 to 100"), ("jpeg", 101, "1 to 100"),
    ("bits", 9, "1 to 8"), ("bits", 2.5, "1 to 8"),
    ("tv", 0, "finite weight > 0"), ("tv", np.inf, "finite"), ("gaussian2", 1, "did you mean 'gaussian'"),
])
def test_values_that_make_no_filter_are_refused(kind, value, message):
    with pytest.raises(ValueError, match=message):
        Filter(kind, value)


@pytest.mark.parametrize(("kind", "value"), [("median", 15), ("gaussian", 3.5)])
def test_a_window_larger_than_the_image_is_refused(kind, value):
    with pytest.raises(ValueError, match="^value: .* at most the size of the image, 13 x 17"):
        filters.apply(X, kind, value)


@pytest.mark.parametrize(("kind", "value"), [("median", 15), ("gaussian", 3.5)])
def test_a_window_larger_than_the_network_s_images_is_refused(kind, value):
    with pytest.raises(ValueError, match="^value: .* at most the size of the image, 13 x 17"):
        filters.defend(network(), kind, value)


def test_a_path_that_the_filter_has_not_is_refused():
    with pytest.raises(ValueError, match="path: unknown 'exakt', did you mean 'exact'"):
        attacks.pgd(filters.defend(network(), "median", 3), X, np.zeros(4, int), ThreatModel("linf", 0.1), path="exakt")
    with pytest.raises(ValueError, match="path: unknown 'exact', expected one of unaware, BPDA"):
        attacks.pgd(filters.defend(network(), "bits", 3), X, np.zeros(4, int), ThreatModel("linf", 0.1), path="exact")


@pytest.mark.parametrize(("x", "error", "message"), [
    (255 * X, ValueError, "expected pixels in"), (X.astype("float64"), TypeError, "expected a float32"),
    (X[0], TypeError, "shape"), (X[:0], ValueError, "empty"),
])
def test_images_are_checked(x, error, message):
    with pytest.raises(error, match=message):
        filters.apply(x, "gaussian", 1.0)
