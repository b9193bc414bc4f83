"""Measuring: outcomes and curves against exact answers, and sanity checks that fail where an evaluation is unsound."""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from helpers import attacks, evaluation, flags, models, standard
from helpers.defence import Behind, Network, Outputs, Path
from helpers.losses import cross_entropy, evasion, margin
from helpers.search import Found
from helpers.threat import ThreatModel
from helpers.training import fit

SHAPE = (6, 6, 1)


def toy(n, seed=0):
    """Images of two classes: the upper or the lower half is lighter, under noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.uniform(0, 0.8, (n, *SHAPE))
    x[y == 0, :3] += 0.2
    x[y == 1, 3:] += 0.2
    return x.astype("float32"), y


X, Y = toy(60, seed=1)
W = np.random.default_rng(0).choice([-1, 1], 36).astype("float32") * np.linspace(0.2, 1, 36, dtype="float32")


def linear(x):
    """Two logits whose difference, the second minus the first, is w . (x - 0.5)."""
    difference = tf.reshape(x - 0.5, (-1, 36)) @ tf.constant(W)[:, None]
    return tf.concat([-difference / 2, difference / 2], axis=1)


@pytest.fixture(scope="module")
def network():
    """A sound network, trained on the toy images."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D(), layers.BatchNormalization(),
        layers.Flatten(), layers.Dropout(0.2), layers.Dense(16, activation="relu"), layers.Dense(2),
    ])
    fit(model, *toy(400), epochs=12, batch_size=50, learning_rate=5e-3)
    return model


class Cautious:
    """A reader's own defence: it refuses where its network's logits differ by less than `least`."""

    randomised = False

    def __init__(self, network, least):
        self.network, self.least = Network(network), least

    def __call__(self, x):
        logits = self.network(x).logits
        return Outputs(logits, self.least - (tf.reduce_max(logits, axis=1) - tf.reduce_min(logits, axis=1)))

    def paths(self, seed=0):
        return {"unaware": Path(self.network), "exact": Path(self)}


# ── Networks whose gradients mislead ──


@keras.saving.register_keras_serializable("test")
class Mask(layers.Layer):
    """Pass the images on, with the gradient that `kind` says."""

    def __init__(self, kind, **options):
        super().__init__(**options)
        self.kind = kind

    def get_config(self):
        return super().get_config() | {"kind": self.kind}

    def late(self, x):
        """1 but for the first images of a batch, which is all that a look at the door sees."""
        return tf.reshape(tf.cast(tf.range(tf.shape(x)[0]) > 10, x.dtype), (-1, 1, 1, 1))

    def call(self, x):
        upper = tf.cast(tf.range(6) < 3, x.dtype)[None, :, None, None]
        return {
            "none": lambda: x,
            "stopped": lambda: tf.stop_gradient(x),
            "rounded": lambda: tf.round(8 * x) / 8,
            "half stopped": lambda: x * upper + tf.stop_gradient(x * (1 - upper)),
            "doubled": lambda: with_gradient(x, lambda upstream: 2 * upstream),
            "reversed": lambda: with_gradient(x, lambda upstream: -upstream),
            "zero": lambda: with_gradient(x, lambda upstream: 0 * upstream),
            "rippled": lambda: x + 0.02 * tf.sin(3000 * x),
            "ragged": lambda: x + 1e-7 * tf.abs(tf.math.floormod(1e7 * x, 1.0) - 0.5),
            "noisy": lambda: x + self.late(x) * tf.random.normal(tf.shape(x), stddev=0.1, dtype=x.dtype),
        }[self.kind]()


def with_gradient(x, gradient):
    return tf.custom_gradient(lambda x: (tf.identity(x), gradient))(x)


def masked(network, kind):
    if kind == "loud":
        return keras.Sequential([layers.Input(SHAPE), *network.layers, layers.Rescaling(1000.0)])
    return keras.Sequential([layers.Input(SHAPE), Mask(kind), *network.layers])


