"""The purifier: the shapes of Table III, its loss through a frozen classifier, both as one network, its attackers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.restoration import denoise_tv_chambolle

from helpers import attacks, data, evaluation, models, purification, training
from helpers.defence import Behind
from helpers.losses import evasion, margin
from helpers.purification import TotalVariation, autoencoder, composite_loss, defended
from helpers.search import input_gradient
from helpers.threat import ThreatModel

SHAPE = (16, 16, 1)
rng = np.random.default_rng(0)
X = rng.uniform(0.1, 0.9, (24, *SHAPE)).astype("float32")
Y = np.arange(24) % 3


def small(seed=0, **options):
    return autoencoder(SHAPE, filters=(2, 3, 4, 5), seed=seed, **options)


def frozen(shape=SHAPE, trainable=False):
    model = models.two_conv(shape, 3, seed=1)
    model.trainable = trainable
    return model


def flat(model):
    return np.concatenate([weights.ravel() for weights in model.get_weights()])


# ── The autoencoder of Table III ──


def test_the_layers_have_the_shapes_of_table_iii():
    model = autoencoder((224, 224, 1))
    down = [layer.output.shape[1:] for layer in model.layers if type(layer) is keras.layers.Conv2D]
    up = [layer.output.shape[1:] for layer in model.layers if type(layer) is keras.layers.Conv2DTranspose]
    assert down == [(112, 112, 32), (56, 56, 64), (28, 28, 128), (14, 14, 256)]
    assert up == [(28, 28, 128), (56, 56, 64), (112, 112, 32), (224, 224, 1)]
    (linear,) = [layer for layer in model.layers if type(layer) is keras.layers.Dense]
    assert linear.kernel.shape == (196, 196)
    assert sum(type(layer) is keras.layers.Add for layer in model.layers) == 4  # skips


def test_the_number_of_weights_is_counted_by_hand():
    down = 3 * 3 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 32 + 64 + 128 + 256
    up = 4 * 4 * (256 * 128 + 128 * 64 + 64 * 32 + 32 * 1) + 128 + 64 + 32 + 1
    assert autoencoder((64, 64, 1)).count_params() == down + up + 16 * 16 + 16


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3]))
def test_any_size_that_four_halvings_divide_comes_back_and_is_not_negative(rows, columns, channels):
    shape = (16 * rows, 16 * columns, channels)
    x = rng.uniform(0, 1, (2, *shape)).astype("float32")
    purified = autoencoder(shape, filters=(2, 3, 4, 5), seed=rows)(x).numpy()
    assert purified.shape == x.shape and purified.min() >= 0


@pytest.mark.parametrize("shape", [(60, 64, 1), (64, 24, 3), (0, 16, 1)])
def test_a_size_not_divisible_by_16_is_named(shape):
    with pytest.raises(ValueError, match=r"input_shape is .* expected a height and width divisible by 16"):
        autoencoder(shape)


@pytest.mark.parametrize("shape", [(64, 64, 2), (64, 64, 4), (64, 64)])
def test_channels_other_than_1_or_3_are_named(shape):
    with pytest.raises(ValueError, match=r"input_shape is .* with 1 or 3 channels"):
        autoencoder(shape)


def test_the_seed_decides_the_weights():
    np.testing.assert_array_equal(flat(small(3)), flat(small(3)))
    assert not np.array_equal(flat(small(3)), flat(small(4)))


def test_the_linear_layer_carries_a_pixel_across_the_image():
    """Convolutions alone see a part of a large image; the linear layer mixes all positions."""
    model = autoencoder((128, 128, 1), filters=(2, 2, 2, 2))
    x = np.full((1, 128, 128, 1), 0.5, "float32")
    with tf.GradientTape() as tape:
        image = tf.constant(x)
        tape.watch(image)
        corner = model(image)[0, 0, 0, 0]
    assert np.abs(tape.gradient(corner, image)[0, -32:, -32:]).max() > 0


# ── Purifier and classifier as one network ──


def test_the_whole_is_the_classifier_of_the_purified_image():
    purifier, classifier = small(), frozen()
    whole, expected = defended(purifier, classifier), classifier(purifier(X), training=False)
    np.testing.assert_allclose(whole(X).logits, expected, atol=1e-6)
    np.testing.assert_allclose(evaluation.logits(whole, X), expected, atol=1e-5)
    assert not whole.randomised and list(whole.paths()) == ["unaware", "BPDA", "exact"]  # the strongest last


def test_the_gradient_goes_through_both():
    whole = defended(small(), frozen())
    errors, kinked = evaluation.gradient_errors(whole, X[:5], Y[:5])
    assert not kinked.any() and errors.max() < 1e-3
    assert evaluation.has_gradient(whole, X, Y).all()


def test_the_whole_comes_back_from_the_disk_as_its_two_parts(tmp_path):
    whole = defended(small(), frozen())
    purifier, classifier = (models.load(tmp_path / models.save(part, tmp_path))
                            for part in (whole.before, whole.network))
    classifier.trainable = False
    np.testing.assert_array_equal(defended(purifier, classifier)(X).logits, whole(X).logits)


def test_an_attack_on_the_whole_is_stronger_than_one_on_the_classifier():
    whole, classifier, threat = defended(small(), frozen()), frozen(), ThreatModel("linf", 0.1)
    y = evaluation.logits(whole, X).argmax(axis=1)
    found = {path: attacks.pgd(whole, X, y, threat, steps=10, path=path) for path in ("exact", "unaware")}
    assert found["exact"].value.mean() > found["unaware"].value.mean()
    for each in found.values():
        np.testing.assert_allclose(margin(evaluation.logits(whole, each.images), y), each.value, atol=1e-5)
    alone = attacks.pgd(classifier, X, y, threat, steps=10).images
    assert found["exact"].value.mean() > margin(evaluation.logits(whole, alone), y).numpy().mean()


@pytest.mark.parametrize("make", [defended, lambda p, f: purification.fit(p, f, X, X, Y, weight=1, epochs=1)])
def test_channels_that_do_not_fit_are_named(make):
    with pytest.raises(ValueError, match=r"purifier maps \(16, 16, 1\) to \(16, 16, 1\) and classifier takes "
                                         r"\(16, 16, 3\)"):
        make(small(), frozen((16, 16, 3)))


@pytest.mark.parametrize("make", [defended, lambda p, f: purification.fit(p, f, X, X, Y, weight=1, epochs=1)])
def test_a_classifier_that_is_not_frozen_is_refused(make):
    with pytest.raises(ValueError, match="trainable variables; expected a frozen one"):
        make(small(), frozen(trainable=True))


# ── BPDA and total variation ──


def test_bpda_computes_forward_what_is_deployed_and_backward_the_classifier_alone():
    purifier, classifier = small(), frozen()
    whole, x = defended(purifier, classifier), tf.constant(X)
    through = whole.paths()["BPDA"].outputs
    np.testing.assert_allclose(through(x).logits, whole(x).logits, atol=1e-5)
    gradient, *_ = input_gradient(through, evasion, x, Y)
    expected, *_ = input_gradient(models.inference(classifier), margin, purifier(x, training=False), Y)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_total_variation_is_that_of_scikit_image_for_each_image_alone():
    colour = rng.uniform(0, 1, (3, 8, 8, 3)).astype("float32")
    found = TotalVariation(0.1)(colour).numpy()
    for image, smooth in zip(colour, found, strict=True):
        np.testing.assert_allclose(smooth, denoise_tv_chambolle(image, 0.1, channel_axis=-1), atol=1e-6)
    assert found.dtype == np.float32 and found.std() < colour.std()


def test_an_attack_gets_through_total_variation_by_bpda_alone():
    classifier, threat = frozen(), ThreatModel("linf", 0.05)
    smoothed = Behind(TotalVariation(0.05), classifier, exact=False)
    y = evaluation.logits(smoothed, X).argmax(axis=1)
    assert list(smoothed.paths()) == ["unaware", "BPDA"]
    x_adv = attacks.pgd(smoothed, X, y, threat, steps=5, path="BPDA").images
    assert threat.distance(x_adv, X).max() <= 0.05 + 1e-6
    before, after = (margin(evaluation.logits(smoothed, images), y).numpy() for images in (X, x_adv))
    assert (after >= before).all() and after.mean() > before.mean() + 0.01
    assert not evaluation.has_gradient(smoothed, X, Y).any()
    assert evaluation.has_gradient(smoothed.paths()["BPDA"], X, Y).all()


def test_the_unrolled_iteration_is_the_same_and_has_a_gradient():
    colour, smooth = rng.uniform(0, 1, (3, 8, 9, 3)).astype("float32"), TotalVariation(0.1)
    found = smooth.unrolled(tf.constant(colour)).numpy()
    for image, near in zip(colour, found, strict=True):
        expected = denoise_tv_chambolle(image, 0.1, eps=0, max_num_iter=30, channel_axis=-1)
        np.testing.assert_allclose(near, expected, atol=1e-5)
    assert np.abs(found - smooth(colour)).max() < 0.1 * np.abs(colour - smooth(colour)).max()
    whole = Behind(smooth, frozen(), exact=False, instead=smooth.unrolled)
    assert list(whole.paths()) == ["unaware", "BPDA", "approximated"]
    gradients = {}
    for name in ("BPDA", "approximated"):
        through, x = whole.paths()[name].outputs, tf.constant(X)
        np.testing.assert_allclose(through(x).logits, whole(x).logits, atol=1e-5)
        gradients[name] = input_gradient(through, evasion, x, Y)[0].numpy()
    by_hand = input_gradient(lambda x: models.inference(frozen())(smooth.unrolled(x)), margin, tf.constant(X), Y)[0]
    cosines = {name: (found * by_hand).numpy().sum() / np.linalg.norm(found) / np.linalg.norm(by_hand)
               for name, found in gradients.items()}
    assert cosines["approximated"] > 0.99 and cosines["BPDA"] < 0.9


@pytest.mark.parametrize("weight", [0, -1.0, float("nan")])
def test_a_weight_of_total_variation_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="weight is .* expected a finite number > 0"):
        TotalVariation(weight)


# ── The loss and the training ──


def test_the_composite_loss_by_hand():
    purified, clean = np.full((2, 2, 2, 1), 0.5, "float32"), np.full((2, 2, 2, 1), 0.2, "float32")
    logits, y = np.array([[0.0, 0.0], [2.0, 0.0]], "float32"), np.array([1, 0])
    expected = 0.09 + 0.3 * np.array([np.log(2), np.log(1 + np.exp(-2))])
    np.testing.assert_allclose(composite_loss(purified, clean, logits, y, 0.3), expected, rtol=1e-5)
    np.testing.assert_allclose(composite_loss(purified, clean, logits, y, 0), 0.09, rtol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_classifier_alone():
    purifier, classifier = small(), frozen()
    before, whole = flat(classifier), defended(purifier, classifier)
    history = purification.fit(purifier, classifier, X, X, Y, weight=0.1, epochs=40, batch_size=8, learning_rate=2e-2,
                               monitor=lambda p: {"right": evaluation.correct(whole, X, Y).mean()})
    assert history["loss"][-1] < 0.9 * history["loss"][0] and len(history["right"]) == 40
    np.testing.assert_array_equal(flat(classifier), before)  # batch statistics included


def test_the_loss_is_that_of_the_classifier_in_test_mode():
    """Without a step worth the name, and with dropout in the classifier, which training mode would switch on."""
    purifier, classifier, shown = small(), frozen(), np.clip(X + 0.05, 0, 1)
    expected = composite_loss(purifier(shown), X, classifier(purifier(shown), training=False), Y, 0.5)
    history = purification.fit(purifier, classifier, shown, X, Y, weight=0.5, epochs=1, learning_rate=1e-12)
    np.testing.assert_allclose(history["loss"], [expected.numpy().mean()], rtol=1e-5)


def test_the_classification_loss_counts_by_its_weight():
    purifiers = {weight: small() for weight in (0.0, 1.0)}
    for weight, purifier in purifiers.items():
        purification.fit(purifier, frozen(), X, X, Y, weight=weight, epochs=25, batch_size=8, learning_rate=5e-3)
    entropy = {w: evaluation.score(defended(p, frozen()), X, Y)["loss"] for w, p in purifiers.items()}
    error = {w: float(np.mean((p(X) - X) ** 2)) for w, p in purifiers.items()}
    assert entropy[1.0] < entropy[0.0] and error[0.0] < error[1.0]


def test_the_purifier_learns_to_give_back_the_clean_image_and_not_what_it_is_shown():
    shown, purifier = np.clip(X + 0.1, 0, 1), small()
    purification.fit(purifier, frozen(), shown, X, Y, weight=0, epochs=150, batch_size=24, learning_rate=5e-3)
    purified = purifier(shown).numpy()
    assert np.abs(purified.mean() - X.mean()) < np.abs(purified.mean() - shown.mean())


def test_a_last_relu_that_is_dead_wakes_in_training_and_only_there():
    purifier, classifier, black = small(), frozen(), np.zeros_like(X)
    kernel, bias = purifier.layers[-2].get_weights()
    purifier.layers[-2].set_weights([kernel, bias - 100])
    assert not purifier(X).numpy().any(), "it draws black"
    with tf.GradientTape() as tape:
        tape.watch(x := tf.constant(X))
        drawn = tf.reduce_sum(purifier(x, training=False))
    assert not np.any(tape.gradient(drawn, x)), "an attacker has the gradient of a ReLU"
    purification.fit(purifier, classifier, X, X, Y, weight=0, epochs=1)
    assert purifier.layers[-2].get_weights()[1] > bias - 100
    kept = purifier.layers[-2].get_weights()
    purification.fit(purifier, classifier, X, black, Y, weight=0, epochs=1)
    np.testing.assert_array_equal(kept[1], purifier.layers[-2].get_weights()[1], "black is right: nothing wakes")


def test_the_same_seed_gives_the_same_purifier():
    def trained(seed):
        purifier = small()
        purification.fit(purifier, frozen(), X, X, Y, weight=0.1, epochs=2, batch_size=8, seed=seed)
        return flat(purifier)

    np.testing.assert_array_equal(trained(5), trained(5))
    assert not np.array_equal(trained(5), trained(6))


@pytest.mark.parametrize("change, error, message", [
    ({"y": np.zeros(24, int)}, ValueError, r"y lacks the classes \[1, 2\] of 3"),
    ({"y": Y[:5]}, TypeError, "expected 24 integer labels"),
    ({"y": Y + 1}, ValueError, "expected labels in 0...2"),
    ({"x": X[:5]}, ValueError, r"x_in \(24, 16, 16, 1\) and x \(5, 16, 16, 1\) should have one shape"),
    ({"x": X[:, :8], "x_in": X[:, :8]}, ValueError, r"the purifier's \(16, 16, 1\)"),
    ({"x_in": X * 255}, ValueError, r"x_in lies in .* expected pixels in \[0.0, 1.0\]"),
    ({"x": X.astype("float64")}, TypeError, "expected a float32 NumPy array"),
    ({"weight": -1.0}, ValueError, "weight is -1.0; expected a finite number >= 0"),
    ({"weight": float("nan")}, ValueError, "weight is nan"),
    ({"epochs": 0}, ValueError, "epochs is 0; expected a whole number > 0"),
    ({"learning_rate": 0}, ValueError, "learning_rate is 0"),
])
def test_bad_input_of_the_training_is_named(change, error, message):
    arguments = {"x_in": X, "x": X, "y": Y, "weight": 0.1, "epochs": 1} | change
    purifier = small()
    before = flat(purifier)
    with pytest.raises(error, match=message):
        purification.fit(purifier, frozen(), **arguments)
    np.testing.assert_array_equal(flat(purifier), before)


def test_eps_in_units_of_255_is_refused_where_the_images_are_made():
    with pytest.raises(ValueError, match="is it in 0-255 units"):
        attacks.fgsm(frozen(), X, Y, ThreatModel("linf", 2.55))


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(FloatingPointError, match="smaller learning_rate"):
        purification.fit(small(), frozen(), X, X, Y, weight=1e30, epochs=20, learning_rate=1e30)


def test_rounding_of_the_smoothing_does_not_leave_the_pixel_range(monkeypatch):
    """On a black background it came out at -6e-9, which no attack takes for an image."""
    monkeypatch.setattr(purification, "denoise_tv_chambolle", lambda image, *_, **__: 1.0001 * image - 6e-9)
    cleaned = TotalVariation(0.1)(np.stack([np.zeros((8, 8, 1)), np.ones((8, 8, 1))]).astype("float32")).numpy()
    assert (cleaned.min(), cleaned.max()) == (0, 1)


def test_an_adversary_attacks_every_batch_through_both():
    """One step from the same start: the loss is that of the images that he makes, and of the clean ones if mixed."""
    classifier, foe = frozen(), training.Adversary(0.1, mixed=False)
    for mixed in (False, True):
        purifier = small()
        whole = defended(purifier, classifier)
        attacked = attacks.fgsm(whole, X, Y, ThreatModel("linf", 0.1)).images
        losses = [composite_loss(purifier(x), X, classifier(purifier(x), training=False), Y, 1.0).numpy().mean()
                  for x in (attacked, X)]
        history = purification.fit(purifier, classifier, X, X, Y, weight=1.0, epochs=1, learning_rate=1e-12,
                                   adversary=training.Adversary(0.1, mixed=mixed) if mixed else foe)
        np.testing.assert_allclose(history["loss"], [np.mean(losses) if mixed else losses[0]], rtol=1e-4)
    assert losses[0] > losses[1]


def test_the_best_epoch_is_kept():
    model = models.two_conv(SHAPE, 3, seed=1)
    monitor, best = purification.keep_best(model, clean=(model, X, np.full(24, 2)))
    rates, bias = [], model.layers[-1].bias
    for favoured in (0, 2, 1):
        bias.assign(100 * np.eye(3)[favoured])
        rates.append(monitor(model)["validation, clean"])
    assert rates == [0, 1, 0] and best["accuracy"] == 1
    np.testing.assert_array_equal(best["weights"][-1], [0, 0, 100])


def test_right_takes_purified_images_that_leave_the_range_of_pixels():
    model = frozen()
    y = model(X + 0.5, training=False).numpy().argmax(axis=1)
    assert purification.right(model, X + 0.5, y).all() and not purification.right(model, X + 0.5, (y + 1) % 3).any()


def test_a_data_set_is_scaled_in_all_its_parts():
    d = data.load("textures").take(30, 9).split(6)
    other = purification.resized(d, 32)
    assert {part.shape[1:] for part in (other.x_train, other.x_val, other.x_test)} == {(32, 32, 1)}
    np.testing.assert_allclose(other.x_test.mean(axis=(1, 2, 3)), d.x_test.mean(axis=(1, 2, 3)), atol=0.02)
    with pytest.raises(ValueError, match="side is 0"):
        purification.resized(d, 0)


# ── The residual as a detector ──


@pytest.mark.parametrize("measure", purification.MEASURES)
def test_the_detector_refuses_the_share_that_it_was_set_to(measure):
    guard = purification.residual(small(), frozen(), measure, X, 0.25)
    refusal = guard(X).refusal.numpy()
    assert (refusal > 0).sum() == 6  # of 24
    np.testing.assert_allclose(guard(X).logits, defended(small(), frozen())(X).logits, atol=1e-6)
    assert list(guard.paths()) == ["unaware", "exact"] and guard.paths()["exact"].outputs is guard


def test_the_residuals_by_hand():
    purifier, classifier = small(), frozen()
    purified = purifier(X).numpy()
    distance = np.sqrt(((X - purified) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(purification.Residual(purifier, classifier, "distance", 0.1)(X).refusal,
                               np.log(distance / 0.1), rtol=1e-4)
    p, q = (tf.nn.softmax(classifier(x, training=False)).numpy().astype(float) for x in (X, purified))
    m = (p + q) / 2
    divergence = ((p * np.log(p / m)).sum(axis=1) + (q * np.log(q / m)).sum(axis=1)) / 2
    found = 0.01 * np.exp(purification.Residual(purifier, classifier, "divergence", 0.01)(X).refusal)
    np.testing.assert_allclose(found, divergence, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("measure", purification.MEASURES)
def test_an_attacker_who_knows_the_detector_has_its_gradient(measure):
    guard = purification.residual(small(), frozen(), measure, X)
    errors, kinked = evaluation.gradient_errors(guard, X[:5], Y[:5], lambda outputs, y: outputs.refusal)
    assert errors[~kinked].max() < 1e-3 and not kinked.all()


@pytest.mark.parametrize("change, message", [
    ({"measure": "size"}, "unknown 'size'"), ({"rejects": 0.0}, "rejects is 0.0; expected a share"),
    ({"rejects": 1.0}, "rejects is 1.0"), ({"x": X * 255}, "expected pixels in"),
    ({"classifier": frozen(trainable=True)}, "expected a frozen one")])
def test_bad_input_of_the_detector_is_named(change, message):
    arguments = {"purifier": small(), "classifier": frozen(), "measure": "distance", "x": X, "rejects": 0.05} | change
    with pytest.raises(ValueError, match=message):
        purification.residual(**arguments)


# ── Intervals ──


def test_the_interval_is_that_of_images_where_nothing_else_varies():
    hits = rng.random((1, 2000)) < 0.7
    value, low, high = purification.interval([hits], np.arange(2000))
    reach = 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert value == pytest.approx(hits.mean()) and (high - low) / 2 == pytest.approx(reach, rel=0.15)


def test_images_of_one_tile_do_not_count_as_three():
    tiles = np.repeat(rng.random((1, 500)) < 0.7, 3, axis=1)
    wide, narrow = (purification.interval([tiles], groups)[1:]
                    for groups in (np.repeat(np.arange(500), 3), np.arange(1500)))
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(np.sqrt(3), rel=0.15)


def test_seeds_of_one_network_do_not_count_as_networks():
    seeds = [np.full((3, 50), level) for level in (0.2, 0.9)]  # two networks, whose seeds agree
    value, low, high = purification.interval(seeds, np.arange(50))
    assert (value, low, high) == pytest.approx((0.55, 0.2, 0.9))
    one = np.concatenate(seeds)  # as if they were six seeds of one network
    assert purification.interval([one], np.arange(50))[1] > 0.2


def test_networks_count_alike_whatever_their_seeds():
    few, many = np.zeros((1, 10)), np.ones((9, 10))
    assert purification.interval([few, many], np.arange(10), draws=10)[0] == 0.5


def test_a_statistic_of_several_measures_is_taken_of_the_means():
    rates = np.stack([np.full((2, 40), rate) for rate in (0.9, 0.3, 0.6)])
    found = purification.interval([rates], np.arange(40), statistic=purification.won_back, draws=50)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan(purification.won_back((0.9, 0.9, 0.9))) and purification.won_back((0.9, 0.5, 0.9)) == 1


@pytest.mark.parametrize("values, groups", [([], [0]), ([np.ones((2, 3))], [0, 0]), ([np.ones(3)], [0, 1, 2])])
def test_bad_input_of_the_interval_is_named(values, groups):
    with pytest.raises(ValueError, match=r"expected one array \(..., seeds, n\) or more"):
        purification.interval(values, groups)
