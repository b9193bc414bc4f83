"""Every defence under every attack: what is deployed decides; and what is no defence is refused at the door."""

from functools import cache, partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import MANY, SHAPE, N, X, linear, steady, three_classes

from helpers import attacks, filters, purification
from helpers.defence import (
    Behind,
    Mean,
    Network,
    OneOf,
    Outputs,
    Path,
    StraightThrough,
    answers,
    as_defence,
    check_defence,
    never,
    way,
)
from helpers.losses import evasion
from helpers.standard import apgd, fab, square
from helpers.threat import ThreatModel

NET = keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dense(3, use_bias=False)], trainable=False)
NET.set_weights([MANY])
THREAT, FEW = ThreatModel("linf", 0.2), slice(0, 6)
Y = NET(X, training=False).numpy().argmax(axis=1)


class Wary:
    """A reader's own defence, with three members: it refuses what it is unsure of."""

    randomised = False

    def __call__(self, x):
        logits = NET(x, training=False)
        top = tf.math.top_k(logits, 2).values
        return Outputs(logits, 6.0 - (top[:, 0] - top[:, 1]))

    def paths(self, seed=0):
        return {"unaware": Path(as_defence(NET)), "exact": Path(self, (evasion,))}


@steady
def function(x):
    return NET(x, training=False)


DEFENCES = {
    "network": NET,
    "function": function,
    "gaussian": filters.defend(NET, "gaussian", 0.5),
    "median": filters.defend(NET, "median", 3),
    "jpeg": filters.defend(NET, "jpeg", 50),
    "purifier": purification.defended(purification.autoencoder(SHAPE, filters=(2,)), NET),
    "one of two": OneOf([three_classes, steady(lambda x: three_classes(0.9 * x + 0.05))]),
    "own": Wary(),
}
ATTACKS = {
    "fgsm": lambda *a, seed, **o: attacks.fgsm(*a, **o),
    "bim": lambda *a, seed, **o: attacks.bim(*a, steps=3, **o),
    "pgd": partial(attacks.pgd, steps=7),
    "apgd": partial(apgd, steps=6),
    "fab": partial(fab, steps=4, targets=1),
    "square": partial(square, queries=6),
}
every_defence = pytest.mark.parametrize("defence", DEFENCES)
every_attack = pytest.mark.parametrize("attack", ATTACKS)


def run(defence, attack, eps=THREAT.eps):
    """The attack on the last path, which is the strongest, or on that without a gradient by the identity."""
    path = "BPDA" if defence == "jpeg" else list(as_defence(DEFENCES[defence]).paths())[-1]
    return ATTACKS[attack](DEFENCES[defence], X[FEW], Y[FEW], ThreatModel("linf", eps), path=path, seed=3)


found_by = cache(run)


# ── Every attack on every defence ──


@every_attack
@every_defence
def test_images_stay_within_the_threat_model_and_none_moves_without_a_radius(defence, attack):
    images = found_by(defence, attack).images
    assert THREAT.contains(images, X[FEW]).all() and images.dtype == np.float32
    np.testing.assert_array_equal(run(defence, attack, eps=0).images, X[FEW])


@every_attack
@every_defence
def test_the_same_seed_gives_the_same_result(defence, attack):
    if not as_defence(DEFENCES[defence]).randomised:
        for one, other in zip(found_by(defence, attack), run(defence, attack), strict=True):
            np.testing.assert_array_equal(one, other)


@every_attack
@every_defence
def test_the_value_is_that_of_what_is_deployed_and_what_is_refused_is_no_win(defence, attack):
    found, whole = found_by(defence, attack), as_defence(DEFENCES[defence])
    each = [answers(member, found.images) for member in getattr(whole, "members", [whole])]
    values = np.array([evasion(outputs, Y[FEW]).numpy() for outputs in each])
    assert (found.value >= values.min(axis=0) - 1e-4).all() and (found.value <= values.max(axis=0) + 1e-4).all()
    assert not (found.value > 0)[np.all([outputs.refusal > 0 for outputs in each], axis=0)].any()


def test_the_attacks_are_tested_where_some_win_and_some_are_refused():
    won = {(defence, attack): (found_by(defence, attack).value > 0).sum() for defence in DEFENCES for attack in ATTACKS}
    for defence in DEFENCES:
        assert max(won[defence, attack] for attack in ATTACKS) > 0, defence
    assert any((answers(Wary(), found_by("own", attack).images).refusal > 0).any() for attack in ATTACKS)