# ── Logits, outcomes, accuracy, score ──


def test_batches_give_the_logits_of_one_batch(network):
    whole = evaluation.logits(network, X)
    assert whole.shape == (60, 2) and whole.dtype == np.float32
    for batch_size in (1, 7, 60, 1000):
        np.testing.assert_allclose(evaluation.logits(network, X, batch_size), whole, atol=1e-5)
    np.testing.assert_allclose(whole, network(X, training=False), atol=1e-5)


def test_logits_are_those_of_test_mode(network):
    before = [variable.numpy() for variable in network.variables]
    np.testing.assert_array_equal(evaluation.logits(network, X), evaluation.logits(network, X))
    assert all(np.array_equal(was, variable.numpy()) for was, variable in zip(before, network.variables, strict=True))


def test_accuracy_and_loss_agree_with_numpy(network):
    for model in (network, linear):
        z = evaluation.logits(model, X).astype("float64")
        hits = z.argmax(axis=1) == Y
        losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(60), Y]
        np.testing.assert_array_equal(evaluation.correct(model, X, Y), hits)
        measured = evaluation.score(model, X, Y)
        assert measured == {"loss": pytest.approx(losses.mean(), rel=1e-5), "accuracy": pytest.approx(hits.mean())}
        assert {type(value) for value in measured.values()} == {float}


def test_outcomes_are_right_refused_or_evaded_and_a_refused_image_is_neither(network):
    z = evaluation.logits(network, X)
    wrong, apart = np.where(np.arange(60) % 3 == 0, 1 - Y, Y), np.abs(z[:, 0] - z[:, 1])
    least = float(np.median(apart))
    found = evaluation.outcomes(Cautious(network, least), X, wrong)
    np.testing.assert_array_equal(found, np.where(apart < least, 1, np.where(z.argmax(axis=1) == wrong, 0, 2)))
    assert evaluation.rates(found) == {name: np.mean(found == i) for i, name in enumerate(evaluation.OUTCOMES)}
    assert min(evaluation.rates(found).values()) > 0
    np.testing.assert_array_equal(evaluation.correct(Cautious(network, least), X, wrong), found == 0)
    assert not (evaluation.outcomes(network, X, wrong) == 1).any()


@pytest.mark.parametrize("measure", [evaluation.correct, evaluation.score, evaluation.outcomes,
                                     lambda network, *data: evaluation.survivors(network, [0, 0.1], *data)],
                         ids=["correct", "score", "outcomes", "survivors"])
@pytest.mark.parametrize(("x", "y", "error", "message"), [
    (255 * X, Y, ValueError, "expected pixels in"),
    (X.astype("float64"), Y, TypeError, "x is float64"),
    (X[..., 0], Y, TypeError, "of shape"),
    (X[:0], Y[:0], ValueError, "x is empty"),
    (X, Y[:, None], TypeError, "60 integer labels"),  # would compare every image with every label
    (X, Y[:-1], TypeError, "60 integer labels"),
    (X, Y + 1, ValueError, r"labels in 0\.\.\.1"),
    (X, Y.astype(float), TypeError, "integer labels"),
])
def test_bad_input_is_refused(network, measure, x, y, error, message):
    with pytest.raises(error, match=message):
        measure(network, x, y)


def test_probabilities_are_refused(network):
    for measure in (evaluation.correct, evaluation.score):
        with pytest.raises(ValueError, match="drop its softmax"):
            measure(keras.Sequential([network, layers.Softmax()]), X, Y)


# ── The security curve ──


