"""Training: it learns, it repeats, a mixed batch holds both halves, and the attacker inside it keeps its limits."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from helpers import attacks, models
from helpers.evaluation import correct, score
from helpers.losses import cross_entropy
from helpers.threat import ThreatModel
from helpers.training import Adversary, fit

SHAPE = (4, 4, 1)
N = 60


def toy(n=N, seed=0):
    """Images of two classes: the upper or the lower half is lighter, under noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.uniform(0, 0.7, (n, *SHAPE))
    x[y == 0, :2] += 0.3
    x[y == 1, 2:] += 0.3
    return x.astype("float32"), y


X, Y = toy()


def plain(seed=0):
    """A network without dropout or batch statistics, whose training can be followed by hand."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dense(8, "tanh"), layers.Dense(2)])


def noisy(seed=0):
    """A network with dropout and batch statistics."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(4, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
        layers.Dropout(0.3), layers.Dense(2),
    ])


def linf(eps):
    return ThreatModel("linf", eps)


def flat(model):
    return np.concatenate([weights.ravel() for weights in model.get_weights()])


def trained(network, *, seed=0, model_seed=0, **options):
    model = network(model_seed)
    history = fit(model, X, Y, **{"epochs": 2, "batch_size": 16, "seed": seed} | options)
    return flat(model), history


# ── Learning ──


@pytest.mark.parametrize("network", [plain, noisy])
@pytest.mark.parametrize("adversary", [None, Adversary(0.03), Adversary(0.03, 3, True, False)],
                         ids=["none", "mixed", "pgd"])
def test_training_lowers_the_loss(network, adversary):
    model = network()
    before = score(model, *toy(seed=1))
    history = fit(model, X, Y, epochs=15, batch_size=16, learning_rate=0.02, adversary=adversary)
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    after = score(model, *toy(seed=1))
    assert after["loss"] < before["loss"] and after["accuracy"] > 0.9