# ── What is deployed, and the ways to it ──


@pytest.mark.parametrize(("defence", "names"), [
    ("network", ["exact"]), ("function", ["exact"]), ("gaussian", ["unaware", "BPDA", "exact"]),
    ("median", ["unaware", "BPDA", "exact"]), ("jpeg", ["unaware", "BPDA", "approximated"]),
    ("purifier", ["unaware", "BPDA", "exact"]), ("one of two", ["one guess", "EOT"]), ("own", ["unaware", "exact"]),
])
def test_the_paths_have_names_and_answers_like_those_of_the_defence(defence, names):
    whole = as_defence(DEFENCES[defence])
    assert list(whole.paths()) == names
    for path in whole.paths().values():
        outputs = path.outputs(tf.constant(X))
        assert outputs.logits.shape == (N, 3) and outputs.refusal.shape == (N,)


@pytest.mark.parametrize("batch_size", [5, 500])
def test_answers_are_those_of_the_network_to_what_it_is_shown(batch_size):
    found = answers(DEFENCES["median"], X, batch_size)
    np.testing.assert_allclose(found.logits, NET(filters.apply(X, "median", 3), training=False), atol=1e-5)
    np.testing.assert_array_equal(found.refusal, np.full(N, -np.inf))
    straight = DEFENCES["median"].paths()["BPDA"].outputs
    np.testing.assert_allclose(straight(tf.constant(X)).logits, found.logits, atol=1e-5)


def test_a_network_or_function_is_a_defence_that_is_made_once():
    assert as_defence(NET) is as_defence(NET) and isinstance(as_defence(NET), Network)
    assert as_defence(function) is as_defence(function) and as_defence(DEFENCES["own"]) is DEFENCES["own"]
    assert not as_defence(NET).randomised and as_defence(lambda x: x).randomised
    for name in ("network", "median", "jpeg", "own"):
        whole = as_defence(DEFENCES[name])
        for one, other in zip(whole.paths().values(), whole.paths().values(), strict=True):
            assert one.outputs is other.outputs  # and so are the graphs that an attack leaves on them


def test_a_way_is_nothing_a_name_a_path_or_a_network():
    whole = DEFENCES["median"]
    assert way(whole, None).outputs is whole and way(whole, "exact").outputs is whole
    assert way(whole, path := Path(function)) is path and way(whole, NET).outputs is as_defence(NET)
    with pytest.raises(ValueError, match="path: unknown 'exacd', did you mean 'exact'"):
        way(whole, "exacd")
    with pytest.raises(TypeError, match="defence is list; expected a Keras network"):
        way(whole, ["BPDA"])


@pytest.mark.parametrize(("kind", "value"), [("bits", 1), ("jpeg", 20)])
def test_bpda_finds_what_the_missing_gradient_hides(kind, value):
    whole, threat = filters.defend(NET, kind, value), ThreatModel("linf", 0.4)
    y = answers(whole, X).logits.argmax(axis=1)
    blind, straight = (attacks.pgd(whole, X, y, threat, steps=10, start=X, path=path) for path in (None, "BPDA"))
    assert (blind.value <= 0).all() and (straight.value > 0).mean() > 0.5
    np.testing.assert_allclose(straight.value, evasion(answers(whole, straight.images), y), atol=1e-4)


# ── What is random ──


def test_a_random_defence_draws_anew_at_each_call():
    one_of = OneOf(DEFENCES["one of two"].members)
    found = [answers(one_of, X).logits for _ in range(12)]
    different = {each.tobytes() for each in found}
    assert len(different) == 2
    again = OneOf(one_of.members)
    assert {answers(again, X).logits.tobytes() for _ in range(12)} == different

    drawn = []

    class Watching(OneOf):
        def __call__(self, x):
            drawn.append(self.rng.integers(2))
            return self.members[drawn[-1]](x)

    attacks.pgd(Watching(one_of.members), X[FEW], Y[FEW], THREAT, steps=20)
    assert len(drawn) > 20 and len(set(drawn)) == 2


