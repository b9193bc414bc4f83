"""The attacks that follow gradients: exact where an answer is known, and the best of what they came through."""

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from toys import LINEAR, MANY, NET, SHAPE, N, W, X, Y, hill, linear, margins, rng_images, steady, three_classes

from helpers import attacks, losses
from helpers.evaluation import correct, logits
from helpers.threat import ThreatModel

quickly = settings(max_examples=12, deadline=None, derandomize=True)
FREE = ThreatModel("l2", np.inf)
length = FREE.distance
STEPS = {  # defence, x, y, eps -> images
    "fgsm": lambda m, x, y, eps: attacks.fgsm(m, x, y, ThreatModel("linf", eps)).images,
    "bim": lambda m, x, y, eps: attacks.bim(m, x, y, ThreatModel("linf", eps), steps=3).images,
    "pgd": lambda m, x, y, eps: attacks.pgd(m, x, y, ThreatModel("linf", eps), steps=6, restarts=2,
                                            losses=("cross-entropy", "margin")).images,
}
every_step = pytest.mark.parametrize("name", STEPS)
runs = pytest.mark.parametrize("compact", [False, True])


def pgd(*arguments, **options):
    return attacks.pgd(*arguments, **options).images


def bim(*arguments, **options):
    return attacks.bim(*arguments, **options).images


# ── Exact answers ──


@every_step
def test_the_whole_radius_is_used(name):
    x_adv = STEPS[name](LINEAR, X, Y % 2, 0.1)
    np.testing.assert_allclose(np.abs(x_adv - X), 0.1, atol=1e-6)


def test_other_bounds_are_respected():
    x, threat = 2 * X - 1, ThreatModel("linf", 1.9, (-1, 1))
    assert attacks.fgsm(LINEAR, x, Y % 2, threat).images.min() == -1
    assert bim(LINEAR, x, Y % 2, threat).max() == 1
    assert pgd(LINEAR, x, Y % 2, threat, steps=5).min() == -1


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("attack", [
    attacks.fgsm,
    attacks.bim,
    lambda m, x, y, threat: attacks.pgd(m, x, y, threat, steps=10),
    lambda m, x, y, threat: attacks.pgd(m, x, y, threat, steps=10, losses=("margin",)),
], ids=["fgsm", "bim", "pgd", "pgd-margin"])
def test_linf_attacks_reach_the_optimum_of_a_linear_model(attack, label):
    y = np.full(N, label)
    found = attack(LINEAR, X, y, ThreatModel("linf", 0.1))
    np.testing.assert_allclose(found.value - margins(LINEAR, X, y), 0.1 * np.abs(W).sum(), rtol=1e-4)
    np.testing.assert_allclose(found.value, margins(LINEAR, found.images, y), rtol=1e-5)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_l2_pgd_reaches_the_optimum_of_a_linear_model(loss, label):
    y, threat = np.full(N, label), ThreatModel("l2", 0.3)
    optimum = margins(LINEAR, X, y) + 0.3 * np.linalg.norm(W)
    found = attacks.pgd(LINEAR, X, y, threat, steps=20, step_size=0.3, losses=(loss,))
    np.testing.assert_allclose(found.value, optimum, rtol=1e-5)
    # The usual step, 2.5 * eps / steps, has no time to turn a random start all the way round the sphere.
    usual = attacks.pgd(LINEAR, X, y, threat, steps=20, losses=(loss,)).value
    assert (usual <= optimum + 1e-5).all() and (usual >= optimum - 0.05 * 0.3 * np.linalg.norm(W)).all()


