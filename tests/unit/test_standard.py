"""The standard set: APGD, FAB and Square find what is known to be there, and the cascade keeps the worst case."""

from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from toys import LINEAR, NET, SHAPE, N, W, X, Y, hill, linear, margins, rng_images, steady, three_classes

from helpers import attacks
from helpers.defence import Path, as_defence
from helpers.evaluation import correct, logits
from helpers.losses import evasion, margin
from helpers.search import opened
from helpers.standard import _checkpoints, _classes, apgd, fab, square, standard
from helpers.threat import ThreatModel

quickly = settings(max_examples=12, deadline=None, derandomize=True)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def dual(norm):
    return np.linalg.norm(W, 1 if norm == "linf" else 2)


# ── Square ──


@quickly
@given(st.integers(0, 999), st.floats(0, 0.5, width=32), st.sampled_from(["linf", "l2"]))
def test_the_square_attack_never_lowers_the_margin(seed, eps, norm):
    x, y = rng_images(8, seed), np.arange(8) % 3
    found = square(NET, x, y, ThreatModel(norm, eps), queries=15, seed=seed)
    assert (margins(NET, found.images, y) >= margins(NET, x, y) - 1e-5).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 1.0)])
def test_the_square_attack_uses_no_gradient(norm, eps):
    near = linear(bias=-float(np.median(margins(LINEAR, X, np.zeros(N, int)))))
    y, threat = logits(near, X).argmax(axis=1), ThreatModel(norm, eps)
    blind, plain = (square(m, X, y, threat, queries=400) for m in (steady(lambda x: near(tf.stop_gradient(x))), near))
    np.testing.assert_array_equal(blind.images, plain.images)
    assert not correct(near, plain.images, y).any()


def test_the_square_attack_asks_only_what_is_deployed():
    """The path is there, as for the other attacks, and is not looked at."""
    hard, y, threat = linear(bias=-50.0), np.zeros(4, int), ThreatModel("linf", 0.1)
    plain, other = (square(hard, X[:4], y, threat, queries=30, path=path) for path in (None, LINEAR))
    np.testing.assert_array_equal(plain.images, other.images)


@norms
@pytest.mark.parametrize("shape", [(4, 16, 1), (9, 3, 3), (1, 1, 1), (12, 13, 2)])
def test_the_square_attack_takes_images_that_are_not_square(shape, norm):
    x, threat = np.random.default_rng(0).uniform(0, 1, (6, *shape)).astype("float32"), ThreatModel(norm, 0.1)
    hard, y = linear(w=np.ones(np.prod(shape), "float32"), bias=-500.0), np.zeros(6, int)
    found = square(hard, x, y, threat, queries=60)
    assert threat.distance(found.images, x).max() <= 0.1 + 1e-6 and (found.value > margins(hard, x, y)).all()
    assert found.images.min() >= 0 and found.images.max() <= 1 and (found.steps == 60).all()


@pytest.mark.parametrize(("norm", "least"), [("linf", 0.85), ("l2", 0.45)])
def test_the_square_attack_comes_near_the_optimum_of_a_linear_model(norm, least):
    hard, y = linear(bias=-50.0), np.zeros(4, int)
    found = square(hard, X[:4], y, ThreatModel(norm, 0.1), queries=400)
    gain = found.value - margins(hard, X[:4], y)
    assert (gain > least * 0.1 * dual(norm)).all() and (gain < 0.1 * dual(norm) + 1e-4).all()


def test_the_square_attack_goes_on_from_a_start_and_stops_where_it_has_won():
    hard, y, threat = linear(bias=-50.0), np.zeros(4, int), ThreatModel("l2", 0.1)
    best = X[:4] + np.float32(0.1 / np.linalg.norm(W)) * W.reshape(SHAPE)
    found = square(hard, X[:4], y, threat, queries=30, start=best)
    np.testing.assert_allclose(found.images, best, atol=1e-6)  # no square improves the optimum
    won = square(LINEAR, X, 1 - logits(LINEAR, X).argmax(axis=1), threat, queries=30)
    assert not won.steps.any()
    np.testing.assert_array_equal(won.images, X)


