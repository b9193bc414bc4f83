"""The attacks: inside the threat model, exact where an answer is known, repeatable, harmless to the network."""

from functools import partial

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from keras import layers

from helpers import attacks
from helpers.evaluation import correct, logits
from helpers.threat import ThreatModel

SHAPE = (4, 4, 1)
N = 12
quickly = settings(max_examples=12, deadline=None, derandomize=True)
rng = np.random.default_rng(0)
X = rng.uniform(0.3, 0.7, (N, *SHAPE)).astype("float32")  # interior: eps up to 0.3 meets no bound
Y = rng.integers(0, 3, N)
W = (rng.choice([-1, 1], 16) * rng.uniform(0.2, 1, 16)).astype("float32")
MANY = rng.normal(0, 2, (16, 3)).astype("float32")


def linear(w=W, bias=0.0):
    """Two logits whose difference, the second minus the first, is w . x + bias."""
    def model(x):
        difference = tf.reshape(x, (-1, len(w))) @ tf.constant(w)[:, None] + bias
        return tf.concat([-difference / 2, difference / 2], axis=1)
    return model  # fmt: skip


def three_classes(x):
    return tf.reshape(x, (-1, 16)) @ tf.constant(MANY)


def network(dropout=0.5):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(6, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
        layers.Dropout(dropout), layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(stddev=1.0)),
    ])  # fmt: skip
    for _ in range(20):
        model(rng_images(64), training=True)  # moves the batch statistics away from 0 and 1
    return model


def rng_images(n, seed=1):
    return np.random.default_rng(seed).uniform(0, 1, (n, *SHAPE)).astype("float32")


def margins(model, x, y):
    return attacks.margin(logits(model, x), np.asarray(y)).numpy()


NET = network()
LINEAR = linear()
ATTACKS = {  # model, x, y, eps, seed -> adversarial images
    "fgsm": lambda m, x, y, eps, seed=0: attacks.fgsm(m, x, y, eps),
    "bim": lambda m, x, y, eps, seed=0: attacks.bim(m, x, y, eps, steps=3),
    "pgd-linf": lambda m, x, y, eps, seed=0: attacks.pgd(
        m, x, y, ThreatModel("linf", eps), steps=6, restarts=2, losses=("cross-entropy", "margin"), seed=seed),
    "pgd-l2": lambda m, x, y, eps, seed=0: attacks.pgd(m, x, y, ThreatModel("l2", eps), steps=3, seed=seed),
    "pgd-compact": lambda m, x, y, eps, seed=0: attacks.pgd(
        m, x, y, ThreatModel("l2", eps), steps=7, restarts=2, compact=True, batch_size=5, seed=seed),
    "apgd-linf": lambda m, x, y, eps, seed=0: attacks.apgd(
        m, x, y, ThreatModel("linf", eps), steps=6, seed=seed).images,
    "apgd-l2": lambda m, x, y, eps, seed=0: attacks.apgd(
        m, x, y, ThreatModel("l2", eps), steps=6, radii=(2, 1), loss="targeted dlr", batch_size=5, seed=seed).images,
    "fab-linf": lambda m, x, y, eps, seed=0: attacks.fab(m, x, y, ThreatModel("linf", eps), steps=4).images,
    "fab-l2": lambda m, x, y, eps, seed=0: attacks.fab(m, x, y, ThreatModel("l2", eps), steps=4, batch_size=5).images,
    "square-linf": lambda m, x, y, eps, seed=0: attacks.square(
        m, x, y, ThreatModel("linf", eps), queries=8, seed=seed).images,
    "square-l2": lambda m, x, y, eps, seed=0: attacks.square(
        m, x, y, ThreatModel("l2", eps), queries=8, batch_size=5, seed=seed).images,
}  # fmt: skip
every_attack = pytest.mark.parametrize("name", ATTACKS)
norm_of = {name: "l2" if name.endswith("l2") or name == "pgd-compact" else "linf" for name in ATTACKS}


# ── The losses ──