@every_step
def test_the_optimum_at_the_bounds_is_the_clipped_one(name):
    x, y = rng_images(N), np.zeros(N, int)
    best = np.clip(x + np.float32(0.4) * np.sign(W).reshape(SHAPE), 0, 1)
    np.testing.assert_allclose(STEPS[name](LINEAR, x, y, 0.4), best, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_bim_follows_its_equation(targeted):
    """In NumPy and float64: the gradient of cross-entropy on a linear network is W (p - one-hot)."""
    x = X.astype("float64").reshape(N, 16)
    moved = x.copy()
    for _ in range(6):
        p = np.exp(moved @ MANY)
        gradient = (p / p.sum(axis=1, keepdims=True) - np.eye(3)[Y]) @ MANY.T.astype("float64")
        moved = np.clip(moved + (-1 if targeted else 1) * 0.04 * np.sign(gradient), x - 0.1, x + 0.1).clip(0, 1)
    labels = {"y": (Y + 1) % 3, "target": Y} if targeted else {"y": Y}
    x_adv = bim(three_classes, X, threat=ThreatModel("linf", 0.1), steps=6, step_size=0.04, **labels)
    np.testing.assert_allclose(x_adv.reshape(N, 16), moved, atol=1e-6)


def test_fgsm_is_one_step_of_bim():
    threat = ThreatModel("linf", 0.1)
    np.testing.assert_array_equal(attacks.fgsm(NET, X, Y, threat).images,
                                  bim(NET, X, Y, threat, steps=1, step_size=0.1))


def test_bim_divides_the_radius_among_its_steps():
    threat = ThreatModel("linf", 0.2)
    np.testing.assert_array_equal(bim(NET, X, Y, threat), bim(NET, X, Y, threat, steps=10, step_size=0.02))


def test_an_l2_step_follows_the_normalised_gradient():
    y, threat = np.zeros(N, int), ThreatModel("l2", 0.2)
    step = 0.2 * (W / np.linalg.norm(W)).reshape(SHAPE)
    np.testing.assert_allclose(attacks.fgsm(LINEAR, X, y, threat).images, X + step, atol=1e-6)


# ── The untargeted attack leaves the label, the targeted one reaches it ──


def test_pgd_leaves_the_label_and_gets_worse_with_the_radius():
    y = logits(NET, X).argmax(axis=1)
    assert correct(NET, X, y).all()
    for norm, eps in (("linf", 0.3), ("l2", 1.2)):
        beaten = [attacks.pgd(NET, X, y, ThreatModel(norm, e), steps=20).value > 0 for e in (eps / 9, eps)]
        assert beaten[0].sum() < beaten[1].sum() == N


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_a_targeted_attack_reaches_its_target(loss):
    y, threat = logits(three_classes, X).argmax(axis=1), ThreatModel("linf", 0.3)
    target = (y + 1) % 3
    for compact in (False, True):
        found = attacks.pgd(three_classes, X, y, threat, compact=compact, steps=30, losses=(loss,), target=target)
        assert correct(three_classes, found.images, target).all() and (found.value > 0).all()
    assert correct(three_classes, bim(three_classes, X, y, threat, target=target), target).all()
    towards = attacks.fgsm(three_classes, X, y, ThreatModel("linf", 0.05), target=target).images
    assert (losses.cross_entropy(logits(three_classes, towards), target)
            < losses.cross_entropy(logits(three_classes, X), target)).numpy().all()


def test_a_loss_of_ones_own_is_ascended():
    def doubled(outputs, y):
        return 2 * losses.margin(outputs.logits, y)

    threat = ThreatModel("l2", 0.2)
    own, named = (pgd(NET, X, Y, threat, steps=5, losses=(loss,)) for loss in (doubled, "margin"))
    np.testing.assert_allclose(own, named, atol=1e-6)
    x_adv = pgd(NET, X, Y, threat, steps=5, losses=(lambda z, y: -doubled(z, y),), start=X)
    np.testing.assert_array_equal(x_adv, X)  # it goes the wrong way, and the best iterate is the first


# ── What is deployed, and what is differentiated ──


@runs
def test_images_found_on_another_network_are_tried_on_what_is_deployed(compact):
    """Transfer: nothing of what is deployed is differentiated, and it alone says what has won."""
    y, threat = logits(NET, X).argmax(axis=1), ThreatModel("l2", 1.2)

    @steady
    def masked(x):
        return NET(tf.stop_gradient(x), training=False)

    blind = attacks.pgd(masked, X, y, threat, steps=20, start=X, compact=compact)
    assert (blind.value <= 0).all()
    moved = attacks.pgd(masked, X, y, threat, steps=20, path=NET, compact=compact)
    assert (moved.value > 0).all()
    np.testing.assert_allclose(moved.value, margins(masked, moved.images, y), atol=1e-5)


@runs
def test_what_wins_on_the_path_alone_is_no_win(compact):
    hard, y = linear(bias=-50.0), np.zeros(N, int)
    found = attacks.pgd(hard, X, y, ThreatModel("linf", 0.1), steps=7, path=linear(-W, 50.0), compact=compact)
    np.testing.assert_allclose(found.value, margins(hard, found.images, y), rtol=1e-5)
    assert (found.value < 0).all() and (found.value >= margins(hard, X, y) - 1e-4).all()


@runs
def test_the_best_of_every_fifth_image_is_kept_however_the_path_goes_on(compact):
    """The path leads over the hill of what is deployed and down again: there the last iterate is a poor one."""
    x, y, threat = np.full((2, *SHAPE), 0.5, "float32"), np.zeros(2, int), ThreatModel("linf", 0.2)
    options = {"steps": 20, "step_size": 0.01, "start": x, "compact": compact}
    found = attacks.pgd(hill, x, y, threat, path=linear(np.ones(16, "float32")), **options)
    np.testing.assert_allclose(found.images, 0.55, atol=1e-6)
    assert (found.steps == 20).all()


# ── Best iterate, restarts, steps, compaction ──


@runs
def test_the_best_iterate_is_reported_not_the_last(compact):
    """Steps of 0.06 from 0.5 go 0.56, 0.5, 0.56 ...: the last of an even number of steps is the worse one."""
    x, y, threat = np.full((2, *SHAPE), 0.5, "float32"), np.zeros(2, int), ThreatModel("linf", 0.2)
    options = {"steps": 4, "step_size": 0.06, "start": x, "compact": compact}
    np.testing.assert_allclose(pgd(hill, x, y, threat, **options), 0.56, atol=1e-6)
    last = bim(hill, x, y, threat, steps=4, step_size=0.06)
    np.testing.assert_allclose(last, 0.5, atol=1e-6)  # BIM reports the last one, as published


@runs
def test_a_goal_of_ones_own_decides_which_iterate_is_kept(compact):
    """From a start without noise PGD walks along BIM's path; here the iterate with a margin nearest to 3 is wanted."""

    def nearest(outputs, y):
        return -tf.abs(losses.margin(outputs.logits, y) - 3)

    walk, threat = {"steps": 7, "step_size": 0.02}, ThreatModel("linf", 0.3)
    path = np.stack([X, *(bim(three_classes, X, Y, threat, **walk | {"steps": s}) for s in range(1, 8))])
    wanted = np.argmin([np.abs(margins(three_classes, x, Y) - 3) for x in path], axis=0)
    found = attacks.pgd(three_classes, X, Y, threat, goal=nearest, **walk, start=X, compact=compact)
    np.testing.assert_allclose(found.images, path[wanted, np.arange(N)], atol=1e-6)
    np.testing.assert_allclose(found.value, -np.abs(margins(three_classes, found.images, Y) - 3), atol=1e-5)
    assert len(set(wanted)) > 2  # neither always the first nor always the last


@pytest.mark.parametrize("targeted", [False, True])
def test_the_usual_goal_is_to_evade_or_to_reach_the_target(targeted):
    options = {"steps": 6, "restarts": 2} | ({"target": (Y + 1) % 3} if targeted else {})
    usual = attacks.pgd(three_classes, X, Y, ThreatModel("l2", 0.5), **options)
    goal = losses.reached if targeted else losses.evasion
    same = attacks.pgd(three_classes, X, Y, ThreatModel("l2", 0.5), goal=goal, **options)
    for one, other in zip(usual, same, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_image_itself_is_one_of_the_iterates():
    """A step far too long makes things worse than no attack: then the image as it was is the best."""
    x, y = np.full((2, *SHAPE), 0.54, "float32"), np.zeros(2, int)
    for norm in ("linf", "l2"):
        found = attacks.pgd(hill, x, y, ThreatModel(norm, 0.4), steps=1, step_size=0.4)
        assert (found.value >= margins(hill, x, y)).all()


@quickly
@given(st.integers(0, 999), st.sampled_from([("linf", 0.08), ("l2", 0.3)]), st.booleans())
def test_more_restarts_and_more_steps_are_never_worse(seed, ball, targeted):
    x, y, threat = rng_images(8, seed), np.arange(8) % 3, ThreatModel(*ball)
    options = {"step_size": ball[1], "seed": seed} | ({"target": (y + 1) % 3} if targeted else {})
    few, restarts, steps = (attacks.pgd(NET, x, y, threat, **more, **options).value for more in (
        {"steps": 3}, {"steps": 3, "restarts": 3}, {"steps": 8}))
    assert (restarts >= few - 1e-5).all() and (steps >= few - 1e-5).all()
    clean = -margins(NET, x, (y + 1) % 3) if targeted else margins(NET, x, y)
    assert (few >= clean - 1e-5).all()


@quickly
@given(st.integers(0, 999), st.sampled_from([("linf", 0.05), ("l2", 0.25)]), st.booleans())
def test_compaction_beats_the_same_images(seed, ball, targeted):
    x, y = rng_images(20, seed), np.arange(20) % 3
    options = {"steps": 12, "restarts": 2, "losses": ("cross-entropy", "margin"), "seed": seed, "batch_size": 7}
    options |= {"target": (y + 1) % 3} if targeted else {}
    whole, compact = (attacks.pgd(NET, x, y, ThreatModel(*ball), compact=c, **options) for c in (False, True))
    np.testing.assert_array_equal(whole.value > 0, compact.value > 0)
    standing = whole.left()
    np.testing.assert_allclose(compact.images[standing], whole.images[standing], atol=1e-6)
    assert (compact.steps <= whole.steps).all() and (compact.steps == whole.steps)[standing].all()


def test_every_restart_begins_elsewhere():
    hard, y = linear(bias=-9.0), np.zeros(N, int)
    options = {"threat": ThreatModel("linf", 0.1), "steps": 1, "step_size": 1e-3}
    one, four = (attacks.pgd(hard, X, y, restarts=n, **options).value for n in (1, 4))
    assert (four > one + 1e-4).mean() > 0.5


def test_compaction_is_tested_on_images_of_both_kinds():
    x, y = rng_images(20, 0), np.arange(20) % 3
    for norm, eps in (("linf", 0.05), ("l2", 0.25)):
        beaten = attacks.pgd(NET, x, y, ThreatModel(norm, eps), steps=12).value > 0
        clean = ~correct(NET, x, y)
        assert clean.sum() < beaten.sum() < len(x)


@pytest.mark.parametrize("attack", [
    lambda **o: attacks.fgsm(NET, X, Y, ThreatModel("linf", 0.1), **o),
    lambda **o: attacks.bim(NET, X, Y, ThreatModel("linf", 0.1), **o),
    lambda **o: attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), steps=5, **o),
    lambda **o: attacks.pgd(NET, X, Y, ThreatModel("l2", 0.5), steps=5, **o),
], ids=["fgsm", "bim", "pgd-linf", "pgd-l2"])
def test_the_batch_size_does_not_matter(attack):
    np.testing.assert_allclose(attack(batch_size=5).images, attack().images, atol=1e-5)