def test_one_lucky_draw_is_no_win():
    """A defence that is wrong once in a while by itself: what the search took for a win is asked again."""
    draws = np.random.default_rng(0)

    def shaken(x):
        return linear(bias=-3.0 + 60.0 * (draws.uniform() < 0.1))(tf.zeros_like(x))

    y, threat = np.zeros(N, int), ThreatModel("linf", 0.01)
    found = square(shaken, X, y, threat, queries=60)
    assert (found.value == -3).all() and (found.steps < 60).any()


# ── APGD ──


@pytest.mark.parametrize("loss", ["log-odds", "margin", "dlr", "targeted dlr", "targeted margin"])
@norms
def test_apgd_reaches_the_optimum_of_a_linear_model(norm, loss):
    hard, y = linear(bias=-50.0), np.zeros(N, int)
    found = apgd(hard, X, y, ThreatModel(norm, 0.1), loss=loss, steps=25)
    np.testing.assert_allclose(found.value - margins(hard, X, y), 0.1 * dual(norm), rtol=1e-4)
    np.testing.assert_allclose(found.value, margins(hard, found.images, y), rtol=1e-6)
    assert (found.steps == 26).all()  # the gradient at the start is one


def test_the_checkpoints_of_apgd_are_those_of_the_paper():
    assert _checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert _checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]


def test_apgd_halves_its_steps_until_it_is_on_the_hill():
    """Twice eps is far too long a step for a hill of this width: it oscillates until the size has shrunk."""
    x, y, threat = np.full((2, *SHAPE), 0.5, "float32"), np.zeros(2, int), ThreatModel("linf", 0.2)
    found = apgd(hill, x, y, threat, steps=60)
    np.testing.assert_allclose(found.images.mean(axis=(1, 2, 3)), 0.55, atol=2e-3)
    plain = attacks.pgd(hill, x, y, threat, steps=60, step_size=0.4, start=x)
    assert (plain.value < found.value).all()


def test_apgd_climbs_where_the_cross_entropy_has_no_gradient():
    """Logits times a thousand: the softmax is one-hot in float32, and PGD on the cross-entropy never moves."""

    @steady
    def loud(x):
        return 1000 * NET(x, training=False)

    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("l2", 1.2)
    stuck = attacks.pgd(loud, X, y, threat, steps=20, losses=("cross-entropy",), start=X)
    assert (stuck.value < 0).all() and (apgd(loud, X, y, threat, steps=20).value > 0).all()
    quiet, same = (apgd(m, X, y, ThreatModel("l2", 0.2), loss="dlr", steps=10).images for m in (NET, loud))
    np.testing.assert_allclose(quiet, same, atol=1e-3)  # the DLR loss does not see the factor


def test_wider_balls_lead_past_gradients_that_mislead():
    """All is flat around the image, so that a run within the ball has no gradient; from outside the way leads up."""

    @steady
    def masked(x):
        away = tf.abs(tf.reduce_mean(x, axis=(1, 2, 3)) - 0.5)
        height = tf.where(away < 0.06, -0.2, 10 * (away - 0.08))
        return tf.stack([-height / 2, height / 2], axis=1)

    x, y, threat = np.full((6, *SHAPE), 0.5, "float32"), np.zeros(6, int), ThreatModel("l2", 0.4)
    assert (apgd(masked, x, y, threat, steps=40, restarts=3).value < 0).all()
    wide = apgd(masked, x, y, threat, steps=40, restarts=3, radii=(4, 1))
    assert (wide.value > 0).all() and threat.distance(wide.images, x).max() <= 0.4 + 1e-6


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_targeted_runs_go_through_the_wrong_classes(classes):
    many = np.random.default_rng(3).normal(0, 2, (16, classes)).astype("float32")

    @steady
    def model(x):
        return tf.reshape(x, (-1, 16)) @ many

    z = logits(model, X)
    y = z.argmax(axis=1)
    aim, *_ = opened(model, X, y, ThreatModel("l2", 1.0), batch_size=5)
    order = _classes(aim, X, y)
    np.testing.assert_array_equal(order, np.argsort(-z, axis=1)[:, 1:])
    nearest = np.min([(z[np.arange(N), y] - z[np.arange(N), t]) / np.linalg.norm(many[:, y] - many[:, t], axis=0)
                      for t in order.T], axis=0)
    eps = float(np.median(nearest))
    for found in (apgd(model, X, y, ThreatModel("l2", eps), loss="targeted dlr", steps=30),
                  fab(model, X, y, ThreatModel("l2", eps), steps=30)):
        np.testing.assert_array_equal(found.value > 0, nearest < eps)
        left = found.value <= 0
        assert len(set(found.steps[left])) == 1 and found.steps[left][0] >= 30 * (classes - 1)