def test_margin_and_cross_entropy_agree_with_numpy():
    z = np.random.default_rng(0).normal(0, 4, (40, 5)).astype("float32")
    y = np.arange(40) % 5
    true = z[np.arange(40), y]
    wrong = np.where(np.eye(5, dtype=bool)[y], -np.inf, z).max(axis=1)
    np.testing.assert_allclose(attacks.margin(z, y), wrong - true, rtol=1e-6)
    np.testing.assert_allclose(attacks.cross_entropy(z, y), np.log(np.exp(z).sum(axis=1)) - true, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(attacks.margin(z, y).numpy() > 0, z.argmax(axis=1) != y)


def test_the_losses_stay_finite_for_a_confident_network():
    z = np.array([[500.0, -500.0], [-500.0, 500.0]], "float32")
    np.testing.assert_allclose(attacks.cross_entropy(z, [0, 0]), [0, 1000])
    np.testing.assert_allclose(attacks.margin(z, [0, 0]), [-1000, 1000])


# ── Within the threat model ──


@every_attack
@quickly
@given(data=st.data())
def test_results_stay_within_the_threat_model(name, data):
    x = data.draw(arrays.arrays("float32", (5, *SHAPE), elements=st.floats(0, 1, width=32)))
    y = data.draw(arrays.arrays("int64", 5, elements=st.integers(0, 2)))
    eps = data.draw(st.floats(0, 1, width=32))
    x_before, y_before = x.copy(), y.copy()
    x_adv = ATTACKS[name](NET, x, y, eps, data.draw(st.integers(0, 99)))
    assert x_adv.dtype == np.float32 and x_adv.shape == x.shape and np.isfinite(x_adv).all()
    assert ThreatModel(norm_of[name], eps).distance(x_adv, x).max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(y, y_before)


@every_attack
def test_no_radius_no_change(name):
    np.testing.assert_array_equal(ATTACKS[name](NET, X, Y, 0), X)
    np.testing.assert_array_equal(ATTACKS[name](NET, X, Y, 0.0), X)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd-linf"])
def test_the_whole_radius_is_used(name):
    x_adv = ATTACKS[name](LINEAR, X, Y % 2, 0.1)
    np.testing.assert_allclose(np.abs(x_adv - X), 0.1, atol=1e-6)


def test_other_bounds_are_respected():
    x = 2 * X - 1
    assert attacks.fgsm(LINEAR, x, Y % 2, 1.9, bounds=(-1, 1)).min() == -1
    assert attacks.bim(LINEAR, x, Y % 2, 1.9, bounds=(-1, 1)).max() == 1
    assert attacks.pgd(LINEAR, x, Y % 2, ThreatModel("linf", 1.9, (-1, 1)), steps=5).min() == -1


# ── Exact answers ──


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("attack", [
    lambda m, x, y: attacks.fgsm(m, x, y, 0.1),
    lambda m, x, y: attacks.bim(m, x, y, 0.1),
    lambda m, x, y: attacks.pgd(m, x, y, ThreatModel("linf", 0.1), steps=10),
    lambda m, x, y: attacks.pgd(m, x, y, ThreatModel("linf", 0.1), steps=10, losses=("margin",)),
], ids=["fgsm", "bim", "pgd", "pgd-margin"])  # fmt: skip
def test_linf_attacks_reach_the_optimum_of_a_linear_model(attack, label):
    y = np.full(N, label)
    gain = margins(LINEAR, attack(LINEAR, X, y), y) - margins(LINEAR, X, y)
    np.testing.assert_allclose(gain, 0.1 * np.abs(W).sum(), rtol=1e-4)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_l2_pgd_reaches_the_optimum_of_a_linear_model(loss, label):
    y, threat = np.full(N, label), ThreatModel("l2", 0.3)
    optimum = margins(LINEAR, X, y) + 0.3 * np.linalg.norm(W)
    x_adv = attacks.pgd(LINEAR, X, y, threat, steps=20, step_size=0.3, losses=(loss,))
    np.testing.assert_allclose(margins(LINEAR, x_adv, y), optimum, rtol=1e-5)
    # The usual step, 2.5 * eps / steps, has no time to turn a random start all the way round the sphere.
    usual = margins(LINEAR, attacks.pgd(LINEAR, X, y, threat, steps=20, losses=(loss,)), y)
    assert (usual <= optimum + 1e-5).all() and (usual >= optimum - 0.05 * 0.3 * np.linalg.norm(W)).all()


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd-linf"])
def test_the_optimum_at_the_bounds_is_the_clipped_one(name):
    x, y = rng_images(N), np.zeros(N, int)
    best = np.clip(x + np.float32(0.4) * np.sign(W).reshape(SHAPE), 0, 1)
    np.testing.assert_allclose(ATTACKS[name](LINEAR, x, y, 0.4), best, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_bim_follows_its_equation(targeted):
    """In NumPy and float64: the gradient of cross-entropy on a linear network is W (p - one-hot)."""
    x = X.astype("float64").reshape(N, 16)
    moved = x.copy()
    for _ in range(6):
        p = np.exp(moved @ MANY)
        gradient = (p / p.sum(axis=1, keepdims=True) - np.eye(3)[Y]) @ MANY.T.astype("float64")
        moved = np.clip(moved + (-1 if targeted else 1) * 0.04 * np.sign(gradient), x - 0.1, x + 0.1).clip(0, 1)
    x_adv = attacks.bim(three_classes, X, Y, 0.1, steps=6, step_size=0.04, targeted=targeted)
    np.testing.assert_allclose(x_adv.reshape(N, 16), moved, atol=1e-6)


def test_fgsm_is_one_step_of_bim():
    np.testing.assert_array_equal(attacks.fgsm(NET, X, Y, 0.1), attacks.bim(NET, X, Y, 0.1, steps=1, step_size=0.1))


def test_bim_divides_the_radius_among_its_steps():
    np.testing.assert_array_equal(attacks.bim(NET, X, Y, 0.2), attacks.bim(NET, X, Y, 0.2, steps=10, step_size=0.02))


# ── The untargeted attack leaves the label, the targeted one reaches it ──


def test_pgd_leaves_the_label_and_gets_worse_with_the_radius():
    y = logits(NET, X).argmax(axis=1)
    assert correct(NET, X, y).all()
    for norm, eps in (("linf", 0.3), ("l2", 1.2)):
        beaten = [~correct(NET, attacks.pgd(NET, X, y, ThreatModel(norm, e), steps=20), y) for e in (eps / 9, eps)]
        assert beaten[0].sum() < beaten[1].sum() == N


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_a_targeted_attack_reaches_its_target(loss):
    x, threat = X, ThreatModel("linf", 0.3)
    targets = (logits(three_classes, x).argmax(axis=1) + 1) % 3
    options = {"steps": 30, "losses": (loss,), "targeted": True}
    for compact in (False, True):
        x_adv = attacks.pgd(three_classes, x, targets, threat, compact=compact, **options)
        assert correct(three_classes, x_adv, targets).all()
    assert correct(three_classes, attacks.bim(three_classes, x, targets, 0.3, targeted=True), targets).all()
    towards = attacks.fgsm(three_classes, x, targets, 0.05, targeted=True)
    assert (attacks.cross_entropy(logits(three_classes, towards), targets)
            < attacks.cross_entropy(logits(three_classes, x), targets)).numpy().all()  # fmt: skip


def test_a_loss_of_ones_own_is_ascended():
    def doubled(z, y):
        return 2 * attacks.margin(z, y)

    threat = ThreatModel("l2", 0.2)
    own, named = (attacks.pgd(NET, X, Y, threat, steps=5, losses=(loss,)) for loss in (doubled, "margin"))
    np.testing.assert_allclose(own, named, atol=1e-6)
    x_adv = attacks.pgd(NET, X, Y, threat, steps=5, losses=(lambda z, y: -doubled(z, y),), start=X)
    np.testing.assert_array_equal(x_adv, X)  # it goes the wrong way, and the best iterate is the first


# ── Best iterate, restarts, steps, compaction ──


def hill(x):
    """Two logits; the margin of label 0 is highest (-1) where the mean pixel is 0.55 and falls off on both sides."""
    height = -1 - 100 * (tf.reduce_mean(x, axis=(1, 2, 3)) - 0.55) ** 2
    return tf.stack([-height / 2, height / 2], axis=1)


@pytest.mark.parametrize("compact", [False, True])
def test_the_best_iterate_is_reported_not_the_last(compact):
    """Steps of 0.06 from 0.5 go 0.56, 0.5, 0.56 ...: the last of an even number of steps is the worse one."""
    x, y = np.full((2, *SHAPE), 0.5, "float32"), np.zeros(2, int)
    options = {"steps": 4, "step_size": 0.06, "start": x, "compact": compact}
    np.testing.assert_allclose(attacks.pgd(hill, x, y, ThreatModel("linf", 0.2), **options), 0.56, atol=1e-6)
    last = attacks.bim(hill, x, y, 0.2, steps=4, step_size=0.06)
    np.testing.assert_allclose(last, 0.5, atol=1e-6)  # BIM reports the last one, as published


@pytest.mark.parametrize("compact", [False, True])
def test_a_goal_of_ones_own_decides_which_iterate_is_kept(compact):
    """From a start without noise PGD walks along BIM's path; here the iterate with a margin nearest to 3 is wanted."""

    def nearest(logits, y):
        return -tf.abs(attacks.margin(logits, y) - 3)

    walk, options = {"steps": 7, "step_size": 0.02}, {"start": X, "compact": compact}
    path = np.stack([X, *(attacks.bim(three_classes, X, Y, 0.3, **walk | {"steps": s}) for s in range(1, 8))])
    wanted = np.argmin([np.abs(margins(three_classes, x, Y) - 3) for x in path], axis=0)
    x_adv = attacks.pgd(three_classes, X, Y, ThreatModel("linf", 0.3), goal=nearest, **walk, **options)
    np.testing.assert_allclose(x_adv, path[wanted, np.arange(N)], atol=1e-6)
    assert len(set(wanted)) > 2  # neither always the first nor always the last


@pytest.mark.parametrize("targeted", [False, True])
def test_the_usual_goal_is_the_margin(targeted):
    options = {"steps": 6, "restarts": 2, "targeted": targeted}
    usual = attacks.pgd(three_classes, X, Y, ThreatModel("l2", 0.5), **options)
    np.testing.assert_array_equal(
        usual, attacks.pgd(three_classes, X, Y, ThreatModel("l2", 0.5), goal=attacks.margin, **options))


def test_the_image_itself_is_one_of_the_iterates():
    """A step far too long makes things worse than no attack: then the image as it was is the best."""
    x, y = np.full((2, *SHAPE), 0.54, "float32"), np.zeros(2, int)
    for norm in ("linf", "l2"):
        x_adv = attacks.pgd(hill, x, y, ThreatModel(norm, 0.4), steps=1, step_size=0.4)
        assert (margins(hill, x_adv, y) >= margins(hill, x, y)).all()


@quickly
@given(st.integers(0, 999), st.sampled_from([("linf", 0.08), ("l2", 0.3)]), st.booleans())
def test_more_restarts_and_more_steps_are_never_worse(seed, ball, targeted):
    x, y, threat = rng_images(8, seed), np.arange(8) % 3, ThreatModel(*ball)
    sign, options = -1 if targeted else 1, {"step_size": ball[1], "targeted": targeted, "seed": seed}
    few, restarts, steps = (sign * margins(NET, attacks.pgd(NET, x, y, threat, **more, **options), y) for more in (
        {"steps": 3}, {"steps": 3, "restarts": 3}, {"steps": 8}))  # fmt: skip
    assert (restarts >= few - 1e-5).all() and (steps >= few - 1e-5).all()
    assert (few >= sign * margins(NET, x, y) - 1e-5).all()


@quickly
@given(st.integers(0, 999), st.sampled_from([("linf", 0.05), ("l2", 0.25)]), st.booleans())
def test_compaction_beats_the_same_images(seed, ball, targeted):
    x, y = rng_images(20, seed), np.arange(20) % 3
    options = {"steps": 12, "restarts": 2, "losses": ("cross-entropy", "margin"), "targeted": targeted, "seed": seed}
    whole, compact = (attacks.pgd(NET, x, y, ThreatModel(*ball), compact=compact, batch_size=7, **options)
                      for compact in (False, True))  # fmt: skip
    hit = correct(NET, whole, y)
    np.testing.assert_array_equal(hit, correct(NET, compact, y))
    standing = ~hit if targeted else hit
    np.testing.assert_allclose(compact[standing], whole[standing], atol=1e-6)


def test_every_restart_begins_elsewhere():
    hard, y = linear(bias=-9.0), np.zeros(N, int)
    options = {"threat": ThreatModel("linf", 0.1), "steps": 1, "step_size": 1e-3}
    one, four = (margins(hard, attacks.pgd(hard, X, y, restarts=n, **options), y) for n in (1, 4))
    assert (four > one + 1e-4).mean() > 0.5


def test_compaction_is_tested_on_images_of_both_kinds():
    x, y = rng_images(20, 0), np.arange(20) % 3
    for norm, eps in (("linf", 0.05), ("l2", 0.25)):
        beaten = ~correct(NET, attacks.pgd(NET, x, y, ThreatModel(norm, eps), steps=12), y)
        clean = ~correct(NET, x, y)
        assert clean.sum() < beaten.sum() < len(x)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd-linf", "pgd-l2"])
def test_the_batch_size_does_not_matter(name):
    ways = {"fgsm": lambda **o: attacks.fgsm(NET, X, Y, 0.1, **o), "bim": lambda **o: attacks.bim(NET, X, Y, 0.1, **o),
            "pgd-linf": lambda **o: attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), steps=5, **o),
            "pgd-l2": lambda **o: attacks.pgd(NET, X, Y, ThreatModel("l2", 0.5), steps=5, **o)}  # fmt: skip
    np.testing.assert_allclose(ways[name](batch_size=5), ways[name](), atol=1e-5)