def test_a_warm_start_is_projected_and_used():
    threat, far, y = ThreatModel("linf", 0.05), np.clip(X + 0.5, 0, 1), np.zeros(N, int)
    found = attacks.pgd(LINEAR, X, y, threat, steps=1, step_size=1e-6, start=far)
    np.testing.assert_allclose(found.value - margins(LINEAR, X, y), max(0, 0.05 * W.sum()), atol=1e-4)
    assert threat.contains(found.images, X).all()


def test_another_seed_starts_elsewhere():
    for norm in ("linf", "l2"):
        one, two = (pgd(NET, X, Y, ThreatModel(norm, 0.2), steps=1, step_size=1e-3, seed=s) for s in (0, 1))
        assert not np.array_equal(one, two)


# ── Gradients that are hard to follow ──


def test_a_gradient_that_is_not_finite_is_an_error():
    x = X.copy()
    x[:, 0, 0] = 0.5  # where the derivative of the root is infinite
    cusps = lambda x: tf.reduce_sum(tf.sqrt(tf.abs(x - 0.5)), axis=(1, 2)) * [1.0, -1.0]  # noqa: E731
    for model in (cusps, steady(lambda x: cusps(x))):
        for attack in (lambda m: attacks.fgsm(m, x, Y % 2, ThreatModel("linf", 0.1)),
                       lambda m: attacks.pgd(m, x, Y % 2, ThreatModel("l2", 0.1), steps=3, start=x),
                       lambda m: attacks.ddn(m, x, Y % 2, FREE, steps=3)):
            with pytest.raises(FloatingPointError, match="gradient is not finite"):
                attack(model)