def test_adversarial_training_makes_the_network_more_robust():
    """Each class has a strong sign in one pixel, and a weak one in all others that an attacker can turn round."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    x = 0.5 + 0.08 * (2 * y[:, None, None, None] - 1) + rng.normal(0, 0.005, (200, *SHAPE))
    x[:, 0, 0, 0] = 0.5 + 0.35 * (2 * y - 1) + rng.normal(0, 0.08, 200)
    x = x.clip(0, 1).astype("float32")

    def robust(adversary):
        model = plain()
        fit(model, x, y, epochs=40, batch_size=50, learning_rate=0.02, adversary=adversary)
        return (attacks.bim(model, x, y, linf(0.2)).value <= 0).mean()

    assert robust(Adversary(0.2, mixed=False)) > robust(None) + 0.3


# ── One step, followed by hand ──


def by_hand(x, y, learning_rate):
    """The weights after one Adam step on the mean cross-entropy of one batch."""
    model, adam = plain(), keras.optimizers.Adam(learning_rate)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(cross_entropy(model(x, training=True), y))
    variables = model.trainable_variables
    adam.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return flat(model), float(loss)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_an_adversarial_step_is_that_of_the_equation(steps, mixed):
    """FGSM is Adversary(eps), I-FGSM several steps without a random start; mixed adds the clean images."""
    adversary = Adversary(0.1, steps, mixed=mixed, step_size=0.1 / steps)
    x_adv = attacks.bim(plain(), X, Y, linf(0.1), steps=steps).images
    x, y = (np.concatenate([X, x_adv]), np.concatenate([Y, Y])) if mixed else (x_adv, Y)
    expected, loss = by_hand(x, y, 0.01)
    model = plain()
    history = fit(model, X, Y, epochs=1, batch_size=N, learning_rate=0.01, adversary=adversary)
    np.testing.assert_allclose(flat(model), expected, atol=1e-5)
    np.testing.assert_allclose(history["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(history["accuracy"], correct(plain(), x, y).mean(), rtol=1e-6)


def test_a_plain_step_is_that_of_the_equation():
    expected, loss = by_hand(X, Y, 0.01)
    weights, history = trained(plain, epochs=1, batch_size=10**6, learning_rate=0.01)
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(history["loss"], loss, rtol=1e-5)


class Spy(layers.Layer):
    """Count the images and add up the pixels that pass in training and in test mode."""

    def build(self, shape):
        self.sums = self.add_weight(shape=(2, 2), initializer="zeros", trainable=False, dtype="float32")

    def call(self, x, training=False):
        seen = tf.stack([tf.cast(tf.shape(x)[0], "float32"), tf.reduce_sum(x)])
        self.sums.assign_add(tf.stack([seen, 0 * seen] if training else [0 * seen, seen]))
        return x


@pytest.mark.parametrize(("adversary", "images", "crafted"), [
    (None, N, 0), (Adversary(0.1), 2 * N, N), (Adversary(0.1, mixed=False), N, N),
    (Adversary(0.1, 3, True), 2 * N, 3 * N),
])
def test_every_image_is_seen_once_an_epoch_with_its_adversary(adversary, images, crafted):
    spy = Spy()
    model = keras.Sequential([layers.Input(SHAPE), spy, *plain().layers])
    fit(model, X, Y, epochs=3, batch_size=16, adversary=adversary)  # 60 images: three whole batches and one of 12
    start = spy.sums.numpy()
    fit(model, X, Y, epochs=3, batch_size=16, adversary=adversary)
    seen = spy.sums.numpy() - start
    checked = seen[1, 0] - 3 * crafted  # check_defence looks at the first images once
    assert seen[0, 0] == 3 * images and 0 <= checked <= 8
    if adversary is None:
        np.testing.assert_allclose(seen[0, 1], 3 * X.sum(), rtol=1e-4)


# ── Repeatability ──


@pytest.mark.parametrize("network", [plain, noisy])
@pytest.mark.parametrize("adversary", [None, Adversary(0.05), Adversary(0.05, 2, True)], ids=["none", "fgsm", "pgd"])
def test_the_same_seed_gives_the_same_weights(network, adversary):
    results = []
    for other in (1, 2):  # whatever NumPy's own generator was left at
        model = network()
        np.random.seed(other)  # noqa: NPY002
        history = fit(model, X, Y, epochs=2, batch_size=16, adversary=adversary)
        results.append((flat(model), history))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_another_seed_gives_other_weights():
    """The seed of `fit` orders the images and starts the attacks; the network's own seed makes weights and dropout."""
    first, _ = trained(plain)
    assert not np.array_equal(first, trained(plain, seed=1)[0])
    assert not np.array_equal(first, trained(plain, model_seed=1)[0])


class Diary(layers.Layer):
    """Write down the mean pixel of every batch trained on."""

    def build(self, shape):
        self.means = self.add_weight(shape=(4,), initializer="zeros", trainable=False)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int32")

    def call(self, x, training=False):
        if training:
            self.means.assign(tf.where(tf.range(4) == self.count, tf.reduce_mean(x), self.means))
            self.count.assign_add(1)
        return x


def test_random_starts_differ_between_batches_epochs_and_seeds():
    """All images are the same, so that their order does not matter and the noise alone is seen."""
    x, y, noise = np.full((20, *SHAPE), 0.5, "float32"), np.zeros(20, int), Adversary(0.3, 1, True, False, 1e-9)
    means = []
    for seed in (0, 1):
        diary = Diary()
        model = keras.Sequential([layers.Input(SHAPE), diary, *plain().layers])
        fit(model, x, y, epochs=2, batch_size=10, adversary=noise, learning_rate=1e-9, seed=seed)
        means += diary.means.numpy().tolist()
    assert len(set(means)) == 8
    np.testing.assert_allclose(means, 0.5, atol=0.06)


