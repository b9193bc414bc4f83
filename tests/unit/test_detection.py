"""The detector is scikit-learn's regression, and its attacker differentiates exactly what it computes."""

from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from keras import layers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import attacks, closeness, uncertainty
from helpers.closeness import Closeness
from helpers.defence import Outputs
from helpers.detection import FEATURES, Area, Detector, Guarded, Weighed, area, features, in_turn, informed, noisy
from helpers.evaluation import logits, outcomes
from helpers.losses import evasion, margin
from helpers.models import as_float64
from helpers.threat import ThreatModel

SHAPE = (4, 4, 1)
rng = np.random.default_rng(0)
X = rng.uniform(0, 1, (12, *SHAPE)).astype("float32")
STRANGE = {"entropy": np.nan, "KDE": -np.inf}


def network():
    """Dropout twice, batch statistics that have moved, and every class predicted of some image."""
    keras.utils.set_random_seed(0)
    wide = keras.initializers.RandomNormal(stddev=0.7)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(4, 3, activation="tanh"), layers.BatchNormalization(), layers.Dropout(0.3),
        layers.Flatten(), layers.Dense(8, "softplus", kernel_initializer=wide), layers.Dropout(0.3),
        layers.Dense(3, kernel_initializer=wide),
    ])
    for _ in range(20):
        model(X, training=True)
    model.layers[-1].bias.assign(-tf.reduce_mean(model(X, training=False), axis=0))
    return model


def in_float64():
    """The network and its points, for finite differences."""
    model = as_float64(NET)
    model.dtype_policy = "float64"  # of the whole, which the layers' own leave at float32
    return model, Closeness(tuple(members.astype("float64") for members in NEAR.points), NEAR.bandwidth)


NET = network()
NEAR = Closeness.fit(closeness.activations(NET, rng.uniform(0, 1, (60, *SHAPE)).astype("float32")), np.arange(60) % 3,
                     1.2, 3)
DETECTOR = Detector(dict(zip(FEATURES, (-2.0, 1.5, 8.0, 3.0, -0.2, 0.7), strict=True)), 0.3)
PART = Detector({"KL": -2.0, "entropy": 0.5}, -1.0)


def frame(n, shift=0.0, seed=0):
    """Features in units of very different sizes, with a column that no detector asked for."""
    values = np.random.default_rng(seed).normal(shift, 1, (n, len(FEATURES))) * 10.0 ** np.arange(-3, 3) + 5
    return pd.DataFrame(values, columns=FEATURES).assign(predicted=np.arange(n))


POSITIVES, NEGATIVES = frame(40, 0.7), frame(90, 0.0, seed=1)


# ── The features ──


def test_features_are_those_of_the_predicted_class():
    found = features(NET, X, NEAR, draws=4, seed=2)
    assert list(found) == [*FEATURES, "LID", "predicted"] and len(found) == len(X)
    hidden, predicted = closeness.activations(NET, X), logits(NET, X).argmax(axis=1)
    assert set(predicted) == {0, 1, 2}
    expected = uncertainty.metrics(uncertainty.sample(NET, X, draws=4, seed=2)) | {
        "KDE": NEAR.log_density(hidden, predicted), "KL": NEAR.kl(hidden, predicted), "LID": NEAR.lid(hidden),
        "predicted": predicted}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


# ── Noise of the length of an attack ──


@given(st.floats(0, 0.5), st.integers(0, 99))
def test_noise_has_the_length_of_the_change_even_where_it_is_clipped(eps, seed):
    x_adv = np.clip(X + eps * np.sign(X - 0.3), 0, 1).astype("float32")
    found = noisy(X, x_adv, seed)
    assert found.shape == X.shape and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    length = ThreatModel("l2", 0).distance
    np.testing.assert_allclose(length(found, X), length(x_adv, X), rtol=1e-3, atol=1e-5)


def test_every_image_gets_noise_of_its_own_length_and_the_seed_fixes_it():
    x, scale = np.full_like(X, 0.5), np.linspace(0, 0.05, len(X)).reshape(-1, 1, 1, 1)
    x_adv = (x + scale * np.sign(X - 0.5)).astype("float32")
    found = noisy(x, x_adv, seed=3)
    np.testing.assert_array_equal(found[0], x[0])  # no change, no noise
    np.testing.assert_allclose(ThreatModel("l2", 0).distance(found, x), 4 * scale.ravel(), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found, noisy(x, x_adv, seed=3))
    assert np.abs(found - noisy(x, x_adv, seed=4))[1:].max(axis=(1, 2, 3)).min() > 1e-3
    direction = ((found - x)[1:] / scale[1:]).reshape(len(X) - 1, -1)
    assert np.abs(np.corrcoef(direction) - np.eye(len(direction))).max() < 0.9  # another noise for every image