def test_the_curve_of_a_linear_model_is_exact():
    """Far from the bounds an image stands at eps as long as its margin is larger than eps * sum |w|."""
    x = (0.5 + 0.3 * (toy(60, seed=2)[0] - 0.5)).astype("float32")
    y = evaluation.logits(linear, x).argmax(axis=1)
    room = -margin(evaluation.logits(linear, x), y).numpy()
    grid = np.quantile(room, [0.2, 0.5, 0.8]) / np.abs(W).sum() + 1e-5
    curve = evaluation.survivors(linear, [0, *grid], x, y, steps=10)
    for row, eps in zip(curve, [0, *grid], strict=True):
        np.testing.assert_array_equal(row, room > eps * np.abs(W).sum())
    grid = np.quantile(room, [0.2, 0.5, 0.8]) / np.linalg.norm(W) + 1e-4
    curve = evaluation.survivors(linear, grid, x, y, norm="l2", steps=20, step_size=0.2)
    for row, eps in zip(curve, grid, strict=True):
        np.testing.assert_array_equal(row, room > eps * np.linalg.norm(W))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_curve_never_rises(network, norm):
    grid = np.array([0, 0.02, 0.05, 0.1, 0.2, 0.4]) * (1 if norm == "linf" else 4)
    curve = evaluation.survivors(network, grid, X, Y, norm=norm, steps=8)
    assert curve.shape == (6, 60) and curve.dtype == bool
    assert (np.diff(curve.astype(int), axis=0) <= 0).all()
    np.testing.assert_array_equal(curve[0], evaluation.correct(network, X, Y))
    assert curve[0].mean() > 0.9 and 0 < curve[1:].mean() < 1 and not curve[-1].any()
    np.testing.assert_array_equal(curve, evaluation.survivors(network, grid, X, Y, norm=norm, steps=8))


def test_a_curve_is_no_weaker_than_single_attacks(network):
    grid = [0.02, 0.05, 0.1]
    curve = evaluation.survivors(network, grid, X, Y, steps=20)
    for row, eps in zip(curve, grid, strict=True):
        alone = evaluation.correct(network, attacks.pgd(network, X, Y, ThreatModel("linf", eps), steps=20).images, Y)
        assert row.mean() <= alone.mean() + 0.05


def recorded(calls):
    """PGD that takes down what it is called with, and what it finds."""
    def pgd(defence, x, y, threat, **options):
        calls.append((threat.eps, x, y, options, attacks.pgd(defence, x, y, threat, **options)))
        return calls[-1][-1]

    return pgd


def test_a_curve_attacks_what_stands_from_where_the_last_radius_ended(network):
    calls = []
    curve = evaluation.survivors(network, [0, 0.02, 0.05, 0.1], X, Y, attack=recorded(calls), steps=5)
    assert [eps for eps, *_ in calls] == [0.02, 0.05, 0.1]
    assert [len(x) for _, x, *_ in calls] == curve[:-1].sum(axis=1).tolist()
    starts = [options["start"] for *_, options, _ in calls]
    assert starts[0] is None  # nothing to go on from yet: a random start
    for (*_, found), start, row, before in zip(calls, starts[1:], curve[1:], curve, strict=False):
        np.testing.assert_array_equal(start, found.images[row[before]])


def test_a_curve_passes_its_options_on(network):
    weak, strong = (evaluation.survivors(network, [0.05], X, Y, **options)[0].mean() for options in (
        {"steps": 1, "step_size": 1e-6}, {"steps": 10, "restarts": 2, "losses": ("margin",)}))
    assert strong < weak
    with pytest.raises(ValueError, match="steps is 0"):
        evaluation.survivors(network, [0.05], X, Y, steps=0)
    with pytest.raises(ValueError, match="norm is 'l1'"):
        evaluation.survivors(network, [0.05], X, Y, norm="l1")
    with pytest.raises(ValueError, match="path: unknown 'exakt', did you mean 'exact'"):
        evaluation.survivors(network, [0.05], X, Y, path="exakt")