def test_apgd_climbs_the_first_loss_of_its_path():
    """Here one that leads the wrong way, so that the start stays the best."""
    hard, y, threat = linear(bias=-50.0), np.zeros(N, int), ThreatModel("linf", 0.1)
    wrong_way = Path(as_defence(hard), (lambda outputs, y: -evasion(outputs, y),))
    down, up, named = (apgd(hard, X, y, threat, steps=5, start=X, path=path, loss=loss).images
                       for path, loss in ((wrong_way, None), (None, None), (wrong_way, "log-odds")))
    np.testing.assert_array_equal(down, X)
    np.testing.assert_array_equal(named, up)
    np.testing.assert_allclose(np.abs(up - X), 0.1, atol=1e-6)


# ── FAB ──


@norms
def test_fab_finds_the_smallest_change_of_a_linear_model(norm):
    near = linear(bias=-float(np.median(X.reshape(N, -1) @ W)))
    y = logits(near, X).argmax(axis=1)
    exact = np.abs(margins(near, X, y)) / dual(norm)
    found = fab(near, X, y, ThreatModel(norm, 0), smallest=True, steps=20)
    np.testing.assert_allclose(ThreatModel(norm, 1).distance(found.images, X), exact, rtol=1e-3, atol=1e-6)
    assert not correct(near, found.images, y).any()
    eps = float(np.median(exact))
    within = fab(near, X, y, ThreatModel(norm, eps), steps=20)
    np.testing.assert_array_equal(within.value > 0, exact < eps)


def test_fab_leaves_alone_what_is_wrong_already_and_what_it_cannot_beat():
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("l2", 0.3)
    wrong = fab(NET, X, (y + 1) % 3, threat, smallest=True, steps=5)
    np.testing.assert_array_equal(wrong.images, X)
    assert not wrong.steps.any()
    far = fab(linear(bias=-90.0), X, np.zeros(N, int), threat, smallest=True, steps=5)
    np.testing.assert_array_equal(far.images, X)


def test_the_smallest_change_that_wins_on_the_path_alone_is_given_back_undone():
    y = logits(LINEAR, X).argmax(axis=1)
    hard = linear(bias=-90.0)  # always the class 0
    found = fab(hard, X, y, ThreatModel("l2", 0.3), smallest=True, steps=5, path=LINEAR)
    np.testing.assert_array_equal(found.images, X)
    np.testing.assert_array_equal(found.value > 0, y == 1)


# ── What they share ──


def test_bad_options_are_named():
    threat = ThreatModel("l2", 0.1)
    with pytest.raises(ValueError, match="did you mean 'dlr'"):
        apgd(NET, X, Y, threat, loss="drl")
    for radii in ((), (2,), (1, 2), (0.5, 1)):
        with pytest.raises(ValueError, match="radii are .*; expected factors >= 1 of eps, the last one 1"):
            apgd(NET, X, Y, threat, radii=radii)
    for attack in (apgd, fab):
        with pytest.raises(ValueError, match="targets is 0"):
            attack(NET, X, Y, threat, targets=0)
    with pytest.raises(ValueError, match="queries is 0"):
        square(NET, X, Y, threat, queries=0)