def test_a_warm_start_is_projected_and_used():
    threat, far = ThreatModel("linf", 0.05), np.clip(X + 0.5, 0, 1)
    x_adv = attacks.pgd(LINEAR, X, np.zeros(N, int), threat, steps=1, step_size=1e-6, start=far)
    gain = margins(LINEAR, x_adv, np.zeros(N, int)) - margins(LINEAR, X, np.zeros(N, int))
    np.testing.assert_allclose(gain, max(0, 0.05 * W.sum()), atol=1e-4)
    assert threat.distance(x_adv, X).max() <= 0.05 + 1e-6


# ── Seeds ──


@pytest.mark.parametrize("name", ["pgd-linf", "pgd-l2", "apgd-linf", "apgd-l2", "square-linf", "square-l2"])
def test_the_same_seed_gives_the_same_images(name):
    hard = linear(bias=-9.0)  # nothing is beaten, so that every query and restart is spent
    y = np.zeros(N, int)
    first = ATTACKS[name](hard, X, y, 0.1, 3)
    np.testing.assert_array_equal(first, ATTACKS[name](hard, X, y, 0.1, 3))
    np.testing.assert_array_equal(ATTACKS[name](NET, X, Y, 0.1, 3), ATTACKS[name](NET, X, Y, 0.1, 3))