def test_a_refused_image_survives_on_any_path(network):
    """Behind a rounding without a gradient, attacked by BPDA: evaded alone is lost."""
    grid, calls, apart = [0, 0.02, 0.05, 0.1], [], np.ptp(evaluation.logits(masked(network, "rounded"), X), axis=1)
    wrong = np.where(np.arange(60) % 4 == 0, 1 - Y, Y)  # labels that are evaded, or refused, without an attack

    def curve(least, path="BPDA", **options):
        defence = Behind(Mask("rounded"), Cautious(network, least), exact=False)
        return defence, evaluation.survivors(defence, grid, X, wrong, path=path, steps=8, **options)

    assert curve(np.inf)[1].all()  # all are refused
    defence, some = curve(float(np.quantile(apart, 0.4)), attack=recorded(calls))
    np.testing.assert_array_equal(some[0], evaluation.outcomes(defence, X, wrong) != 2)
    assert (some[0] & (evaluation.outcomes(defence, X, wrong) == 1)).any()
    for (*_, y, _, found), before, row in zip(calls, some, some[1:], strict=False):
        np.testing.assert_array_equal(row[before], evaluation.outcomes(defence, found.images, y) != 2)
    none, blind = curve(-1.0)[1], curve(-1.0, path=None)[1]  # without refusal; along the gradient that is not there
    assert (none <= blind).all() and none[-1].sum() < some[-1].sum() and none[-1].sum() < blind[-1].sum()


@pytest.mark.parametrize("grid", [[], [0.1, 0.1], [0.2, 0.1], [-0.1, 0.1], [-0.2, -0.1], [0, np.nan], [np.nan],
                                  [0, np.inf]], ids=str)
def test_grids_that_do_not_rise_are_refused(grid):
    with pytest.raises(ValueError, match="grid is"):
        evaluation.survivors(linear, grid, X, Y, steps=1)


def test_a_grid_in_0_to_255_units_is_refused():
    with pytest.raises(ValueError, match="0-255 units"):
        evaluation.survivors(linear, [0, 8, 16], X, Y, steps=1)


# ── The interval of a difference ──


def test_the_interval_covers_a_known_difference():
    rng = np.random.default_rng(0)
    covered = 0
    for repeat in range(60):
        shared = rng.uniform(size=150)  # images that are hard for one defence are hard for the other
        a, b = shared < 0.8, shared + rng.normal(0, 0.1, 150) < 0.6
        mean, low, high = evaluation.difference_interval(a, b, seed=repeat)
        assert mean == pytest.approx(a.mean() - b.mean()) and low <= mean <= high
        covered += low <= 0.2 <= high
    assert 0.85 < covered / 60 <= 1


def test_the_interval_is_paired_and_repeats():
    rng = np.random.default_rng(0)
    a = rng.uniform(size=300) < 0.7
    b = a & (rng.uniform(size=300) < 0.9)
    mean, low, high = evaluation.difference_interval(a, b)
    assert 0 < low < mean < high
    assert evaluation.difference_interval(a, b) == (mean, low, high)
    shuffled = evaluation.difference_interval(a, rng.permutation(b))
    assert shuffled[2] - shuffled[1] > 1.5 * (high - low)  # pairs are worth something
    wide = evaluation.difference_interval(a, b, confidence=0.999)
    assert wide[1] < low and wide[2] > high
    assert evaluation.difference_interval(b, a)[0] == -mean
    assert evaluation.difference_interval(a, a) == (0, 0, 0)


@pytest.mark.parametrize("shapes", [(5, 1), (5, 4), ((5, 1), (5, 1))], ids=str)
def test_an_interval_needs_pairs(shapes):
    with pytest.raises(ValueError, match="expected the same images"):
        evaluation.difference_interval(*(np.ones(shape) for shape in shapes))


# ── Gradients ──


@pytest.mark.parametrize("build", [
    lambda: models.two_conv((8, 8, 1), 3), lambda: models.two_conv((8, 8, 1), 3, strided=False),
    lambda: models.deep_conv((8, 8, 1), 3),
], ids=["strided", "pooled", "deep"])
def test_the_gradients_of_the_networks_are_exact(build):
    """Also on a blank background, where max-pooling has ties and a new network's ReLUs get exactly 0."""
    x = np.zeros((20, 8, 8, 1), "float32")
    x[:, 3:5, 3:5] = np.random.default_rng(0).uniform(0, 1, (20, 2, 2, 1))
    errors, kinked = evaluation.gradient_errors(build(), x, np.arange(20) % 3)
    assert kinked.mean() <= 0.1 and errors[~kinked].max() < 1e-4