@pytest.mark.parametrize("attack", [apgd, fab, square])
def test_a_goal_of_ones_own_decides_what_is_won(attack):
    """Here a wrong answer counts only where it is sure: by five in the margin."""

    def sure(outputs, y):
        return margin(outputs.logits, y) - 5

    y, threat = logits(three_classes, X).argmax(axis=1), ThreatModel("linf", 0.2)
    options = {"queries": 1000} if attack is square else {}
    plain, strict = (attack(three_classes, X, y, threat, goal=goal, **options) for goal in (None, sure))
    np.testing.assert_allclose(strict.value, margins(three_classes, strict.images, y) - 5, atol=1e-4)
    assert (plain.value > 0).sum() > (strict.value > 0).sum() and (strict.steps >= plain.steps).all()


@pytest.mark.parametrize(("attack", "norm"), [
    (partial(square, queries=20), "linf"), (partial(square, queries=20), "l2"), (partial(apgd, steps=5), "l2"),
], ids=["square-linf", "square-l2", "apgd-l2"])
def test_another_seed_gives_other_images(attack, norm):
    hard, y = linear(bias=-9.0), np.zeros(N, int)
    one, other = (attack(hard, X, y, ThreatModel(norm, 0.1), seed=seed).images for seed in (0, 1))
    assert not np.array_equal(one, other)


# ── The cascade ──


FEW = {"one step": partial(apgd, loss="margin", steps=1), "APGD-T": partial(apgd, loss="targeted dlr", steps=15),
       "Square": partial(square, queries=20)}


def test_the_standard_set_keeps_the_worst_case_and_counts_who_was_beaten_by_what():
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("linf", 0.15)
    found, table = standard(NET, X, y, threat, attacks=FEW, surrogate=three_classes)
    assert threat.contains(found.images, X).all()
    np.testing.assert_allclose(found.value, margin(logits(NET, found.images), y), atol=1e-5)
    assert table["attack"].tolist() == ["none", "one step", "APGD-T", "transfer", "Square"]
    assert table["path"].tolist() == ["", "exact", "exact", "surrogate", ""]
    assert table["beaten"].sum() == (found.value > 0).sum() and table["beaten"][0] == 0
    np.testing.assert_array_equal(table["images"][2:], N - table["beaten"].cumsum()[1:-1])
    assert table["steps"].sum() == found.steps.sum()
    again, _ = standard(NET, X, y, threat, attacks=FEW, surrogate=three_classes)
    np.testing.assert_array_equal(again.images, found.images)


def test_the_standard_set_leaves_alone_what_is_wrong_without_it():
    y = (logits(NET, X).argmax(axis=1) + 1) % 3
    found, table = standard(NET, X, y, ThreatModel("l2", 0.3))
    np.testing.assert_array_equal(found.images, X)
    assert table.to_dict("records") == [{"attack": "none", "path": "", "images": N, "beaten": N, "steps": 0}]


class Walled:
    """A network whose one path shows nothing, and whose other has a loss and a start of its own."""

    randomised = False

    def __call__(self, x):
        return as_defence(linear(bias=-50.0))(tf.stop_gradient(x))

    def paths(self, seed=0):
        return {"wall": Path(self), "open": Path(as_defence(linear(bias=-50.0)), (evasion,), (self.start,))}

    def start(self, x, y, threat, seed):
        self.asked = seed
        return threat.project(np.ones_like(x), x).numpy()


def test_losses_and_starts_of_a_path_are_tried_first_and_every_attack_on_every_path():
    walled, y, threat = Walled(), np.zeros(N, int), ThreatModel("linf", 0.1)
    found, table = standard(walled, X, y, threat, attacks=FEW, seed=5)
    assert list(zip(table["attack"], table["path"], strict=True)) == [
        ("none", ""), ("APGD on the path's loss 1", "open"), ("APGD from the path's start 1", "open"),
        ("one step", "wall"), ("one step", "open"), ("APGD-T", "wall"), ("APGD-T", "open"), ("Square", "")]
    np.testing.assert_allclose(found.value - margins(walled, X, y), 0.1 * dual("linf"), rtol=1e-3)
    assert walled.asked == 5
    _, table = standard(walled, X, y, threat, attacks=FEW, paths=["wall"])
    assert table["path"].tolist() == ["", "wall", "wall", ""]
    with pytest.raises(ValueError, match="paths: unknown 'wal', did you mean 'wall'"):
        standard(walled, X, y, threat, attacks=FEW, paths=["wal"])