def test_l2_steps_keep_their_length_on_a_confident_network():
    """The gradients are about 1e-27: their squares underflow in float32, their signs do not."""
    confident, y = linear(w=8 * W, bias=-90.0), np.zeros(N, int)
    assert margins(confident, X, y).max() < -60
    x_adv = pgd(confident, X, y, ThreatModel("l2", 0.2), steps=1, step_size=0.2, start=X)
    np.testing.assert_allclose(length(x_adv, X), 0.2, rtol=1e-3)


def test_one_graph_serves_every_radius_and_number_of_steps():
    traces = []

    @steady
    def model(x):
        traces.append(x.shape)
        return LINEAR(x)

    def run(n, eps, steps, step_size):
        attacks.pgd(model, X[:n], Y[:n] % 2, ThreatModel("linf", eps), steps=steps, step_size=step_size)

    run(12, 0.1, 3, 0.01)
    run(11, 0.1, 3, 0.01)
    before = len(traces)
    for n, eps, steps, step_size in ((12, 0.2, 5, 0.3), (7, 0.05, 8, None), (9, np.float64(0.3), np.int64(2), 0.02)):
        run(n, eps, steps, step_size)
    assert len(traces) == before


# ── L-BFGS ──


def test_lbfgs_finds_nearly_the_smallest_change_on_a_linear_model():
    bias = -float(np.median(margins(LINEAR, X, np.zeros(N, int))))
    model, x = linear(bias=bias), X[:4]
    z = logits(model, x)
    y = z.argmax(axis=1)
    smallest = np.abs(z[:, 1] - z[:, 0]) / np.linalg.norm(W)  # the distance of a point from a plane
    found = attacks.lbfgs(model, x, y, FREE, target=1 - y, searches=10, max_iterations=20)
    assert correct(model, found.images, 1 - y).all() and (found.value > 0).all()
    change = length(found.images, x)
    assert (change >= smallest - 1e-5).all()
    np.testing.assert_allclose(change, smallest, rtol=0.05, atol=2e-3)
    eps = float(np.median(change))
    within = attacks.lbfgs(model, x, y, ThreatModel("l2", eps), target=1 - y, searches=10, max_iterations=20)
    np.testing.assert_array_equal(within.value > 0, change < eps)
    np.testing.assert_array_equal(within.images[change >= eps], x[change >= eps])