def test_another_seed_gives_other_images():
    hard, y = linear(bias=-9.0), np.zeros(N, int)
    for name in ("square-linf", "square-l2", "apgd-l2"):
        assert not np.array_equal(ATTACKS[name](hard, X, y, 0.1, 0), ATTACKS[name](hard, X, y, 0.1, 1))
    for norm in ("linf", "l2"):
        one, two = (attacks.pgd(NET, X, Y, ThreatModel(norm, 0.2), steps=1, step_size=1e-3, seed=s) for s in (0, 1))
        assert not np.array_equal(one, two)


# ── What an attack must not do to a network, and which networks it takes ──


def state(model):
    return {variable.path: variable.numpy() for variable in model.variables}


@pytest.mark.parametrize("name", [*ATTACKS, "lbfgs"])
def test_an_attack_leaves_the_network_as_it_was(name):
    """Weights, batch statistics and the seed of dropout, which would move if dropout were on."""
    before = state(NET)
    assert any("moving_mean" in path for path in before) and any("seed" in path for path in before)
    if name == "lbfgs":
        attacks.lbfgs(NET, X[:2], Y[:2], searches=2, max_iterations=3)
    else:
        ATTACKS[name](NET, X, Y, 0.1)
    assert all(np.array_equal(before[path], value) for path, value in state(NET).items())


@every_attack
def test_dropout_is_off_in_an_attack(name):
    without = network(dropout=0.0)
    without.set_weights(NET.get_weights())
    np.testing.assert_array_equal(ATTACKS[name](NET, X, Y, 0.1), ATTACKS[name](without, X, Y, 0.1))


@every_attack
def test_a_function_is_attacked_like_the_network_it_calls(name):
    def function(x):
        return NET(x, training=False)

    function.randomised = False  # so that both run as the same graph: other sums may send an attack another way
    np.testing.assert_allclose(ATTACKS[name](function, X, Y, 0.1), ATTACKS[name](NET, X, Y, 0.1), atol=1e-6)


def test_a_function_may_compute_in_float64():
    y = np.zeros(N, int)
    for name in ("fgsm", "pgd-l2", "apgd-l2", "square-linf"):
        x_adv = ATTACKS[name](lambda x: tf.cast(LINEAR(x), tf.float64), X, y, 0.1)
        np.testing.assert_allclose(x_adv, ATTACKS[name](LINEAR, X, y, 0.1), atol=1e-5)


@pytest.mark.parametrize("name", [*ATTACKS, "lbfgs"])
def test_a_network_that_ends_in_a_softmax_is_refused(name):
    soft = keras.Sequential([NET, layers.Softmax()])
    with pytest.raises(ValueError, match="probabilities.*expected logits"):
        attacks.lbfgs(soft, X, Y) if name == "lbfgs" else ATTACKS[name](soft, X, Y, 0.1)


@pytest.mark.parametrize("mask", [tf.stop_gradient, tf.round], ids=["stopped", "rounded"])
def test_a_network_without_gradients_is_attacked_without_success(mask):
    """No error: the attack fails, and the sanity checks are what finds the reason."""
    for name in ATTACKS.keys() - {"square"}:
        assert np.isfinite(ATTACKS[name](lambda x: LINEAR(mask(x)), X, Y % 2, 0.1)).all()
    np.testing.assert_array_equal(attacks.bim(lambda x: LINEAR(mask(x)), X, Y % 2, 0.1), X)


def test_a_gradient_that_is_not_finite_is_an_error():
    x = X.copy()
    x[:, 0, 0] = 0.5  # where the derivative of the root is infinite
    cusps = lambda x: tf.reduce_sum(tf.sqrt(tf.abs(x - 0.5)), axis=(1, 2)) * [1.0, -1.0]  # noqa: E731
    for attack in (lambda: attacks.fgsm(cusps, x, Y % 2, 0.1),
                   lambda: attacks.pgd(cusps, x, Y % 2, ThreatModel("l2", 0.1), steps=3, start=x)):  # fmt: skip
        with pytest.raises(FloatingPointError, match="gradient is not finite"):
            attack()


def test_l2_steps_keep_their_length_on_a_confident_network():
    """The gradients are about 1e-27: their squares underflow in float32, their signs do not."""
    confident, y = linear(w=8 * W, bias=-90.0), np.zeros(N, int)
    assert margins(confident, X, y).max() < -60
    x_adv = attacks.pgd(confident, X, y, ThreatModel("l2", 0.2), steps=1, step_size=0.2, start=X)
    np.testing.assert_allclose(ThreatModel("l2", 0.2).distance(x_adv, X), 0.2, rtol=1e-3)


def test_one_graph_serves_every_radius_and_number_of_steps():
    traces = []

    def model(x):
        traces.append(x.shape)
        return LINEAR(x)

    model.randomised = False

    def run(n, eps, steps, step_size):
        attacks.pgd(model, X[:n], Y[:n] % 2, ThreatModel("linf", eps), steps=steps, step_size=step_size)

    run(12, 0.1, 3, 0.01)
    run(11, 0.1, 3, 0.01)
    before = len(traces)
    for n, eps, steps, step_size in ((12, 0.2, 5, 0.3), (7, 0.05, 8, None), (9, np.float64(0.3), np.int64(2), 0.02)):
        run(n, eps, steps, step_size)
    assert len(traces) == before


# ── What is random ──


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_calls_a_random_model_anew_in_every_step(name):
    calls = []

    def model(x):  # a graph would keep the first shift for ever
        calls.append(np.random.normal(scale=1e-4))  # noqa: NPY002
        return LINEAR(x + calls[-1])

    sure = np.abs(margins(LINEAR, X, Y % 2)) > 0.1  # never beaten within so small a radius
    x, y = X[sure], logits(LINEAR, X[sure]).argmax(axis=1)
    steps = {"fgsm": 1, "bim": 3, "pgd-linf": 12, "pgd-l2": 3, "pgd-compact": 3 * 14, "apgd-linf": 7,
             "apgd-l2": 3 * 8}.get(name, 8)  # fmt: skip
    for _ in range(2):
        before = len(calls)
        ATTACKS[name](model, x, y, 0.001)
        assert len(calls) - before >= steps
    assert len(set(calls)) == len(calls)