def test_noisy_images_stay_within_the_pixels():
    found = noisy(X, 1 - X)
    assert found.min() == 0 and found.max() == 1


# ── Areas on the same images ──


def scores(n=200, seed=0):
    """Attacked, clean and noisy scores of n images that share a good part of their randomness."""
    draws = np.random.default_rng(seed)
    common = draws.normal(size=n)
    return common + draws.normal(0.8, 1, n), np.stack([common + draws.normal(0, 1, n) for _ in range(2)])


def test_an_area_is_that_of_scikit_learn_with_ties():
    positives, negatives = (np.round(part, 1) for part in scores())
    found = area(positives, negatives)
    truth = np.repeat([1, 0], [positives.size, negatives.size])
    assert found.value == pytest.approx(roc_auc_score(truth, np.concatenate([positives, negatives.ravel()])))
    assert found.parts.shape == positives.shape and found.parts.mean() == pytest.approx(0, abs=1e-12)


def test_the_error_of_an_area_and_of_a_difference_is_that_of_a_bootstrap_over_images():
    positives, negatives = scores()
    other = positives + np.random.default_rng(5).normal(0, 0.5, len(positives)), negatives + 0.1
    draws, again = np.random.default_rng(1), []
    for _ in range(1500):
        pick = draws.integers(0, len(positives), len(positives))
        again.append([area(p[pick], n[:, pick]).value for p, n in ((positives, negatives), other)])
    again, first, second = np.array(again), area(positives, negatives), area(*other)
    assert first.error == pytest.approx(again[:, 0].std(), rel=0.1)
    assert Area(0.0, first.parts - second.parts).error == pytest.approx((again[:, 0] - again[:, 1]).std(), rel=0.1)


def test_images_that_share_their_randomness_are_no_independent_ones():
    """Clean and attacked versions of one image rise together: who forgets it takes the error for too large."""
    positives, negatives = scores()
    apart = np.random.default_rng(2).permutation(len(positives))
    assert area(positives, negatives).error < area(positives[apart], negatives).error


# ── The detector ──


@pytest.mark.parametrize("columns", [FEATURES, ("KL",), ("KDE", "confidence")])
def test_log_odds_are_those_of_scikit_learn(columns):
    x, y = pd.concat([POSITIVES, NEGATIVES])[list(columns)].to_numpy(), np.repeat([1, 0], [40, 90])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
    detector, new = Detector.fit(POSITIVES, NEGATIVES, columns), frame(30, seed=2)
    assert tuple(detector.weights) == columns
    expected = pipeline.decision_function(new[list(columns)].to_numpy())
    np.testing.assert_allclose(detector.score(new), expected, rtol=1e-6, atol=1e-9)
    assert detector.score(POSITIVES).mean() > detector.score(NEGATIVES).mean() + 0.1


def test_units_and_the_order_of_columns_do_not_matter():
    def elsewhere(features):
        return (1000 * features + 7)[list(features)[::-1]]

    detector = Detector.fit(elsewhere(POSITIVES), elsewhere(NEGATIVES))
    np.testing.assert_allclose(detector.score(elsewhere(POSITIVES)),
                               Detector.fit(POSITIVES, NEGATIVES).score(POSITIVES), rtol=1e-6)


def test_the_score_is_the_weighted_sum():
    two = pd.DataFrame({"entropy": [1.0, 0.0], "other": [np.nan, np.nan], "KL": [3.0, 2.0]})
    np.testing.assert_allclose(PART.score(two), [0.5 - 6 - 1, -4 - 1])


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    one = Detector({"KL": 2.0}, 1.0)
    high, low = pd.DataFrame({"KL": [3.0, 1.0, 2.0]}), pd.DataFrame({"KL": [0.0, 2.0, 1.5, 1.0]})
    pairs = np.sign(high["KL"].to_numpy()[:, None] - low["KL"].to_numpy())
    assert one.auc(high, low) == pytest.approx(((pairs + 1) / 2).mean())
    assert one.auc(high + 9, low) == 1 and one.auc(low, high + 9) == 0 and one.auc(low, low) == 0.5