def test_lbfgs_stays_within_the_pixels():
    x = np.concatenate([np.zeros((1, *SHAPE)), np.ones((1, *SHAPE))]).astype("float32")
    model = linear(w=np.ones(16, "float32"), bias=-8.0)
    target = np.array([1, 0])
    x_adv = attacks.lbfgs(model, x, 1 - target, FREE, target=target, searches=4, max_iterations=20).images
    assert x_adv.dtype == np.float32 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert correct(model, x_adv, target).all()


def test_lbfgs_returns_what_it_cannot_move():
    model = linear(bias=-100.0)  # no valid image has label 1
    target = np.array([1, 0, 1])
    found = attacks.lbfgs(model, X[:3], 1 - target, FREE, target=target, searches=3)
    np.testing.assert_array_equal(found.images[[0, 2]], X[[0, 2]])
    np.testing.assert_allclose(found.images[1], X[1], atol=1e-3)  # the target already: next to no change
    np.testing.assert_array_equal(found.value > 0, [False, True, False])


def test_lbfgs_repeats_and_takes_smaller_changes_with_more_searches():
    x, y = X[:2], logits(NET, X[:2]).argmax(axis=1)
    few, many, again = (attacks.lbfgs(NET, x, y, FREE, target=(y + 1) % 3, searches=n, max_iterations=8)
                        for n in (2, 5, 5))
    np.testing.assert_array_equal(many.images, again.images)
    reached = few.value > 0
    assert reached.any() and (many.value > 0)[reached].all() and (many.steps > few.steps).all()
    assert (length(many.images, x) <= length(few.images, x) + 1e-5)[reached].all()


# ── Bad options ──


