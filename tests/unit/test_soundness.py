"""The evaluation's own tests: weak attacks and masked networks are told from a strong attack on an honest network."""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from helpers import attacks, filters, flags, losses, soundness
from helpers.defence import Outputs, Path, as_defence
from helpers.models import predict
from helpers.standard import apgd
from helpers.threat import ThreatModel
from helpers.training import fit

SHAPE = (6, 6, 1)


def toy(n, seed=0):
    """Images of three classes: the upper, the lower or the left half is lighter, under noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.uniform(0, 0.8, (n, *SHAPE))
    x[y == 0, :3] += 0.2
    x[y == 1, 3:] += 0.2
    x[y == 2, :, :3] += 0.2
    return x.astype("float32"), y


X, Y = toy(16, seed=1)
THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)]
either_norm = pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2"])


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(8, 3, activation="relu"), layers.Flatten(),
        layers.Dense(24, activation="relu"), layers.Dense(3),
    ])
    fit(model, *toy(600), epochs=15, batch_size=50, learning_rate=5e-3)
    return model


@pytest.fixture(scope="module")
def loud(network):
    """Logits times a thousand: the softmax saturates, and the cross-entropy has no gradient."""

    def model(x):
        return 1000 * network(x, training=False)

    model.randomised = False
    return model


strong = partial(apgd, steps=40, restarts=3)
saturated = partial(attacks.pgd, steps=20, losses=("cross-entropy",))


def one_step(defence, x, y, threat, **options):
    return attacks.pgd(defence, x, y, threat, steps=1, step_size=threat.eps / 4, start=x, **options)


def tiny_steps(defence, x, y, threat, **options):
    return attacks.pgd(defence, x, y, threat, steps=5, step_size=1e-3, start=x, **options)


def downhill(outputs, y):
    return -losses.evasion(outputs, y)


def wrong_sign(defence, x, y, threat, **options):
    return attacks.pgd(defence, x, y, threat, steps=20, losses=(downhill,), start=x, **options)


def raised(rows):
    return {row["check"].removeprefix("indicator: ") for row in flags.raised(rows)}


# ── The binarization test ──


@either_norm
def test_the_strong_attack_passes_the_binarization_test(network, threat):
    rows = soundness.binarization(network, strong, X, threat, draws=50)
    assert [row["passed"] for row in rows] == [True, True] and rows[0]["measured"] >= 0.95
    assert rows[0]["n"] == rows[1]["n"] > 12
    assert rows == soundness.binarization(network, strong, X, threat, draws=50)


@either_norm
@pytest.mark.parametrize("weak", [one_step, tiny_steps, wrong_sign])
def test_weak_attacks_fail_the_binarization_test(network, weak, threat):
    success, by_chance = soundness.binarization(network, weak, X, threat, draws=50)
    assert not success["passed"] and by_chance["passed"], (success, by_chance)


def test_an_attack_on_a_masked_network_fails_the_binarization_test(network, loud):
    """The readout's logits spread as widely as the network's, and so it is masked like the network."""
    features, threat = soundness._features(as_defence(network)), THREATS[1]
    masked, seen = (soundness.binarization(loud, attack, X, threat, features=features)[0]
                    for attack in (saturated, strong))
    assert not masked["passed"] and seen["passed"]


def test_what_leaves_the_ball_is_no_success(network):
    def outside(defence, x, y, threat):
        return strong(defence, x, y, ThreatModel(threat.norm, 4 * threat.eps))

    assert soundness.binarization(network, outside, X, THREATS[1])[0]["measured"] < 0.5


def test_the_readout_sees_what_the_filter_shows_to_the_network(network):
    defence = filters.defend(network, "median", 3)
    expected = predict(soundness._features(as_defence(network)), filters.apply(X, "median", 3), 20)
    for path in (defence, *(defence.paths()[name].outputs for name in ("exact", "BPDA"))):
        np.testing.assert_allclose(predict(soundness._features(path), X, 20), expected, atol=1e-5)
    success, by_chance = soundness.binarization(defence, strong, X, THREATS[1], path="BPDA", draws=50)
    assert success["n"] > 8 and success["measured"] > 0.5 and by_chance["passed"]


def test_an_attack_without_the_gradient_of_a_filter_fails_the_binarization_test(network):
    defence = filters.defend(network, "bits", 2)
    success = [soundness.binarization(defence, strong, X[:8], THREATS[1], path=Path(path), inner=10, draws=5)[0]
               for path in (defence, defence.paths()["BPDA"].outputs)]
    assert success[0]["measured"] < success[1]["measured"]


@either_norm
def test_the_points_of_the_binarization_test_lie_where_they_should(threat):
    for image in (X[:1], np.zeros((1, *SHAPE), "float32"), np.ones((1, *SHAPE), "float32")):
        within, at_eps = soundness._points(image, threat, 20, np.random.default_rng(0))
        np.testing.assert_array_equal(within[:1], image)
        assert threat.distance(within, np.repeat(image, 20, axis=0)).max() <= 0.95 * threat.eps + 1e-6
        np.testing.assert_allclose(threat.distance(at_eps, image), threat.eps, rtol=1e-4)
        assert min(within.min(), at_eps.min()) >= 0 and max(within.max(), at_eps.max()) <= 1


def test_the_boundary_lies_close_to_the_point_at_eps_and_the_logits_spread_as_told():
    rng = np.random.default_rng(0)
    inner, outer = rng.normal(size=(9, 12)).astype("float32"), rng.normal(size=(1, 12)).astype("float32")
    readout = soundness.Readout(lambda x: x, 12)
    assert readout.fit(inner, outer, 7.0, 0.99)
    z = readout(np.vstack([inner, outer])).numpy()
    score = z[:, 1] - z[:, 0]
    assert (score[:-1] < 0).all() and 0 < score[-1] < 0.02 * 7 and 7 <= np.ptp(score) <= 14.1
    assert not readout.fit(np.vstack([inner, outer]), outer, 7.0, 0.99)  # the same point within and at eps


def test_features_that_tell_nothing_are_named(network):
    def nothing(x):
        return 0 * tf.reshape(x, (-1, 36))

    with pytest.raises(ValueError, match="on none of 16 images .*; expected fewer `inner` points or other `features`"):
        soundness.binarization(network, strong, X, THREATS[0], features=nothing)


# ── The indicators of attack failure ──


@either_norm
def test_the_strong_attack_raises_no_indicator(network, threat):
    rows = soundness.indicators(network, strong, X, Y, threat)
    assert len(rows) == 6 and not raised(rows), rows


@pytest.mark.parametrize(("attack", "expected"), [
    (one_step, "incomplete optimisation"), (tiny_steps, "incomplete optimisation"),
    (wrong_sign, "unconstrained failure"),
])
def test_a_weak_attack_raises_an_indicator(network, attack, expected):
    assert expected in raised(soundness.indicators(network, attack, X, Y, ThreatModel("l2", 0.05)))


def test_a_masked_network_raises_an_indicator(loud):
    assert "unavailable gradients" in raised(soundness.indicators(loud, saturated, X, Y, THREATS[1]))
    assert "unavailable gradients" not in raised(soundness.indicators(loud, strong, X, Y, THREATS[1]))


def test_an_attack_that_forgets_its_success_raises_an_indicator(network):
    def forgets(defence, x, y, threat, **options):
        return apgd(defence, x, y, threat, steps=20, **options)._replace(images=x)

    def wins_outside(defence, x, y, threat, **options):
        return apgd(defence, x, y, ThreatModel("l2", 3.0), steps=20, **options)._replace(images=x)

    assert "silent success" in raised(soundness.indicators(network, forgets, X, Y, THREATS[1]))
    assert "silent success" not in raised(soundness.indicators(network, wins_outside, X, Y, ThreatModel("l2", 0.01)))


def test_what_wins_on_another_network_only_raises_an_indicator(network):
    def deployed(x):
        return network(tf.round(x), training=False)

    deployed.randomised = False
    rows = soundness.indicators(deployed, strong, X, Y, ThreatModel("l2", 0.3), path=network)
    assert "transfer failure" in raised(rows)
    assert "transfer failure" not in raised(soundness.indicators(network, strong, X, Y, THREATS[1], path=network))


def test_the_attack_on_a_defence_that_refuses_is_told_what_wins(network):
    """What is deployed refuses all; the path, which never refuses, is where the attack wins."""
    refusing, attack = Refusing(network), partial(apgd, steps=10)
    rows = soundness.indicators(refusing, attack, X[:4], Y[:4], THREATS[1], path="unaware")
    assert "transfer failure" in raised(rows)
    rows = soundness.indicators(refusing, attack, X[:4], Y[:4], THREATS[1])
    assert "transfer failure" not in raised(rows) and "unconstrained failure" in raised(rows)


class Refusing:
    """A network that refuses every image."""

    randomised = False

    def __init__(self, network):
        self.network = as_defence(network)

    def __call__(self, x):
        logits = self.network(x).logits
        return Outputs(logits, tf.ones(tf.shape(logits)[0]))

    def paths(self, seed=0):
        return {"exact": Path(self), "unaware": Path(self.network)}


def test_predictions_that_jump_raise_an_indicator(network):
    def rippled(x):
        ripple = tf.math.sin(1e4 * tf.reduce_sum(x, axis=(1, 2, 3)))[:, None]
        return network(x, training=False) + 3 * ripple * [0.0, 1, 2]

    rippled.randomised = False
    assert "unstable predictions" in raised(soundness.indicators(rippled, strong, X, Y, THREATS[1]))


def test_images_that_are_wrong_anyway_are_left_out(network):
    y = Y.copy()
    y[:6] = (y[:6] + 1) % 3
    rows = soundness.indicators(network, partial(apgd, steps=5), X, y, THREATS[1])
    assert {row["n"] for row in rows} == {len(X) - 6}
    with pytest.raises(ValueError, match="all 6 images win without an attack"):
        soundness.indicators(network, strong, X[:6], y[:6], THREATS[1])