@pytest.mark.parametrize(("kind", "least"), [("doubled", 0.01), ("reversed", 0.01), ("half stopped", 0.01),
                                             ("zero", 1), ("stopped", 1)])
def test_a_wrong_gradient_is_noticed(network, kind, least):
    errors, kinked = evaluation.gradient_errors(masked(network, "none"), X, Y)
    assert kinked.mean() <= 0.1 and errors[~kinked].max() < 1e-4
    errors, kinked = evaluation.gradient_errors(masked(network, kind), X, Y)
    assert kinked.mean() <= 0.1 and errors[~kinked].max() > least


def test_the_gradient_of_a_path_is_that_of_its_own_loss(network):
    """Of a refusing defence the loss is capped by the refusal; a path with a loss of its own is checked by that."""
    def doubled(outputs, y):
        return with_gradient(margin(outputs.logits, y), lambda upstream: 2 * upstream)

    for loss, wrong in (((), False), ((evasion,), False), ((doubled,), True)):
        rows = evaluation.gradient_flags(network, X, Y, Path(Network(network), loss))
        assert [row["check"] for row in flags.raised(rows)] == [WRONG] * wrong


def test_images_on_a_kink_are_left_out_and_counted(network):
    """One image within 1e-7 of a kink is no wrong gradient: a deterministic machine would be red for ever by it."""
    images = X + np.random.default_rng(0).uniform(-0.01, 0.01, X.shape)  # where the check takes its gradients
    kink = images[7, 2, 3, 0] + 1e-9
    here = keras.Sequential([layers.Input(SHAPE), Kink(kink), *network.layers])
    errors, kinked = evaluation.gradient_errors(here, X, Y)
    assert errors[7] > 1e-2 and kinked[7] and kinked.sum() <= 4 and errors[~kinked].max() < 1e-4
    assert not flags.raised(evaluation.gradient_flags(here, X, Y))