@given(st.integers(2, 400), st.floats(0.001, 0.999))
def test_the_threshold_rejects_the_wanted_share_of_the_images_that_it_is_set_on(n, rate):
    clean = frame(n, seed=n)
    rejected = DETECTOR.score(clean) > DETECTOR.threshold(clean, rate)
    assert abs(rejected.mean() - rate) <= 1 / n + 1e-9


def test_the_usual_threshold_rejects_one_in_twenty():
    clean = frame(2000)
    assert (DETECTOR.score(clean) > DETECTOR.threshold(clean)).mean() == pytest.approx(0.05, abs=5e-4)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, np.nan])
def test_a_rate_is_between_0_and_1(rate):
    with pytest.raises(ValueError, match="false_reject_rate is .*between 0 and 1"):
        DETECTOR.threshold(NEGATIVES, rate)


@pytest.mark.parametrize("attacked", [True, False])
def test_features_that_are_not_finite_are_named(attacked):
    strange = NEGATIVES.assign(**STRANGE)
    frames = (strange, NEGATIVES) if attacked else (POSITIVES, strange)
    with pytest.raises(ValueError, match=r"features \['entropy', 'KDE'\] hold values that are not finite"):
        Detector.fit(*frames)
    assert np.isfinite(Detector.fit(*frames, ["variance", "KL"]).offset)  # the others are not its concern


# ── A network with its detector ──


def features_at(near, draws, seed):
    """The features with the masks of the first call of a guard with this seed."""
    first = tf.constant(np.random.default_rng(seed).integers(2**31), tf.int64)
    found = uncertainty.metrics(uncertainty.fresh(NET, draws)(tf.constant(X), first))
    return pd.DataFrame(dict(features(NET, X, near, draws=2)) | found)


@pytest.mark.parametrize("detector", [DETECTOR, PART], ids=["six", "two"])
@pytest.mark.parametrize("points", [None, 8])
@pytest.mark.parametrize("pmf", closeness.DISTRIBUTIONS)
def test_what_is_deployed_and_differentiated_is_what_the_detector_computes(detector, points, pmf):
    near = replace(NEAR.thin(points) if points else NEAR, pmf=pmf)
    guarded = Guarded(NET, detector, near, 0.2, draws=5, seed=3, known=6)
    found, attacker = guarded(tf.constant(X)), guarded.paths(seed=7)["EOT"].outputs
    np.testing.assert_allclose(found.logits, logits(NET, X), atol=1e-5)
    for refusal, masks in ((found.refusal, (5, 3)), (attacker(tf.constant(X)).refusal, (6, 7 + 999))):
        expected = detector.score(features_at(near, *masks)) - 0.2
        np.testing.assert_allclose(refusal, expected, rtol=1e-4, atol=1e-4)
        assert np.ptp(expected) > 0.1


def test_a_call_draws_fresh_masks_and_the_seed_fixes_their_order():
    first, again, other = (Guarded(NET, DETECTOR, NEAR, 0.0, draws=3, seed=seed) for seed in (3, 3, 4))
    runs = [[guarded(tf.constant(X)).refusal.numpy() for _ in range(2)] for guarded in (first, again, other)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0][0] - runs[0][1]).max() > 1e-3 and np.abs(runs[0][0] - runs[2][0]).max() > 1e-3
    assert first.randomised and first.paths()["EOT"].outputs.randomised


def test_images_above_the_threshold_are_refused_and_the_others_classified():
    scores, y = DETECTOR.score(features_at(NEAR, 5, 0)), logits(NET, X).argmax(axis=1)
    guarded = Guarded(NET, DETECTOR, NEAR, float(np.median(scores)), draws=5)
    wrong = np.where(np.arange(len(X)) % 3 == 0, (y + 1) % 3, y)
    guarded.__dict__["_rng"] = SimpleNamespace(integers=lambda _: np.random.default_rng(0).integers(2**31))
    found = outcomes(guarded, X, wrong)  # which asks more than once
    np.testing.assert_array_equal(found, np.where(scores > np.median(scores), 1, np.where(y == wrong, 0, 2)))
    assert set(found) == {0, 1, 2}