def test_a_loaded_network_trains_on_alike_whatever_was_drawn_before(tmp_path):
    path = tmp_path / models.save(noisy(), tmp_path)
    networks = []
    for seed in (5, 6):
        keras.utils.set_random_seed(seed)
        networks.append(models.load(path))
        fit(networks[-1], X, Y, epochs=1, batch_size=16)
    np.testing.assert_array_equal(flat(networks[0]), flat(networks[1]))
    other = models.load(path, seed=1)
    fit(other, X, Y, epochs=1, batch_size=16)
    assert (flat(other) != flat(networks[0])).any()


def test_the_arguments_are_left_alone():
    x, y = X.copy(), Y.copy()
    fit(plain(), x, y, epochs=1, adversary=Adversary(0.1))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


# ── The attacker ──


@pytest.mark.parametrize("adversary", [
    Adversary(0.1), Adversary(0.1, 4), Adversary(0.1, 1, True, step_size=0.125), Adversary(0.1, 5, True, False),
    Adversary(0.0, 2, True), Adversary(1.0, 1, True),
], ids=str)
def test_crafted_images_keep_to_the_radius_and_the_bounds(adversary):
    x_adv = adversary.craft(noisy(), tf.constant(X), tf.constant(Y), tf.constant([0, 1])).numpy()
    assert np.abs(x_adv - X).max() <= adversary.eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert adversary.eps == 0 or np.abs(x_adv - X).max() > 0.99 * adversary.eps


def test_crafting_is_fgsm_bim_and_pgd():
    model, x, y = plain(), tf.constant(X), tf.constant(Y)
    fgsm = Adversary(0.1).craft(model, x, y, tf.constant([0, 0]))
    np.testing.assert_allclose(fgsm, attacks.fgsm(model, X, Y, linf(0.1)).images, atol=1e-6)
    bim = Adversary(0.1, 5, step_size=0.02).craft(model, x, y, tf.constant([0, 0]))
    np.testing.assert_allclose(bim, attacks.bim(model, X, Y, linf(0.1), steps=5).images, atol=1e-6)
    pgd = Adversary(0.1, 10, True).craft(model, x, y, tf.constant([0, 0])).numpy()
    ifgsm = attacks.bim(model, X, Y, linf(0.1)).images
    assert score(model, pgd, Y)["loss"] > 0.95 * score(model, ifgsm, Y)["loss"]