def test_a_random_network_is_attacked_where_it_says_so():
    class Shift(layers.Layer):
        def call(self, x):
            return x + np.random.normal(scale=0.1)  # noqa: NPY002

    random = keras.Sequential([layers.Input(SHAPE), Shift(), NET])
    with pytest.raises(ValueError, match="model answers differently when it is called again"):
        attacks.fgsm(random, X, Y, 0.1)
    random.randomised = True
    once, again = (attacks.pgd(random, X, Y, ThreatModel("l2", 0.3), steps=3) for _ in range(2))
    assert np.abs(once - again).max() > 1e-4


def test_a_function_is_attacked_alike_with_and_without_a_graph():
    def declared(x):
        return three_classes(x)

    declared.randomised = False
    for attack in (*ATTACKS.values(), lambda m, x, y, eps: attacks.ddn(m, x, y, steps=5),
                   lambda m, x, y, eps: attacks.normalised(m, x, y, (y + 1) % 3, steps=3)[0],
                   lambda m, x, y, eps: attacks.lbfgs(m, x[:2], y[:2], searches=2)):  # fmt: skip
        np.testing.assert_allclose(attack(three_classes, X, Y, 0.1), attack(declared, X, Y, 0.1), atol=1e-5)


# ── The gradient-free attack ──


@quickly
@given(st.integers(0, 999), st.floats(0, 0.5, width=32), st.sampled_from(["linf", "l2"]))
def test_the_square_attack_never_lowers_the_margin(seed, eps, norm):
    x, y = rng_images(8, seed), np.arange(8) % 3
    found = attacks.square(NET, x, y, ThreatModel(norm, eps), queries=15, seed=seed)
    assert (margins(NET, found.images, y) >= margins(NET, x, y) - 1e-5).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 1.0)])
def test_the_square_attack_uses_no_gradient(norm, eps):
    near = linear(bias=-float(np.median(margins(LINEAR, X, np.zeros(N, int)))))
    y, threat = logits(near, X).argmax(axis=1), ThreatModel(norm, eps)
    blind, plain = (attacks.square(m, X, y, threat, queries=400) for m in (lambda x: near(tf.stop_gradient(x)), near))
    np.testing.assert_array_equal(blind.images, plain.images)
    assert not correct(near, plain.images, y).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(4, 16, 1), (9, 3, 3), (1, 1, 1), (12, 13, 2)])
def test_the_square_attack_takes_images_that_are_not_square(shape, norm):
    x, threat = np.random.default_rng(0).uniform(0, 1, (6, *shape)).astype("float32"), ThreatModel(norm, 0.1)
    hard, y = linear(w=np.ones(np.prod(shape), "float32"), bias=-500.0), np.zeros(6, int)
    found = attacks.square(hard, x, y, threat, queries=60)
    assert threat.distance(found.images, x).max() <= 0.1 + 1e-6 and (found.value > margins(hard, x, y)).all()
    assert found.images.min() >= 0 and found.images.max() <= 1 and (found.steps == 60).all()


@pytest.mark.parametrize(("norm", "least"), [("linf", 0.85), ("l2", 0.45)])
def test_the_square_attack_comes_near_the_optimum_of_a_linear_model(norm, least):
    hard, y, dual = linear(bias=-50.0), np.zeros(4, int), np.linalg.norm(W, 1 if norm == "linf" else 2)
    found = attacks.square(hard, X[:4], y, ThreatModel(norm, 0.1), queries=400)
    gain = found.value - margins(hard, X[:4], y)
    assert (gain > least * 0.1 * dual).all() and (gain < 0.1 * dual + 1e-4).all()


def test_the_square_attack_goes_on_from_a_start_and_stops_where_it_has_won():
    hard, y, threat = linear(bias=-50.0), np.zeros(4, int), ThreatModel("l2", 0.1)
    best = X[:4] + np.float32(0.1 / np.linalg.norm(W)) * W.reshape(SHAPE)
    found = attacks.square(hard, X[:4], y, threat, queries=30, start=best)
    np.testing.assert_allclose(found.images, best, atol=1e-6)  # no square improves the optimum
    won = attacks.square(LINEAR, X, 1 - logits(LINEAR, X).argmax(axis=1), threat, queries=30)
    assert not won.steps.any()
    np.testing.assert_array_equal(won.images, X)


# ── APGD ──