def test_the_rule_of_the_detector_is_the_weighted_sum_and_no_other():
    """A guard with another detector, threshold or neighbourhood refuses by another number."""
    first, *others = (Guarded(NET, detector, near, threshold, draws=3)(tf.constant(X)).refusal for detector, near,
                      threshold in ((DETECTOR, NEAR, 0.0), (PART, NEAR, 0.0), (DETECTOR, NEAR.thin(4), 0.0),
                                    (DETECTOR, NEAR, 0.5)))
    assert all(np.abs(first - other).max() > 1e-3 for other in others)
    np.testing.assert_allclose(first - others[-1], 0.5, rtol=1e-4, atol=1e-4)


# ── The attacker who knows ──


@pytest.mark.parametrize("name", FEATURES)
def test_the_gradient_of_every_feature_is_that_of_finite_differences(name):
    model, near = in_float64()
    direction = np.random.default_rng(1).standard_normal(X.shape)
    x, h = tf.constant(X, tf.float64), 1e-6

    def log_odds(x):  # a new guard draws the same masks
        return Guarded(model, Detector({name: 2.0}, 0.1), near, 0.0, draws=4)(x).refusal

    with tf.GradientTape() as tape:
        tape.watch(x)
        here = log_odds(x)
    assert here.dtype == tf.float64
    slope = (tape.gradient(here, x).numpy() * direction).sum(axis=(1, 2, 3))
    ahead, behind = (log_odds(x + s * direction) for s in (h, -h))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)
    assert np.abs(slope).max() > 1e-3


def test_the_loss_in_turn_is_the_margin_until_the_image_is_wrong_and_then_the_room_below_the_threshold():
    guarded = Guarded(NET, DETECTOR, NEAR, 0.0, draws=3)
    outputs, y = guarded(tf.constant(X)), np.arange(len(X)) % 3
    found, wrong = in_turn(outputs, y).numpy(), margin(outputs.logits, y).numpy()
    assert 0 < (wrong > 0).sum() < len(X)
    np.testing.assert_allclose(found, np.where(wrong > 0, -outputs.refusal, wrong))
    np.testing.assert_array_equal(found > 0, evasion(outputs, y).numpy() > 0)


def test_the_weighed_loss_is_the_refusal_less_the_capped_margin_of_the_wanted_class():
    outputs = Outputs(tf.constant([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]]), tf.constant([0.5, -2.0]))
    np.testing.assert_allclose(Weighed(0.3, 1.5)(outputs, tf.constant([1, 2])), [0.15 - 1.5, -0.6 + 2.0], rtol=1e-6)


def attacked():
    """Images, labels, the unaware attack's images, and a guard that catches most of those."""
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("linf", 0.35)
    plain = attacks.pgd(NET, X, y, threat, steps=15).images
    scores = DETECTOR.score(features(NET, plain, NEAR, draws=200, seed=1))
    guarded = Guarded(NET, DETECTOR, NEAR, float(np.quantile(scores, 0.3)), draws=50, seed=1, known=20)
    return y, threat, plain, guarded


def test_the_attacker_who_knows_passes_with_more_images_under_fresh_masks():
    y, threat, plain, guarded = attacked()
    found = informed(guarded, X, y, threat, weights=(Weighed(0.3, 3.0), Weighed(1.0, 1.0)), steps=25)
    assert threat.contains(found.images, X).all() and found.steps.max() <= 4 * 25
    before, after = (np.median([evasion(guarded(tf.constant(x)), y) for _ in range(9)], axis=0) > 0
                     for x in (plain, found.images))
    assert (after == (found.value > 0)).mean() > 0.8  # the judge's masks are others
    assert after.sum() > before.sum()


def test_images_that_pass_at_once_are_left_alone_and_a_network_without_detector_has_one_target_of_two():
    y, threat, _, _ = attacked()
    never = Guarded(NET, DETECTOR, NEAR, 1e6, draws=4)
    found = informed(never, X, (y + 1) % 3, threat, steps=5, targets=1)
    np.testing.assert_array_equal(found.images, X)
    plain = informed(NET, X, y, threat, path=None, steps=25)
    assert (plain.value > 0).mean() >= 0.9 * (attacks.pgd(NET, X, y, threat, steps=40).value > 0).mean()


def test_an_attacker_may_know_fewer_networks():
    deployed, few = (Guarded(NET, DETECTOR, NEAR, 0.0, draws=20, seed=2, known=known) for known in (None, 4))
    np.testing.assert_array_equal(few(tf.constant(X)).refusal, deployed(tf.constant(X)).refusal)
    assert few.paths(5)["EOT"].outputs.draws == 4 and deployed.paths(5)["EOT"].outputs.draws == 20
    assert few.paths(5)["EOT"].outputs.seed != few.seed