def test_crafting_moves_no_statistics_and_draws_no_dropout():
    model = noisy()
    model(X, training=True)
    before = [variable.numpy() for variable in model.variables]
    one, two = (Adversary(0.1, 3).craft(model, tf.constant(X), tf.constant(Y), tf.constant([0, 0])) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert all(np.array_equal(was, variable.numpy()) for was, variable in zip(before, model.variables, strict=True))


def test_the_batch_statistics_are_those_of_the_batch_trained_on():
    """With momentum 0 the moving mean is the last batch's: of the mixed batch alone, whatever crafting has seen."""
    normalise = layers.BatchNormalization(momentum=0.0)
    model = keras.Sequential([layers.Input(SHAPE), normalise, layers.Flatten(), layers.Dense(2)])
    reference = keras.models.clone_model(model)
    reference.set_weights(model.get_weights())
    fit(model, X, Y, epochs=1, batch_size=N, adversary=Adversary(0.2))
    mixed = np.concatenate([X, attacks.fgsm(reference, X, Y, linf(0.2)).images])
    np.testing.assert_allclose(normalise.moving_mean.numpy(), mixed.mean(axis=(0, 1, 2)), atol=1e-5)


def test_the_usual_step_size_depends_on_the_steps():
    model, x, y, seed = plain(), tf.constant(X), tf.constant(Y), tf.constant([0, 0])
    for steps, size in ((1, 0.1), (5, 0.05)):
        usual, explicit = (Adversary(0.1, steps, step_size=s).craft(model, x, y, seed) for s in (None, size))
        np.testing.assert_array_equal(usual, explicit)


# ── The record of a training ──


def test_the_history_has_a_value_an_epoch():
    _, history = trained(noisy, epochs=3, validation=toy(20, seed=1), monitor=lambda model: {"norm": flat(model)[0]})
    assert set(history) == {"loss", "accuracy", "validation_loss", "validation_accuracy", "norm"}
    assert {len(values) for values in history.values()} == {3}
    assert all(0 <= value <= 1 for value in history["accuracy"] + history["validation_accuracy"])
    assert len(set(history["norm"])) == 3  # the monitor sees the weights of each epoch


def test_validation_is_measured_after_the_epoch_in_test_mode():
    model = noisy()
    history = fit(model, X, Y, epochs=2, batch_size=16, validation=toy(20, seed=1))
    last = score(model, *toy(20, seed=1))
    assert history["validation_loss"][-1] == pytest.approx(last["loss"], rel=1e-6)
    assert history["validation_accuracy"][-1] == last["accuracy"]


def test_only_what_is_asked_for_is_recorded_and_shown(capsys):
    _, history = trained(plain, epochs=1)
    assert set(history) == {"loss", "accuracy"} and capsys.readouterr().err == ""
    trained(plain, epochs=1, label="normal training")
    assert "normal training" in capsys.readouterr().err


# ── Bad input ──


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"x": 255 * X}, ValueError, "expected pixels in"),
    ({"x": np.where(X > 0.5, np.nan, X).astype("float32")}, ValueError, "NaN"),
    ({"x": X.astype("float64")}, TypeError, "x is float64"),
    ({"x": X[..., 0]}, TypeError, "of shape"),
    ({"x": X[:0], "y": Y[:0]}, ValueError, "x is empty"),
    ({"y": Y + 1}, ValueError, r"expected labels in 0\.\.\.1"),
    ({"y": Y - 1}, ValueError, r"expected labels in 0\.\.\.1"),
    ({"y": Y.astype(float)}, TypeError, "integer labels"),
    ({"y": Y[:-1]}, TypeError, f"expected {N} integer labels"),
    ({"epochs": 0}, ValueError, "epochs is 0"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"learning_rate": -0.1}, ValueError, "learning_rate is -0.1"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
    ({"learning_rate": float("inf")}, ValueError, "learning_rate is inf"),
    ({"epochs": 1.5}, ValueError, "epochs is 1.5; expected a whole number"),
])
def test_bad_arguments_of_fit_are_named(options, error, message):
    model = plain()
    with pytest.raises(error, match=message):
        fit(model, **{"x": X, "y": Y, "epochs": 1} | options)
    np.testing.assert_array_equal(flat(model), flat(plain()))  # refused before any training


@pytest.mark.parametrize(("validation", "error"), [((255 * X, Y), ValueError), ((X, Y[:-1]), TypeError)])
def test_bad_validation_data_is_refused(validation, error):
    with pytest.raises(error):
        fit(plain(), X, Y, epochs=1, validation=validation)


def test_bad_validation_data_is_refused_before_training():
    model = plain()
    with pytest.raises(ValueError):
        fit(model, X, Y, epochs=1, validation=(255 * X, Y))
    np.testing.assert_array_equal(flat(model), flat(plain()))


def test_training_stops_when_the_loss_is_lost():
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1.*learning_rate"):
        fit(plain(), X, Y, epochs=3, batch_size=4, learning_rate=1e38)


def test_a_network_that_ends_in_a_softmax_is_not_trained():
    with pytest.raises(ValueError, match="drop its softmax"):
        fit(keras.Sequential([plain(), layers.Softmax()]), X, Y, epochs=1)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"eps": -0.1}, "eps is -0.1"),
    ({"eps": 25.5}, "0-255 units"),
    ({"eps": float("nan")}, "eps is nan"),
    ({"eps": 0.1, "steps": 0}, "steps is 0"),
    ({"eps": 0.1, "steps": 1.5}, "steps is 1.5"),
    ({"eps": 0.1, "step_size": 0}, "step_size is 0"),
    ({"eps": 0.1, "step_size": -0.1}, "step_size is -0.1"),
])
def test_bad_arguments_of_an_adversary_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adversary(**arguments)