@pytest.mark.parametrize("loss", ["log-odds", "margin", "dlr", "targeted dlr", "targeted margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_reaches_the_optimum_of_a_linear_model(norm, loss):
    hard, y, dual = linear(bias=-50.0), np.zeros(N, int), np.linalg.norm(W, 1 if norm == "linf" else 2)
    found = attacks.apgd(hard, X, y, ThreatModel(norm, 0.1), loss=loss, steps=25)
    np.testing.assert_allclose(found.value - margins(hard, X, y), 0.1 * dual, rtol=1e-4)
    np.testing.assert_allclose(found.value, margins(hard, found.images, y), rtol=1e-6)
    assert (found.steps == 26).all()  # the gradient at the start is one


def test_the_checkpoints_of_apgd_are_those_of_the_paper():
    assert attacks._checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert attacks._checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]


def test_apgd_halves_its_steps_until_it_is_on_the_hill():
    """Twice eps is far too long a step for a hill of this width: it oscillates until the size has shrunk."""
    x, y, threat = np.full((2, *SHAPE), 0.5, "float32"), np.zeros(2, int), ThreatModel("linf", 0.2)
    found = attacks.apgd(hill, x, y, threat, steps=60)
    np.testing.assert_allclose(found.images.mean(axis=(1, 2, 3)), 0.55, atol=2e-3)
    plain = attacks.pgd(hill, x, y, threat, steps=60, step_size=0.4, start=x)
    assert (margins(hill, plain, y) < found.value).all()


def test_apgd_climbs_where_the_cross_entropy_has_no_gradient():
    """Logits times a thousand: the softmax is one-hot in float32, and PGD on the cross-entropy never moves."""

    def loud(x):
        return 1000 * NET(x, training=False)

    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("l2", 1.2)
    stuck = attacks.pgd(loud, X, y, threat, steps=20, start=X)
    assert correct(loud, stuck, y).all() and (attacks.apgd(loud, X, y, threat, steps=20).value > 0).all()
    quiet, same = (attacks.apgd(m, X, y, ThreatModel("l2", 0.2), loss="dlr", steps=10).images for m in (NET, loud))
    np.testing.assert_allclose(quiet, same, atol=1e-3)  # the DLR loss does not see the factor


def test_wider_balls_lead_past_gradients_that_mislead():
    """All is flat around the image, so that a run within the ball has no gradient; from outside the way leads up."""

    def masked(x):
        away = tf.abs(tf.reduce_mean(x, axis=(1, 2, 3)) - 0.5)
        height = tf.where(away < 0.06, -0.2, 10 * (away - 0.08))
        return tf.stack([-height / 2, height / 2], axis=1)

    x, y, threat = np.full((6, *SHAPE), 0.5, "float32"), np.zeros(6, int), ThreatModel("l2", 0.4)
    assert (attacks.apgd(masked, x, y, threat, steps=40, restarts=3).value < 0).all()
    wide = attacks.apgd(masked, x, y, threat, steps=40, restarts=3, radii=(4, 1))
    assert (wide.value > 0).all() and threat.distance(wide.images, x).max() <= 0.4 + 1e-6


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_targeted_runs_go_through_the_wrong_classes(classes):
    many = np.random.default_rng(3).normal(0, 2, (16, classes)).astype("float32")

    def model(x):
        return tf.reshape(x, (-1, 16)) @ many

    z = logits(model, X)
    y = z.argmax(axis=1)
    order = attacks._classes(model, X, y, 5)
    np.testing.assert_array_equal(order, np.argsort(-z, axis=1)[:, 1:])
    nearest = np.min([(z[np.arange(N), y] - z[np.arange(N), t]) / np.linalg.norm(many[:, y] - many[:, t], axis=0)
                      for t in order.T], axis=0)  # fmt: skip
    eps = float(np.median(nearest))
    for found in (attacks.apgd(model, X, y, ThreatModel("l2", eps), loss="targeted dlr", steps=30),
                  attacks.fab(model, X, y, ThreatModel("l2", eps), steps=30)):  # fmt: skip
        np.testing.assert_array_equal(found.value > 0, nearest < eps)
        left = found.value <= 0
        assert len(set(found.steps[left])) == 1 and found.steps[left][0] >= 30 * (classes - 1)


def test_the_new_attacks_name_their_bad_options():
    threat = ThreatModel("l2", 0.1)
    with pytest.raises(ValueError, match="did you mean 'dlr'"):
        attacks.apgd(NET, X, Y, threat, loss="drl")
    for radii in ((), (2,), (1, 2), (0.5, 1)):
        with pytest.raises(ValueError, match="radii are .*; expected factors >= 1 of eps, the last one 1"):
            attacks.apgd(NET, X, Y, threat, radii=radii)
    for attack in (attacks.apgd, attacks.fab, attacks.square):
        with pytest.raises(ValueError, match="start has shape"):
            attack(NET, X, Y, threat, start=X[:3])
        with pytest.raises(ValueError, match="batch_size is 0"):
            attack(NET, X, Y, threat, batch_size=0)
    for attack in (attacks.apgd, attacks.fab):
        with pytest.raises(ValueError, match="targets is 0"):
            attack(NET, X, Y, threat, targets=0)


@pytest.mark.parametrize("attack", [attacks.apgd, attacks.fab, attacks.square])
def test_a_goal_of_ones_own_decides_what_is_won(attack):
    """Here a wrong answer counts only where it is sure: by five in the margin."""

    def sure(logits, y):
        return attacks.margin(logits, y) - 5

    y, threat = logits(three_classes, X).argmax(axis=1), ThreatModel("linf", 0.3)
    plain, strict = attack(three_classes, X, y, threat), attack(three_classes, X, y, threat, goal=sure)
    np.testing.assert_allclose(strict.value, margins(three_classes, strict.images, y) - 5, atol=1e-4)
    assert (plain.value > 0).sum() > (strict.value > 0).sum() and (strict.steps >= plain.steps).all()


# ── FAB ──


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_the_smallest_change_of_a_linear_model(norm):
    near = linear(bias=-float(np.median(X.reshape(N, -1) @ W)))
    y = logits(near, X).argmax(axis=1)
    exact = np.abs(margins(near, X, y)) / np.linalg.norm(W, 1 if norm == "linf" else 2)
    found = attacks.fab(near, X, y, ThreatModel(norm, 0), smallest=True, steps=20)
    np.testing.assert_allclose(ThreatModel(norm, 1).distance(found.images, X), exact, rtol=1e-3, atol=1e-6)
    assert not correct(near, found.images, y).any()
    eps = float(np.median(exact))
    within = attacks.fab(near, X, y, ThreatModel(norm, eps), steps=20)
    np.testing.assert_array_equal(within.value > 0, exact < eps)


def test_fab_leaves_alone_what_is_wrong_already_and_what_it_cannot_beat():
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("l2", 0.3)
    wrong = attacks.fab(NET, X, (y + 1) % 3, threat, smallest=True, steps=5)
    np.testing.assert_array_equal(wrong.images, X)
    assert not wrong.steps.any()
    far = attacks.fab(linear(bias=-90.0), X, np.zeros(N, int), threat, smallest=True, steps=5)
    np.testing.assert_array_equal(far.images, X)


# ── L-BFGS ──


def test_lbfgs_finds_nearly_the_smallest_change_on_a_linear_model():
    bias = -float(np.median(margins(LINEAR, X, np.zeros(N, int))))
    model, x = linear(bias=bias), X[:4]
    z = logits(model, x)
    target = 1 - z.argmax(axis=1)
    smallest = np.abs(z[:, 1] - z[:, 0]) / np.linalg.norm(W)  # the distance of a point from a plane
    x_adv = attacks.lbfgs(model, x, target, searches=10, max_iterations=20)
    assert correct(model, x_adv, target).all()
    change = ThreatModel("l2", 1).distance(x_adv, x)
    assert (change >= smallest - 1e-5).all()
    np.testing.assert_allclose(change, smallest, rtol=0.05, atol=2e-3)


def test_lbfgs_stays_within_the_pixels():
    x = np.concatenate([np.zeros((1, *SHAPE)), np.ones((1, *SHAPE))]).astype("float32")
    model = linear(w=np.ones(16, "float32"), bias=-8.0)
    target = np.array([1, 0])
    x_adv = attacks.lbfgs(model, x, target, searches=4, max_iterations=20)
    assert x_adv.dtype == np.float32 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert correct(model, x_adv, target).all()


def test_lbfgs_returns_what_it_cannot_move():
    model = linear(bias=-100.0)  # no valid image has label 1
    target = np.array([1, 0, 1])
    x_adv = attacks.lbfgs(model, X[:3], target, searches=3)
    np.testing.assert_array_equal(x_adv[[0, 2]], X[[0, 2]])
    np.testing.assert_allclose(x_adv[1], X[1], atol=1e-3)  # the target already: next to no change


def test_lbfgs_repeats_and_takes_smaller_changes_with_more_searches():
    x, length = X[:2], ThreatModel("l2", 1).distance
    targets = (logits(NET, x).argmax(axis=1) + 1) % 3
    few, many, again = (attacks.lbfgs(NET, x, targets, searches=n, max_iterations=8) for n in (2, 5, 5))
    np.testing.assert_array_equal(many, again)
    reached = correct(NET, few, targets)
    assert reached.any() and correct(NET, many, targets)[reached].all()
    assert (length(many, x) <= length(few, x) + 1e-5)[reached].all()


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
    "short": (Y[:-1], TypeError, f"expected {N} integer labels"),
    "one-hot": (np.eye(3, dtype=int)[Y], TypeError, "integer labels"),
}
BAD_RADII = {"negative": -0.1, "nan": float("nan"), "infinite": float("inf")}