def test_noise_before_a_network_is_random_where_it_says_so_and_has_a_mean():
    def noise(x):
        return x + np.random.normal(scale=0.05, size=x.shape).astype("float32")  # noqa: NPY002

    whole = Behind(noise, NET)
    assert whole.randomised and list(whole.paths()) == ["unaware", "BPDA", "exact", "EOT"]
    one, other = (answers(whole, X).logits for _ in range(2))
    assert np.abs(one - other).max() > 1e-3
    found = attacks.pgd(whole, X[FEW], Y[FEW], THREAT, steps=7, path="EOT")
    assert THREAT.contains(found.images, X[FEW]).all() and (found.value > 0).any()


def test_the_mean_is_of_probabilities_and_refusals():
    draws = iter([([2.0, 0.0], 1.0), ([0.0, 0.0], -2.0)])

    def drawn(x):
        logits, refusal = next(draws)
        return Outputs(tf.constant([logits]), tf.constant([refusal]))

    found = Mean(drawn, draws=2)(tf.zeros((1, *SHAPE)))
    p = (np.exp(2) / (np.exp(2) + 1) + 0.5) / 2
    np.testing.assert_allclose(found.logits, [np.log([p, 1 - p])], rtol=1e-5)
    np.testing.assert_allclose(found.refusal, [-0.5])


def test_the_attacker_guesses_a_member_by_his_own_seed_and_knows_the_mean_of_all():
    one_of = OneOf([linear(bias=float(bias)) for bias in range(4)])
    guesses = {seed: one_of.paths(seed)["one guess"].outputs for seed in range(20)}
    assert set(guesses.values()) == set(one_of.members) and one_of.paths(7)["one guess"].outputs is guesses[7]
    mean = one_of.paths()["EOT"].outputs
    assert not mean.randomised
    np.testing.assert_allclose(mean(tf.constant(X)).logits, linear(bias=1.5)(X), atol=1e-5)
    behind = OneOf([filters.defend(NET, "median", 3), NET])
    assert behind.paths()["unaware"].outputs is as_defence(NET)


def test_a_copy_in_float64_counts_in_float64():
    x = tf.constant(X, tf.float64)
    for name in ("network", "gaussian", "purifier"):
        whole = as_defence(DEFENCES[name])
        exact = whole.as_float64()(x).logits
        assert exact.dtype == tf.float64
        np.testing.assert_allclose(exact, answers(whole, X).logits, atol=1e-4)
    with pytest.raises(TypeError, match="expected a Keras network"):
        as_defence(function).as_float64()
    straight = StraightThrough(tf.stop_gradient, NET)
    np.testing.assert_allclose(straight(tf.constant(X)).logits, NET(X, training=False), atol=1e-5)


# ── What is no defence ──


class Odd:
    """A defence of a reader who has something wrong: what it answers, its paths, or what it says of itself."""

    def __init__(self, answer=never, paths=None, randomised=False):
        self.answer, self.ways, self.randomised = answer, paths, randomised

    def __call__(self, x):
        return self.answer(NET(x, training=False))

    def paths(self, seed=0):
        return {"exact": Path(self)} if self.ways is None else self.ways


def noisy(z):
    return never(z + np.random.normal())  # noqa: NPY002


BAD = {  # what is done to the logits: the error
    "NaN": (lambda z: never(z * np.nan), ValueError, "gives NaN on some images; expected logits"),
    "NaN late": (lambda z: never(tf.where(tf.range(tf.shape(z)[0])[:, None] > 9, np.nan, z)), ValueError,
                 "gives NaN on some images"),
    "probabilities": (lambda z: never(tf.nn.softmax(z)), ValueError, "gives probabilities .*; expected logits"),
    "one logit": (lambda z: never(z[:, :1]), ValueError, r"gives shape \(8, 1\); expected logits .* of 2 or"),
    "images": (lambda z: never(z[:, None]), ValueError, r"gives shape \(8, 1, 3\); expected logits"),
    "a refusal of another shape": (lambda z: Outputs(z, z[:, :1]), ValueError,
                                   r"refusal has shape \(8, 1\); expected \(8,\), one number an image"),
    "one refusal": (lambda z: Outputs(z, -1.0), ValueError, r"refusal has shape \(\)"),
    "a refusal that is NaN": (lambda z: Outputs(z, z[:, 0] * np.nan), ValueError, "gives NaN .* a refusal above 0"),
    "logits alone": (lambda z: z, TypeError, "gives EagerTensor; expected .*Outputs"),
    "a tuple": (lambda z: (z, z[:, 0]), TypeError, "gives tuple; expected .*Outputs"),
    "nothing": (lambda z: None, TypeError, "gives NoneType; expected .*Outputs"),
}
bad_answers = pytest.mark.parametrize(("answer", "error", "message"), BAD.values(), ids=BAD)