@pytest.mark.parametrize("attack", [attacks.bim, attacks.pgd])
@pytest.mark.parametrize("name", ["steps", "step_size", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_steps_and_sizes_are_positive(attack, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        attack(NET, X, Y, ThreatModel("linf", 0.1), **{name: value})


@pytest.mark.parametrize(("options", "message"), [
    ({"restarts": 0}, "restarts is 0"),
    ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
    ({"losses": "margin"}, "losses is 'margin'"),
    ({"losses": ("hinge",)}, "hinge"),
    ({"losses": ()}, r"losses is \(\)"),
    ({"path": "BPDA"}, "path: unknown 'BPDA', expected one of exact"),
    ({"path": "exacd"}, "path: unknown 'exacd', did you mean 'exact'"),
])
def test_pgd_names_its_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        attacks.pgd(NET, X, Y, ThreatModel("linf", 0.1), **options)


def test_the_other_attacks_name_their_bad_options():
    other = (Y + 1) % 3
    with pytest.raises(ValueError, match="searches is 0"):
        attacks.lbfgs(NET, X, Y, FREE, target=other, searches=0)
    for weights in [(1e3, 1e-3), (0, 1), (1, 1), (1, np.inf), (np.nan, 1)]:
        with pytest.raises(ValueError, match="weights are .*; expected 0 < low < high"):
            attacks.lbfgs(NET, X, Y, FREE, target=other, weights=weights)
    for gamma in (0, 1, 1.5, np.nan):
        with pytest.raises(ValueError, match=f"gamma is {gamma}; expected a number above 0 and below 1"):
            attacks.ddn(NET, X, Y, FREE, gamma=gamma)
    with pytest.raises(ValueError, match="step_size is 0"):
        attacks.normalised(NET, X, Y, FREE, target=other, step_size=0)
    with pytest.raises(ValueError, match="losses is .'logits'.; expected .* 'logit'"):
        attacks.normalised(NET, X, Y, FREE, target=other, loss="logits")
    for attack in (attacks.ddn, attacks.lbfgs, attacks.normalised):
        with pytest.raises(ValueError, match="threat has the norm 'linf'; expected 'l2'"):
            attack(NET, X, Y, ThreatModel("linf", 0.1), target=other)


# ── Normalised steps towards a target (paper 03) ──


def test_normalised_takes_as_many_steps_as_a_linear_model_needs():
    """Two classes: every step of length s gains s |w| of the margin; the first iterate beyond zero is reported."""
    near = linear(bias=-float(np.median(X.reshape(N, -1) @ W)))  # the border runs through the images: no bound is met
    y = near(X).numpy().argmax(axis=1)
    found = attacks.normalised(near, X, y, FREE, target=1 - y, step_size=0.02)
    needed = np.ceil(-margins(near, X, y) / (0.02 * np.linalg.norm(W))).astype(int)
    np.testing.assert_array_equal(found.steps, needed)
    np.testing.assert_allclose(length(found.images, X), 0.02 * needed, rtol=1e-4)
    assert len(set(needed)) > 1 and correct(near, found.images, 1 - y).all()


@pytest.mark.parametrize("loss", ["cross-entropy", "logit", "margin"])
@pytest.mark.parametrize("batch_size", [5, 100])
def test_normalised_reaches_its_target_within_the_bounds(loss, batch_size):
    y = logits(NET, X).argmax(axis=1)
    target = (y + 1) % 3
    found = attacks.normalised(NET, X, y, FREE, target=target, loss=loss, step_size=0.05, steps=200,
                               batch_size=batch_size)
    x_adv, taken = found.images, found.steps
    np.testing.assert_array_equal(correct(NET, x_adv, target), taken <= 200)
    np.testing.assert_array_equal(found.value > 0, taken <= 200)
    assert (taken <= 200).mean() > 0.8 and (taken > 0).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (length(x_adv, X) <= 0.05 * np.minimum(taken, 200) + 1e-5).all()


def test_normalised_says_where_it_failed_and_leaves_alone_what_is_done():
    far, none, one = linear(bias=-90.0), np.zeros(N, int), np.ones(N, int)
    failed = attacks.normalised(far, X, none, FREE, target=one, steps=3)
    np.testing.assert_array_equal(failed.steps, 4)
    done = attacks.normalised(far, X, one, FREE, target=none)
    np.testing.assert_array_equal(done.images, X)
    assert not done.steps.any() and (done.value > 0).all()


def test_normalised_goes_on_to_a_goal_of_ones_own():
    def sure(outputs, target):
        return tf.gather(tf.nn.softmax(outputs.logits), target, batch_dims=1) - 0.9

    y = logits(three_classes, X).argmax(axis=1)
    options = {"target": (y + 1) % 3, "step_size": 0.05, "steps": 300}
    at_border = attacks.normalised(three_classes, X, y, FREE, **options)
    far = attacks.normalised(three_classes, X, y, FREE, goal=sure, **options)
    done = far.steps <= 300
    assert done.any() and (far.steps >= at_border.steps).all() and (far.steps > at_border.steps).any()
    p = tf.nn.softmax(logits(three_classes, far.images)).numpy()[np.arange(N), options["target"]]
    assert (p[done] >= 0.9).all()
    onwards = attacks.normalised(three_classes, at_border.images, y, FREE, goal=sure, **options)
    np.testing.assert_array_equal((at_border.steps + onwards.steps)[done], far.steps[done])  # to go on is the same path
    np.testing.assert_allclose(onwards.images[done], far.images[done], atol=1e-5)


# ── Smallest changes ──


def test_ddn_finds_the_smallest_change_of_a_linear_model():
    y = LINEAR(X).numpy().argmax(axis=1)
    exact = np.abs(margins(LINEAR, X, y)) / np.linalg.norm(W)
    found = attacks.ddn(LINEAR, X, y, FREE, steps=200)
    change = length(found.images, X)
    assert not correct(LINEAR, found.images, y).any() and (found.value > 0).all()
    assert (change >= exact - 1e-5).all() and (change <= 1.05 * exact + 1e-3).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn_beats_what_pgd_beats_and_no_less(targeted):
    y = logits(NET, X).argmax(axis=1)
    options = {"target": (y + 1) % 3} if targeted else {}
    found = attacks.ddn(NET, X, y, FREE, steps=150, batch_size=5, **options)
    change = length(found.images, X)
    wanted = correct(NET, found.images, options["target"]) if targeted else ~correct(NET, found.images, y)
    assert wanted.all() and found.images.min() >= 0 and found.images.max() <= 1
    for eps in np.quantile(change, [0.25, 0.75]):
        strong = attacks.pgd(NET, X, y, ThreatModel("l2", eps), steps=100, restarts=3, **options)
        assert abs((change <= eps).mean() - (strong.value > 0).mean()) <= 2 / N


def test_ddn_keeps_within_a_limit():
    y = LINEAR(X).numpy().argmax(axis=1)
    exact = np.abs(margins(LINEAR, X, y)) / np.linalg.norm(W)
    threat = ThreatModel("l2", float(np.median(exact)))
    found = attacks.ddn(LINEAR, X, y, threat, steps=40)
    np.testing.assert_array_equal(found.value > 0, exact < threat.eps)
    assert threat.contains(found.images, X).all()
    np.testing.assert_array_equal(found.images[found.left()], X[found.left()])


def test_ddn_leaves_alone_what_is_wrong_already_and_what_it_cannot_beat():
    y = logits(NET, X).argmax(axis=1)
    np.testing.assert_array_equal(attacks.ddn(NET, X, (y + 1) % 3, FREE, steps=10).images, X)
    np.testing.assert_array_equal(attacks.ddn(linear(bias=-90.0), X, np.zeros(N, int), FREE, steps=10).images, X)


def test_ddn_reaches_images_far_outside_its_first_radius():
    y, far = LINEAR(X).numpy().argmax(axis=1), 1e-3 * 1.05**10  # no first run comes further than this
    x_adv = attacks.ddn(LINEAR, X, y, FREE, steps=10, radius=1e-3).images
    exact = np.abs(margins(LINEAR, X, y)) / np.linalg.norm(W)
    assert (exact > far).any() and not correct(LINEAR, x_adv, y).any()


def test_more_steps_of_ddn_are_not_worse_and_batches_do_not_matter():
    y = logits(NET, X).argmax(axis=1)
    few, many = (length(attacks.ddn(NET, X, y, FREE, steps=n).images, X).mean() for n in (25, 200))
    assert 0 < many <= few + 1e-4
    small, whole = (attacks.ddn(NET, X, y, FREE, steps=20, batch_size=b).images for b in (5, 100))
    np.testing.assert_allclose(small, whole, atol=1e-4)
