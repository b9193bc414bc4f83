"""Compiled graphs belong to the object that they run: kept for the next call, gone with it, in no copy of it."""

import copy
import gc
import pickle
import weakref
from functools import partial

import joblib
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from helpers import (
    adaptive,
    attacks,
    closeness,
    defence,
    detection,
    evaluation,
    filters,
    models,
    purification,
    rejection,
    soundness,
    standard,
    training,
    uncertainty,
)
from helpers.threat import ThreatModel

rng = np.random.default_rng(0)
X = rng.uniform(0, 1, (60, 4, 4, 1)).astype("float32")
Y = (X[:, :2].mean(axis=(1, 2, 3)) > X[:, 2:].mean(axis=(1, 2, 3))).astype("int64")
L2, LINF = ThreatModel("l2", 0.3), ThreatModel("linf", 0.1)


def network(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([layers.Input((4, 4, 1)), layers.Flatten(), layers.Dense(6, "relu"), layers.Dropout(0.3),
                             layers.Dense(2)])


def guarded(model):
    near = closeness.Closeness.fit(closeness.activations(model, X), Y, 1.0, 2)
    detector = detection.Detector(dict.fromkeys(detection.FEATURES, 0.1), 0.0)
    detection.features(model, X, near.thin(50), draws=2)
    whole = detection.Guarded(model, detector, near.thin(10), 0.0, draws=2, known=3)
    for path in whole.paths():
        attacks.pgd(whole, X, Y, L2, steps=1, path=path)


def rejecting(model):
    whole = rejection.fit(model, X, Y, layers=(1, 2))
    density = adaptive.kernel_density(X, Y, 1.0)
    adaptive.strong(whole, X[:3], Y[:3], L2, X, Y, steps=2, density=density, weight=0.1)
    adaptive.algorithm_1(whole, X[:3], Y[:3], L2, step_size=0.1, steps=2)


def purified(model):
    model.trainable = False
    cleaner = purification.autoencoder((4, 4, 1), filters=(2, 2))
    purification.fit(cleaner, model, X, X, Y, weight=0.1, epochs=1)
    whole = purification.defended(cleaner, model)
    evaluation.correct(whole, X, Y)
    for path in whole.paths():
        attacks.fgsm(whole, X, Y, LINF, path=path)
    attacks.fgsm(defence.Behind(purification.TotalVariation(0.1), model), X[:2], Y[:2], LINF, path="BPDA")


def one_of(model):
    whole = defence.OneOf([model, filters.defend(model, "median", 3)])
    for path in (*whole.paths(), None):
        attacks.pgd(whole, X[:3], Y[:3], L2, steps=1, path=path)


def sound(model):
    attack = partial(attacks.pgd, steps=1)
    soundness.binarization(model, attack, X[:2], L2, draws=2)
    soundness.indicators(model, attack, X[:2], evaluation.logits(model, X[:2]).argmax(axis=1), L2, draws=2)


def function(model):
    def logits(x):
        return model(x, training=False)

    for logits.randomised in (True, False):
        attacks.pgd(logits, X, Y, L2, steps=2)


USES = {
    "predict": lambda model: models.predict(model, X, 50),
    "pgd": lambda model: attacks.pgd(model, X, Y, L2, steps=2),
    "a loss": lambda model: attacks.pgd(model, X, Y, L2, steps=2,
                                        losses=(lambda z, y: z.logits[:, 0] * len(model.layers),)),
    "ddn": lambda model: attacks.ddn(model, X, Y, L2, steps=2),
    "lbfgs": lambda model: attacks.lbfgs(model, X[:1], Y[:1], L2, target=1 - Y[:1], searches=1),
    "apgd": lambda model: standard.apgd(model, X, Y, L2, steps=2),
    "fab": lambda model: standard.fab(model, X, Y, L2, steps=2),
    "square": lambda model: standard.square(model, X, Y, L2, queries=2),
    "gradient": lambda model: evaluation.gradient_errors(model, X, Y),
    "answers": lambda model: defence.answers(model, X),
    "filter": lambda model: attacks.fgsm(filters.defend(model, "median", 3), X, Y, LINF),
    "one of several": one_of,
    "soundness": sound,
    "sample": lambda model: uncertainty.sample(model, X, draws=2),
    "detector": guarded,
    "rejection": rejecting,
    "purifier": purified,
    "training": lambda model: training.fit(model, X, Y, epochs=1, adversary=training.Adversary(0.1)),
    "function": function,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_network_that_nobody_holds_is_freed_with_its_graphs(use):
    dropped = []
    for seed in range(2):
        model = network(seed)
        use(model)
        dropped.append(weakref.ref(model))
        del model
    gc.collect()
    assert [ref() for ref in dropped] == [None, None]


def test_a_graph_is_kept_by_key_and_owner():
    class Thing:
        def method(self):
            pass

        def other(self):
            pass

    one, two, built = Thing(), Thing(), []
    for _ in range(2):
        for owner, key in ((one, "a"), (one, "b"), (two, "a"), (one.method, "a"), (one.other, "a"), (two.method, "a")):
            models.graph_of(owner, key, lambda: built.append(0))
    assert len(built) == 6
    for owner in (len, (1, 2)):  # neither takes attributes
        assert [models.graph_of(owner, "a", lambda value=value: value) for value in (1, 2)] == [1, 2]
    assert not hasattr(len.__self__, "__graphs__"), "the module of a built-in function is not its object"


def test_an_object_keeps_a_few_graphs_only():
    owner = network()
    for i in range(100):
        models.graph_of(owner, i, lambda: None)
    assert list(vars(owner)["__graphs__"]) == list(range(68, 100))


@pytest.mark.parametrize("twin", [
    copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), keras.models.clone_model,
    models.as_float64, lambda model: type(model).from_config(model.get_config())],
    ids=["copy", "deepcopy", "pickle", "clone", "float64", "config"])
def test_a_copy_of_a_network_begins_without_graphs(twin):
    model = network()
    config, digest = model.to_json(), models.digest(model)
    attacks.pgd(model, X, Y, L2, steps=2)
    closeness.activations(model, X)
    assert vars(model)["__graphs__"]
    assert model.to_json() == config and models.digest(model) == digest
    again = twin(model)
    assert not vars(again).get("__graphs__") or again is model
    again.set_weights([0 * weights for weights in again.get_weights()])
    expected = 0 if again.dtype == "float32" else None
    if expected is not None:
        assert not models.predict(again, X, 50).any() and models.predict(model, X, 50).any()


def test_graphs_are_in_no_file(tmp_path):
    model = network()
    model.save(tmp_path / "before.keras")
    attacks.pgd(model, X, Y, L2, steps=2)
    closeness.activations(model, X)
    uncertainty.sample(model, X, draws=2)
    model.save(tmp_path / "after.keras")
    sizes = [(tmp_path / f"{name}.keras").stat().st_size for name in ("before", "after")]
    assert sizes[0] == sizes[1]
    models.load(tmp_path / models.save(model, tmp_path))


def test_objects_and_functions_travel_without_their_graphs(tmp_path):
    fitted = rejection.fit(network(), X, Y, layers=(1, 2))
    before = defence.answers(fitted, X)
    again = copy.copy(fitted)
    assert vars(again)["__graphs__"].owner is fitted, "a shallow copy shares what it is told"
    for part, same in zip(before, defence.answers(again, X), strict=True):
        np.testing.assert_array_equal(same, part)
    assert vars(again)["__graphs__"].owner is again and vars(fitted)["__graphs__"].owner is fitted
    fixed = partial(tf.clip_by_value, clip_value_min=0.0, clip_value_max=1.0)
    fixed.randomised = False
    models.predict(fixed, X, 50)
    assert vars(fixed)["__graphs__"]
    joblib.dump(fixed, tmp_path / "fixed")
    travelled = joblib.load(tmp_path / "fixed")
    assert not vars(travelled)["__graphs__"]
    np.testing.assert_array_equal(models.predict(travelled, X, 50), X)