@pytest.mark.parametrize("randomised", [False, True])
@bad_answers
def test_bad_answers_are_refused(answer, error, message, randomised):
    whole = Odd(answer, randomised=randomised)
    for door in (lambda: answers(whole, X), lambda: attacks.pgd(whole, X, Y, THREAT, steps=1)):
        with pytest.raises(error, match=message):
            door()


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd", "square"])
def test_nan_that_an_attack_runs_into_is_no_success_and_no_failure(attack):
    @steady
    def holes(x):
        moved = tf.reduce_max(tf.abs(x - 0.5), axis=(1, 2, 3)) > 0.21  # the images themselves stay within 0.2
        return tf.where(moved[:, None], np.nan, linear(bias=-20.0)(x))

    with pytest.raises(ValueError, match="gives NaN on some images"):
        ATTACKS[attack](holes, X[FEW], np.zeros(6, int), THREAT, seed=0)


@bad_answers
def test_bad_answers_of_a_path_are_refused(answer, error, message):
    if answer is not BAD["NaN late"][0]:  # which no attack meets: what is deployed decides
        with pytest.raises(error, match=message):
            attacks.pgd(NET, X, Y, THREAT, steps=1, path=Path(Odd(answer)))


def test_a_path_of_other_classes_or_of_a_network_that_is_no_defence_is_refused():
    whole = Odd(paths={"narrow": Path(Odd(lambda z: never(z[:, :2]))), "bare": Path(NET)})
    with pytest.raises(ValueError, match="the path gives 2 classes; expected 3, those of the defence"):
        attacks.pgd(whole, X, Y, THREAT, path="narrow")
    with pytest.raises(TypeError, match="the path gives EagerTensor; expected .*Outputs"):
        attacks.pgd(whole, X, Y, THREAT, path="bare")


@pytest.mark.parametrize("paths", [{}, [], "exact", {"exact": NET}, [("exact", Path(NET))]], ids=str)
def test_paths_that_are_none_are_refused(paths):
    for door in (answers, check_defence):
        with pytest.raises(TypeError, match=r"paths\(\) of the defence gives .*; expected one or more, name -> Path"):
            door(Odd(paths=paths), X)


def test_what_draws_and_says_that_it_does_not_is_refused():
    for door in (lambda whole: answers(whole, X), lambda whole: attacks.fgsm(whole, X, Y, THREAT),
                 lambda whole: attacks.fgsm(NET, X, Y, THREAT, path=Path(whole))):
        with pytest.raises(ValueError, match="answers differently when it is called again"):
            door(Odd(noisy))
        door(Odd(noisy, randomised=True))


def test_what_a_graph_cannot_hold_is_refused_and_may_be_wrapped():
    with pytest.raises(TypeError, match=r"answers, but not as a TensorFlow graph .* tf\.numpy_function around others"):
        answers(Odd(lambda z: never(tf.constant(z.numpy() * 2))), X)

    def doubled(z):
        return never(tf.ensure_shape(tf.numpy_function(lambda z: 2 * z, [z], tf.float32), z.shape))

    np.testing.assert_allclose(answers(Odd(doubled), X).logits, 2 * NET(X, training=False), atol=1e-5)


def test_what_is_nothing_of_the_kind_is_refused():
    for thing in (None, "network", np.zeros(3), [NET]):
        with pytest.raises(TypeError, match=f"defence is {type(thing).__name__}; expected a Keras network, a function"):
            answers(thing, X)
    with pytest.raises(ValueError, match="members is empty"):
        OneOf([])
    with pytest.raises(ValueError, match=r"x holds images \(4, 4, 1\); expected \(6, 6, 1\)"):
        answers(keras.Sequential([layers.Input((6, 6, 1)), layers.Flatten(), layers.Dense(2)]), X)