@keras.saving.register_keras_serializable("test")
class Kink(layers.Layer):
    """Pass the images on; one pixel counts double on one side of `at`."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self.at = at

    def get_config(self):
        return super().get_config() | {"at": self.at}

    def call(self, x):
        pixel = np.zeros((1, *SHAPE))
        pixel[0, 2, 3] = 1
        return x + tf.cast(pixel, x.dtype) * tf.nn.relu(x - tf.constant(self.at, x.dtype))


def test_a_network_of_kinks_is_flagged(network):
    raised = flags.raised(evaluation.gradient_flags(masked(network, "ragged"), X, Y))
    assert [row["check"] for row in raised] == ["images on a kink"]


def test_which_images_have_a_gradient(network):
    assert evaluation.has_gradient(network, X, Y).all()
    for kind in ("zero", "stopped", "rounded"):
        assert not evaluation.has_gradient(masked(network, kind), X, Y).any()
    brightness = X.mean(axis=(1, 2, 3))

    def sometimes(x):
        bright = tf.cast(tf.reduce_mean(x, axis=(1, 2, 3), keepdims=True) > np.median(brightness), x.dtype)
        return linear(bright * x + tf.stop_gradient((1 - bright) * x))

    np.testing.assert_array_equal(evaluation.has_gradient(sometimes, X, Y), brightness > np.median(brightness))


def test_a_saturated_softmax_has_no_gradient_where_the_margin_has_one():
    y = evaluation.logits(linear, X).argmax(axis=1)
    assert evaluation.has_gradient(lambda x: 1e4 * linear(x), X, y, cross_entropy).mean() < 0.2
    assert evaluation.has_gradient(lambda x: 1e4 * linear(x), X, y).all()


def test_images_seen_before_are_found():
    np.testing.assert_array_equal(evaluation.seen(X[:10], X[5:]), [False] * 5 + [True] * 5)
    assert not evaluation.seen(X, X + np.float32(1e-3)).any()


def test_a_detector_that_was_fitted_on_test_images_is_flagged():
    clean = flags.share("test images fitted on", evaluation.seen(X[:30], X[30:]), 0.0, "<=")
    leaking = flags.share("test images fitted on", evaluation.seen(X[:30], X[29:]), 0.0, "<=")
    assert clean["passed"] and not leaking["passed"]  # one image is enough


# ── The sanity checks ──

QUICK = {"steps": 10, "queries": 60}


def failed(table):
    return set(table["check"][~table["passed"]])


@pytest.fixture(scope="module")
def surrogate(network):
    """Trained apart from the network."""
    other = keras.models.clone_model(network)
    fit(other, *toy(400), epochs=5, batch_size=50, learning_rate=5e-3)
    return other


@pytest.fixture(scope="module")
def sound(network, surrogate):
    """The checks of the sound network: what no planted fault may share with it."""
    kept = {}

    def checks(norm, eps):
        if (norm, eps) not in kept:
            kept[norm, eps] = evaluation.sanity_checks(network, X, Y, ThreatModel(norm, eps), surrogate=surrogate,
                                                       **QUICK)
        return kept[norm, eps]

    return checks


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_a_sound_network_passes_every_check(sound, norm, eps):
    table = sound(norm, eps)
    assert list(table.columns) == ["check", "measured", "low", "high", "limit", "relation", "n", "passed"]
    assert table["passed"].all(), table.to_string()
    assert len(table) == 15 and table["check"].is_unique


WRONG = "images off a kink whose gradient is wrong (float64)"
NO_GRADIENT = "images with a gradient of the margin"
FREE = "PGD less a gradient-free attack"


@pytest.mark.parametrize(("kind", "norm", "expected"), [
    ("stopped", "linf", {NO_GRADIENT, "success at the largest eps", WRONG}),
    ("stopped", "l2", {NO_GRADIENT, "success at the largest eps", WRONG}),
    ("zero", "linf", {NO_GRADIENT, "success at the largest eps", WRONG}),
    ("rounded", "linf", {NO_GRADIENT, "success at the largest eps"}),
    ("half stopped", "linf", {WRONG}),
    ("doubled", "linf", {WRONG}),
    ("reversed", "linf", {WRONG, FREE}),
    ("rippled", "linf", {FREE}),
    ("loud", "linf", {"images with a gradient of the cross-entropy"}),
])
def test_a_masked_network_fails_its_checks(network, sound, kind, norm, expected):
    threat = ThreatModel(norm, 0.15 if norm == "linf" else 0.5)
    table = evaluation.sanity_checks(masked(network, kind), X, Y, threat, **QUICK)
    assert expected <= failed(table), table.to_string()
    assert not expected & failed(sound(norm, threat.eps))


def test_a_network_that_answers_at_random_and_does_not_say_so_is_flagged(network, sound):
    keras.utils.set_random_seed(0)
    noisy = keras.Sequential([layers.Input(SHAPE), Mask("noisy"), *network.layers])
    table = evaluation.sanity_checks(noisy, X, Y, ThreatModel("linf", 0.1), **QUICK)
    assert "images with the same answer twice" in failed(table), table.to_string()
    assert "images with the same answer twice" not in failed(sound("linf", 0.1))


def test_transfer_betrays_a_masked_network(network, sound):
    table = evaluation.sanity_checks(masked(network, "zero"), X, Y, ThreatModel("l2", 0.6), surrogate=network, **QUICK)
    assert "white box less transfer" in failed(table)
    assert "white box less transfer" not in failed(sound("l2", 0.6))


def test_the_checks_are_of_the_path_that_is_attacked(network):
    """A mask that stops the gradient: along what is deployed all flags are raised, by BPDA none."""
    hidden, threat = Behind(Mask("stopped"), network, exact=False), ThreatModel("linf", 0.1)
    assert NO_GRADIENT in failed(evaluation.sanity_checks(hidden, X, Y, threat, **QUICK))
    table = evaluation.sanity_checks(hidden, X, Y, threat, path="BPDA", **QUICK)
    assert not failed(table), table.to_string()


# ── Attacks that are broken ──


def judged(defence, images, y):
    """What an attack gives back that found these images."""
    return Found(images, margin(evaluation.logits(defence, images), y).numpy(), np.zeros(len(images), int))


def leaves_the_ball(defence, x, y, threat, **options):
    return judged(defence, np.clip(evaluation.PGD(defence, x, y, threat, **options).images + np.float32(0.01), 0, 1), y)


def moves_without_a_radius(defence, x, y, threat, **options):
    if threat.eps:
        return evaluation.PGD(defence, x, y, threat, **options)
    return judged(defence, np.clip(x + np.float32(1e-6), 0, 1), y)


def never_moves(defence, x, y, threat, **options):
    return judged(defence, x, y)


def gives_up_on_large_radii(defence, x, y, threat, **options):
    return evaluation.PGD(defence, x, y, threat, **options) if threat.eps < 0.1 else judged(defence, x, y)


def gives_up_on_small_radii(defence, x, y, threat, **options):
    return evaluation.PGD(defence, x, y, threat, **options) if threat.eps > 0.1 else judged(defence, x, y)


def goes_the_wrong_way(defence, x, y, threat, **options):
    options |= {"losses": (lambda outputs, y: -margin(outputs.logits, y),), "step_size": 1.0}
    return evaluation.PGD(defence, x, y, threat, **options)


def stops_too_early(defence, x, y, threat, **options):
    options |= {"restarts": 1, "step_size": threat.eps / 20 + 1e-9, "start": x}
    return evaluation.PGD(defence, x, y, threat, **options)


@pytest.mark.parametrize(("broken", "eps", "expected"), [
    (never_moves, 0.15, {"success at the largest eps", "PGD less a single step", FREE, "PGD less the smallest change"}),
    (never_moves, 0.6, {"PGD less random noise"}),
    (gives_up_on_large_radii, 0.15, {"success at eps less at eps / 2"}),
    (gives_up_on_small_radii, 0.15, {"PGD at eps / 2 less the smallest change"}),
    (goes_the_wrong_way, 0.15, {"PGD less a single step", FREE}),
    (stops_too_early, 0.15, {"twice the steps: gain of success"}),
])
def test_a_broken_attack_fails_its_checks(network, sound, broken, eps, expected):
    table = evaluation.sanity_checks(network, X, Y, ThreatModel("linf", eps), attack=broken, **QUICK)
    assert expected <= failed(table), table.to_string()
    assert not expected & failed(sound("linf", eps))


@pytest.mark.parametrize(("broken", "message"), [
    (leaves_the_ball, "leaves the ball"), (moves_without_a_radius, "changes pixels at eps = 0")])
def test_an_attack_that_breaks_its_own_rules_is_an_error(network, sound, broken, message):
    with pytest.raises(AssertionError, match=message):
        evaluation.sanity_checks(network, X, Y, ThreatModel("linf", 0.15), attack=broken, **QUICK)
    assert len(sound("linf", 0.15))  # and PGD itself none


# ── The whole evaluation ──

SOME = {"APGD": partial(standard.apgd, steps=20), "Square": partial(standard.square, queries=60)}
WEAK = {"one query": partial(standard.square, queries=1), "five": partial(standard.square, queries=5)}
SMALL = ThreatModel("linf", 0.06)
REPORT = QUICK | {"attacks": SOME, "examined": 0}


def check_report(report, defence):
    """Every part of a report follows from its images."""
    np.testing.assert_array_equal(report.clean, evaluation.outcomes(defence, X, Y))
    np.testing.assert_array_equal(report.outcomes, evaluation.outcomes(defence, report.found.images, Y))
    np.testing.assert_array_equal(report.outcomes == 2, report.found.value > 0)
    assert SMALL.contains(report.found.images, X).all()
    assert report.left == np.mean(evaluation.outcomes(defence, report.found.images, Y) != 2)
    assert report.left == pytest.approx(1 - report.attacks["beaten"].sum() / len(X))
    assert report.sound == (not failed(report.flags)) and report.flags["check"].is_unique


def test_a_report_of_the_whole_set_on_a_sound_network(network, surrogate):
    report = evaluation.evaluate(network, X, Y, SMALL, surrogate=surrogate, examined=4, **QUICK)
    check_report(report, network)
    assert report.sound, report.flags.to_string()
    assert [*report.attacks["attack"]] == ["none", *list(standard.STANDARD)[:-1], "transfer", "Square"]
    assert "the whole set less PGD" in set(report.flags["check"]) and len(report.flags) == 16 + 2 + 6
    strong = attacks.pgd(network, X, Y, SMALL, restarts=2, losses=("margin", "cross-entropy"))
    assert 0 < report.left <= np.mean(strong.value <= 0)


def test_a_weak_set_leaves_more_and_its_report_says_what_it_tried(network, surrogate):
    some, weak = (evaluation.evaluate(network, X, Y, SMALL, **REPORT | {"attacks": each}) for each in (SOME, WEAK))
    for report in (some, weak):
        check_report(report, network)
    assert some.left < weak.left
    moved = evaluation.evaluate(network, X, Y, SMALL, surrogate=surrogate, **REPORT | {"attacks": WEAK})
    check_report(moved, network)
    assert [*moved.attacks["attack"]] == ["none", "one query", "transfer", "five"]
    assert [*moved.attacks["path"]] == ["", "exact", "surrogate", ""]
    assert some.left <= moved.left < weak.left and "white box less transfer" in set(moved.flags["check"])


def test_a_refused_image_is_left_at_its_worst(network):
    least = float(np.quantile(np.ptp(evaluation.logits(network, X), axis=1), 0.05))
    report = evaluation.evaluate(Cautious(network, least), X, Y, SMALL, **REPORT)
    check_report(report, Cautious(network, least))
    assert set(report.outcomes) == {0, 1, 2} and report.sound, report.flags.to_string()
    assert set(report.attacks["path"]) == {"", "unaware", "exact"}
    never, always = (standard.standard(each, X, Y, SMALL, attacks=SOME)[0] for each in (
        network, Cautious(network, np.inf)))
    assert np.mean(never.value <= 0) < report.left and (always.value <= 0).all()


@pytest.mark.parametrize(("kind", "expected"), [
    ("zero", {NO_GRADIENT, WRONG, "binarization test: success of the attack", "indicator: unavailable gradients"}),
    ("doubled", {WRONG}), ("none", set())])
def test_a_report_on_a_masked_network_is_not_sound(network, kind, expected):
    alone = keras.models.clone_model(masked(network, kind))  # with layers of its own, which end in one place
    alone.set_weights(network.get_weights())
    report = evaluation.evaluate(alone, X, Y, SMALL, **REPORT | {"examined": 16})
    check_report(report, alone)
    assert expected <= failed(report.flags) and report.sound == (not expected), report.flags.to_string()


def test_the_paths_of_a_report_may_be_chosen_and_the_last_one_is_checked(network):
    hidden = Behind(Mask("stopped"), network, exact=False)
    for paths in (None, ["unaware"]):
        report = evaluation.evaluate(hidden, X, Y, SMALL, paths=paths, **REPORT)
        check_report(report, hidden)
        assert set(report.attacks["path"]) - {""} == set(paths or ["unaware", "BPDA"])
        assert report.sound, report.flags.to_string()
    misled = Behind(Mask("zero"), network)  # which says that its gradient is worth following
    report = evaluation.evaluate(misled, X, Y, SMALL, **REPORT)
    check_report(report, misled)
    assert NO_GRADIENT in failed(report.flags)