def attempt(name, x, y, eps=0.1):
    return attacks.lbfgs(NET, x, y) if name == "lbfgs" else ATTACKS[name](NET, x, y, eps)


@pytest.mark.parametrize("name", [*ATTACKS, "lbfgs"])
@pytest.mark.parametrize(("x", "error", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused(name, x, error, message):
    with pytest.raises(error, match=message):
        attempt(name, x, Y[: len(x)])


@pytest.mark.parametrize("name", [*ATTACKS, "lbfgs"])
@pytest.mark.parametrize(("y", "error", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_refused(name, y, error, message):
    with pytest.raises(error, match=message):
        attempt(name, X, y)


@every_attack
@pytest.mark.parametrize("eps", BAD_RADII.values(), ids=BAD_RADII)
def test_bad_radii_are_refused(name, eps):
    with pytest.raises(ValueError, match=f"eps is {eps}"):
        ATTACKS[name](NET, X, Y, eps)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd-linf", "apgd-linf", "fab-linf", "square-linf"])
def test_a_radius_in_0_to_255_units_is_refused(name):
    with pytest.raises(ValueError, match="0-255 units"):
        ATTACKS[name](NET, X, Y, 25.5)


@pytest.mark.parametrize("attack", [
    lambda **options: attacks.bim(NET, X, Y, 0.1, **options),
    lambda **options: attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), **options),
], ids=["bim", "pgd"])  # fmt: skip
@pytest.mark.parametrize("name", ["steps", "step_size", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_steps_and_sizes_are_positive(attack, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        attack(**{name: value})


@pytest.mark.parametrize(("options", "message"), [
    ({"restarts": 0}, "restarts is 0"),
    ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
    ({"losses": "margin"}, "losses is 'margin'"),
    ({"losses": ("hinge",)}, "hinge"),
    ({"losses": ()}, r"losses is \(\)"),
    ({"start": 255 * X}, "start lies in"),
    ({"start": np.full_like(X, np.nan)}, "start holds NaN"),
    ({"start": X[:3]}, "start"),
])  # fmt: skip
def test_pgd_names_its_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), **options)


def test_the_other_attacks_name_their_bad_options():
    with pytest.raises(ValueError, match="queries is 0"):
        attacks.square(NET, X, Y, ThreatModel("linf", 0.1), queries=0)
    with pytest.raises(ValueError, match="searches is 0"):
        attacks.lbfgs(NET, X, Y, searches=0)
    for weights in [(1e3, 1e-3), (0, 1), (1, 1), (1, np.inf), (np.nan, 1)]:
        with pytest.raises(ValueError, match="weights are .*; expected 0 < low < high"):
            attacks.lbfgs(NET, X, Y, weights=weights)
    for gamma in (0, 1, 1.5, np.nan):
        with pytest.raises(ValueError, match=f"gamma is {gamma}; expected a number above 0 and below 1"):
            attacks.ddn(NET, X, Y, gamma=gamma)
    with pytest.raises(ValueError, match="norm is 'l1'"):
        attacks.pgd(NET, X, Y, ThreatModel("l1", 0.1))


# ── Normalised steps towards a target (paper 03) ──


def test_normalised_takes_as_many_steps_as_a_linear_model_needs():
    """Two classes: every step of length s gains s |w| of the margin; the first iterate beyond zero is reported."""
    near = linear(bias=-float(np.median(X.reshape(N, -1) @ W)))  # the border runs through the images: no bound is met
    y = near(X).numpy().argmax(axis=1)
    x_adv, taken = attacks.normalised(near, X, y, 1 - y, step_size=0.02)
    needed = np.ceil(-margins(near, X, y) / (0.02 * np.linalg.norm(W))).astype(int)
    np.testing.assert_array_equal(taken, needed)
    np.testing.assert_allclose(ThreatModel("l2", 1).distance(x_adv, X), 0.02 * needed, rtol=1e-4)
    assert len(set(needed)) > 1 and correct(near, x_adv, 1 - y).all()


@pytest.mark.parametrize("loss", ["cross-entropy", "logit", "margin"])
@pytest.mark.parametrize("batch_size", [5, 100])
def test_normalised_reaches_its_target_within_the_bounds(loss, batch_size):
    y = logits(NET, X).argmax(axis=1)
    target = (y + 1) % 3
    x_adv, taken = attacks.normalised(NET, X, y, target, loss=loss, step_size=0.05, steps=200, batch_size=batch_size)
    np.testing.assert_array_equal(correct(NET, x_adv, target), taken <= 200)
    assert (taken <= 200).mean() > 0.8 and (taken > 0).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (ThreatModel("l2", 1).distance(x_adv, X) <= 0.05 * np.minimum(taken, 200) + 1e-5).all()


def test_normalised_says_where_it_failed_and_leaves_alone_what_is_done():
    far = linear(bias=-90.0)
    _, taken = attacks.normalised(far, X, np.zeros(N, int), np.ones(N, int), steps=3)
    np.testing.assert_array_equal(taken, 4)
    x_adv, taken = attacks.normalised(far, X, np.ones(N, int), np.zeros(N, int))
    np.testing.assert_array_equal(x_adv, X)
    assert not taken.any()


def test_normalised_goes_on_to_a_goal_of_ones_own():
    def sure(logits, target):
        return 0.9 - tf.gather(tf.nn.softmax(logits), target, batch_dims=1)

    y = logits(three_classes, X).argmax(axis=1)
    target = (y + 1) % 3
    options = {"step_size": 0.05, "steps": 300}
    at_border, few = attacks.normalised(three_classes, X, y, target, **options)
    x_adv, many = attacks.normalised(three_classes, X, y, target, goal=sure, **options)
    done = many <= 300
    assert done.any() and (many >= few).all() and (many > few).any()
    assert (tf.nn.softmax(logits(three_classes, x_adv)).numpy()[np.arange(N), target][done] >= 0.9).all()
    onwards, more = attacks.normalised(three_classes, at_border, y, target, goal=sure, **options)
    np.testing.assert_array_equal((few + more)[done], many[done])  # to go on is the same path
    np.testing.assert_allclose(onwards[done], x_adv[done], atol=1e-5)


def test_probability_and_cross_entropy_have_one_direction():
    def minus_probability(logits, y):
        return -tf.gather(tf.nn.softmax(logits), y, batch_dims=1)

    x, y = tf.constant(X), tf.constant(Y)
    ways = [attacks.input_gradient(three_classes, loss, x, y)[0] for loss in (
        attacks.cross_entropy, minus_probability, attacks.minus_logit)]
    text, code, logit = (attacks._direction(way, "l2") for way in ways)
    np.testing.assert_allclose(text, code, atol=1e-5)
    assert np.abs(text - logit).max() > 0.01


def test_the_true_class_is_no_target():
    target = (Y + 1) % 3
    target[[2, 5]] = Y[[2, 5]]
    with pytest.raises(ValueError, match=r"target equals y for the images \[2, 5\]"):
        attacks.normalised(NET, X, Y, target)
    for y, error, message in BAD_LABELS.values():
        with pytest.raises(error, match=message):
            attacks.normalised(NET, X, y, (Y + 1) % 3)
        with pytest.raises(error, match=message):
            attacks.normalised(NET, X, (Y + 1) % 3, y)
    with pytest.raises(ValueError, match="step_size is 0"):
        attacks.normalised(NET, X, Y, (Y + 1) % 3, step_size=0)
    with pytest.raises(ValueError, match="did you mean 'logit'"):
        attacks.normalised(NET, X, Y, (Y + 1) % 3, loss="logits")


# ── Smallest changes ──


def test_ddn_finds_the_smallest_change_of_a_linear_model():
    y = LINEAR(X).numpy().argmax(axis=1)
    exact = np.abs(margins(LINEAR, X, y)) / np.linalg.norm(W)
    x_adv = attacks.ddn(LINEAR, X, y, steps=200)
    length = ThreatModel("l2", 1).distance(x_adv, X)
    assert not correct(LINEAR, x_adv, y).any()
    assert (length >= exact - 1e-5).all() and (length <= 1.05 * exact + 1e-3).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn_beats_what_pgd_beats_and_no_less(targeted):
    y = logits(NET, X).argmax(axis=1)
    y = (y + 1) % 3 if targeted else y
    x_adv = attacks.ddn(NET, X, y, steps=150, targeted=targeted, batch_size=5)
    length = ThreatModel("l2", 1).distance(x_adv, X)
    assert (correct(NET, x_adv, y) == targeted).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    for eps in np.quantile(length, [0.25, 0.75]):
        strong = attacks.pgd(NET, X, y, ThreatModel("l2", eps), steps=100, restarts=3, targeted=targeted)
        beaten = correct(NET, strong, y) == targeted
        assert abs((length <= eps).mean() - beaten.mean()) <= 2 / N


def test_ddn_leaves_alone_what_is_wrong_already_and_what_it_cannot_beat():
    y = logits(NET, X).argmax(axis=1)
    np.testing.assert_array_equal(attacks.ddn(NET, X, (y + 1) % 3, steps=10), X)
    np.testing.assert_array_equal(attacks.ddn(linear(bias=-90.0), X, np.zeros(N, int), steps=10), X)


def test_ddn_reaches_images_far_outside_its_first_radius():
    y, far = LINEAR(X).numpy().argmax(axis=1), 1e-3 * 1.05**10  # no first run comes further than this
    x_adv = attacks.ddn(LINEAR, X, y, steps=10, radius=1e-3)
    exact = np.abs(margins(LINEAR, X, y)) / np.linalg.norm(W)
    assert (exact > far).any() and not correct(LINEAR, x_adv, y).any()


def test_more_steps_of_ddn_are_not_worse_and_batches_do_not_matter():
    y = logits(NET, X).argmax(axis=1)
    few, many = (ThreatModel("l2", 1).distance(attacks.ddn(NET, X, y, steps=n), X).mean() for n in (25, 200))
    assert 0 < many <= few + 1e-4
    small = attacks.ddn(NET, X, y, steps=20, batch_size=5)
    np.testing.assert_allclose(small, attacks.ddn(NET, X, y, steps=20), atol=1e-4)


# ── The standard set ──


def test_the_standard_set_keeps_the_worst_case_and_counts_who_was_beaten_by_what():
    few = {"one step": partial(attacks.apgd, loss="margin", steps=1), "Square": partial(attacks.square, queries=20),
           "APGD-T": partial(attacks.apgd, loss="targeted dlr", steps=15)}  # fmt: skip
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("linf", 0.3)
    found, table = attacks.standard(NET, X, y, threat, attacks=few, surrogate=LINEAR)
    assert threat.contains(found.images, X).all()
    np.testing.assert_allclose(found.value, attacks.margin(logits(NET, found.images), y), atol=1e-5)
    assert table["attack"].tolist() == ["none", "one step", "Square", "transfer", "APGD-T"][: len(table)]
    assert table["beaten"].sum() == (found.value > 0).sum() and table["beaten"][0] == 0
    np.testing.assert_array_equal(table["images"][2:], N - table["beaten"].cumsum()[1:-1])
    again, _ = attacks.standard(NET, X, y, threat, attacks=few, surrogate=LINEAR)
    np.testing.assert_array_equal(again.images, found.images)


def test_the_standard_set_leaves_alone_what_is_wrong_without_it():
    y = (logits(NET, X).argmax(axis=1) + 1) % 3
    found, table = attacks.standard(NET, X, y, ThreatModel("l2", 0.3))
    np.testing.assert_array_equal(found.images, X)
    assert table.to_dict("records") == [{"attack": "none", "images": N, "beaten": N, "steps": 0}]
