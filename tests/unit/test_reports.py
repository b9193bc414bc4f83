"""What users of neighbouring tools reported, tried here by kind: one test a point that no other test holds.

Where the others stand, below tests/unit if no folder is named:

distances far from zero         test_closeness::test_an_offset_that_all_features_share_costs_no_digits
                                test_rejection::test_an_offset_that_all_features_share_costs_no_digits
logits or a refusal of NaN      test_defence::test_bad_answers_are_refused
                                test_defence::test_nan_that_an_attack_runs_into_is_no_success_and_no_failure
a saturated softmax             test_evaluation::test_a_saturated_softmax_has_no_gradient_where_the_margin_has_one
                                test_evaluation::test_a_masked_network_fails_its_checks
                                test_standard::test_apgd_climbs_where_the_cross_entropy_has_no_gradient
a network that draws            test_models::test_a_random_network_has_to_say_so
                                test_standard::test_one_lucky_draw_is_no_win
labels of other kinds           test_checks::test_bad_labels_are_named
                                test_search::test_bad_labels_are_refused
images of other kinds           test_checks::test_bad_images_are_named
                                test_search::test_bad_images_are_refused
channels first                  test_models::test_images_of_another_size_are_refused
                                test_arena::test_what_does_not_answer_as_expected_is_refused_in_words
eps 0, infinite, in 0-255       test_search::test_no_radius_no_change
                                test_search::test_without_a_limit_every_valid_image_is_allowed
                                test_search::test_a_radius_in_0_to_255_units_is_refused
a target that is the label      test_search::test_the_true_class_is_no_target
a softmax inside                test_search::test_a_network_that_ends_in_a_softmax_is_refused
BatchNorm and dropout           test_search::test_dropout_is_off_in_an_attack
                                test_search::test_an_attack_leaves_the_network_as_it_was
one output, None, a string      test_defence::test_bad_answers_are_refused
                                test_defence::test_what_is_nothing_of_the_kind_is_refused
l2 without a gradient           test_search::test_a_network_without_gradients_is_attacked_without_success
a gradient of NaN: FGSM to DDN  test_attacks::test_a_gradient_that_is_not_finite_is_an_error
graphs made once, and freed     test_attacks::test_one_graph_serves_every_radius_and_number_of_steps
                                test_graphs::test_a_network_that_nobody_holds_is_freed_with_its_graphs
a class without samples         test_closeness::test_bad_points_are_refused
                                test_purification::test_bad_input_of_the_training_is_named
                                test_rejection::test_bad_arguments_of_fit_are_named_before_the_work
sides that 16 does not divide   test_purification::test_a_size_not_divisible_by_16_is_named
npz corrupt, cut, flipped       test_data::test_a_damaged_file_of_the_mirror_is_named
                                test_data::test_a_damaged_file_of_the_cache_is_downloaded_anew
                                test_units::test_every_damaged_byte_is_noticed
                                test_rejection::test_a_damaged_or_missing_file_is_named
.keras cut, swapped, missing    test_models::test_damaged_missing_and_swapped_files_are_named
                                test_arena::test_other_files_and_damaged_networks_are_refused
half a download, no network     test_data::test_an_interrupted_download_leaves_nothing_and_starts_anew
                                test_data::test_without_data_and_network_the_error_says_what_to_do
Python 3.13                     test_packaging::test_workflow_tests_every_supported_python
newer packages                  the workflows newest and colab
changed in Colab, run again     test_units::test_functions_of_a_notebook_run_in_processes_and_follow_edits
                                notebooks/test_colab::test_chapter_runs_alone_with_the_installed_helpers
paths of Windows                notebooks/test_sources::test_nothing_names_a_place_on_one_machine
a printed line of 500 kB        book/test_execute::test_a_long_line_is_taken_in_at_once
workers after SIGTERM           book/test_execute::test_killing_the_command_ends_kernel_and_workers_...
a data folder with a blank      book/test_commands::test_the_folder_of_the_data_may_be_relative_and_have_a_space
a folder of another alphabet    book/test_execute::test_below_an_odd_path_in_an_odd_environment
no HOME, an unknown user        book/test_execute::test_a_user_without_a_home
"""

import gc
import hashlib
import json
import re
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import RECORD, ROOT, commit
from keras import layers
from test_records import git
from toys import LINEAR, MANY, NET, SHAPE, N, X, Y, linear, margins, network, rng_images, steady, three_classes

from helpers import (
    adaptive,
    attacks,
    closeness,
    data,
    detection,
    evaluation,
    execution,
    filters,
    models,
    provenance,
    purification,
    rejection,
    svm,
    training,
    uncertainty,
)
from helpers.book import same_code
from helpers.closeness import Closeness
from helpers.defence import Network
from helpers.detection import FEATURES, Detector
from helpers.rejection import SVM
from helpers.site import _page
from helpers.standard import apgd, fab, square
from helpers.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.3)
OTHER = (Y + 1) % 3
ATTACKS = {
    "bim": lambda m, x, y, **o: attacks.bim(m, x, y, LINF, steps=2, **o),
    "pgd": lambda m, x, y, **o: attacks.pgd(m, x, y, LINF, steps=2, compact=True, **o),
    "normalised": lambda m, x, y, **o: attacks.normalised(m, x, y, L2, steps=2, target=(y + 1) % 3, **o),
    "ddn": lambda m, x, y, **o: attacks.ddn(m, x, y, L2, steps=2, **o),
    "lbfgs": lambda m, x, y: attacks.lbfgs(m, x[:2], y[:2], L2, target=(y[:2] + 1) % 3, searches=1, max_iterations=2),
    "apgd": lambda m, x, y, **o: apgd(m, x, y, LINF, steps=2, **o),
    "fab": lambda m, x, y, **o: fab(m, x, y, L2, steps=2, targets=1, **o),
    "square": lambda m, x, y, **o: square(m, x, y, LINF, queries=3, **o),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def bare():
    """A linear network of three classes, with the weights of the toy function of that name."""
    model = keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dense(3)])
    model.layers[-1].set_weights([MANY, np.zeros(3)])
    return model


def test_the_tests_that_are_named_above_are_there():
    named = re.findall(r"([\w/]+)::(\w+)", __doc__)
    for file, name in named:
        path = ROOT / f"tests/{file if '/' in file else f'unit/{file}'}.py"
        assert f"\ndef {name}" in path.read_text(encoding="utf-8"), f"{file}::{name}"
    assert len(named) > 40


# ── Wrong numbers, silently ──


def test_neighbours_are_counted_alike_far_from_zero():
    """LID of features with an offset of 100, where the digits of a squared distance of 0.2 used to be lost."""
    h = np.random.default_rng(0).normal(100, 0.01, (40, 2000)).astype("float32")
    near, far = (Closeness((points[5:],), 1.0).lid(points[:5], 10) for points in (h - np.float32(100), h))
    np.testing.assert_allclose(far, near, rtol=1e-3)


def test_machines_score_alike_far_from_zero():
    rng = np.random.default_rng(0)
    h, weights = rng.normal(100, 0.01, (20, 3000)).astype("float32"), rng.normal(size=(20, 2))
    wide = h.astype("float64")
    exact = np.exp(-0.5 * ((wide[:, None] - wide) ** 2).sum(axis=-1)) @ weights
    found = SVM.of(h, weights, np.zeros(2), 0.5, 1.0).scores(tf.constant(wide))
    np.testing.assert_allclose(found, exact, atol=1e-4)


def test_saturated_logits_leave_what_their_twin_leaves():
    near = linear(bias=-float(np.median(margins(LINEAR, X, np.zeros(N, int)))))
    y, curves = evaluation.logits(near, X).argmax(axis=1), []
    for model in (near, steady(lambda x: 1000 * near(x))):
        curves.append(evaluation.survivors(model, [0, 0.01, 0.02, 0.05], X, y, steps=10))
    np.testing.assert_array_equal(*curves)
    assert curves[0][0].all() and curves[0][-1].mean() < 0.2


def test_the_images_of_a_diverged_network_are_neither_right_nor_wrong():
    model = bare()
    model.layers[-1].set_weights([np.nan * MANY, np.zeros(3)])
    for measure in (evaluation.score, purification.right):
        with pytest.raises(ValueError, match="gives NaN on some images"):
            measure(model, X, Y)


def test_an_activation_that_is_changed_counts_from_the_next_call_on():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dense(8, "relu"), layers.Dense(3)])
    outer = keras.Sequential([layers.Input(SHAPE), model])
    whole, held = filters.defend(outer, "bits", 6), Network(outer)

    def attacked():
        evaluation.logits(model, X), closeness.activations(model, X)
        return [attacks.pgd(each, X, Y, LINF, steps=3, path=path).images
                for each, path in ((model, None), (outer, None), (held, None), (whole, "BPDA"))]

    before = attacked()
    model.layers[1].activation = keras.activations.tanh
    for one, other in zip(before, attacked(), strict=True):
        assert np.abs(one - other).max() > 1e-3
    np.testing.assert_allclose(evaluation.logits(model, X), model(X, training=False), atol=1e-5)
    hidden = np.tanh(X.reshape(N, -1) @ model.layers[1].kernel.numpy())
    np.testing.assert_allclose(closeness.activations(model, X), hidden, atol=1e-5)


def test_a_layer_that_is_replaced_or_dropped_counts_from_the_next_call_on():
    model = keras.Sequential([layers.Input(SHAPE), *bare().layers, layers.Softmax()])
    with pytest.raises(ValueError, match="drop its softmax"):
        evaluation.logits(model, X)
    model.pop()
    np.testing.assert_allclose(evaluation.logits(model, X), evaluation.logits(three_classes, X), atol=1e-5)
    model.pop()
    model.add(layers.Dense(4))
    np.testing.assert_allclose(evaluation.logits(model, X), model(X, training=False), atol=1e-5)


def test_the_gradient_of_mixed_precision_is_that_of_its_copy_in_float64():
    errors, kinked = evaluation.gradient_errors(mixed(), X, Y)
    assert errors[~kinked].max() < 1e-5
    assert {weights.dtype for weights in models.as_float64(mixed()).get_weights()} == {np.dtype("float64")}


def test_a_network_that_draws_does_not_fall_because_it_is_asked_often():
    """Each image is right on 85 % of the draws, whatever so small a change is: one of many medians is not."""
    rng, y = np.random.default_rng(0), np.zeros(200, int)

    def coin(x):
        return np.where(rng.random((len(x), 1)) < 0.85, [[2.0, 0.0]], [[0.0, 2.0]]).astype("float32")

    curve = evaluation.survivors(coin, [0, 1e-6, 1e-5], np.resize(X, (200, *SHAPE)), y, steps=40).mean(axis=1)
    assert curve.min() > 0.97


# ── Labels and images ──


@pytest.mark.parametrize("kind", ["uint8", "int32", "uint64"])
def test_labels_of_any_whole_kind_are_the_same_labels(kind):
    y = Y.astype(kind)
    for attack in (ATTACKS["pgd"], ATTACKS["apgd"], ATTACKS["normalised"]):
        np.testing.assert_array_equal(attack(NET, X, y).images, attack(NET, X, Y).images)
    assert evaluation.score(NET, X, y) == evaluation.score(NET, X, Y)
    histories = [training.fit(bare(), X, labels, epochs=1) for labels in (y, Y)]
    assert histories[0] == histories[1]


READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize("x", [np.asfortranarray(X), READ_ONLY, np.repeat(X, 2, axis=0)[::2], X[:, ::-1][:, ::-1]],
                         ids=["Fortran's order", "read-only", "every second", "turned twice"])
def test_an_array_may_lie_in_memory_as_it_likes(x):
    for name, attack in ATTACKS.items():
        np.testing.assert_allclose(attack(NET, x, Y).images, attack(NET, X, Y).images, atol=1e-6, err_msg=name)
    assert training.fit(bare(), x, Y, epochs=1) == training.fit(bare(), X, Y, epochs=1)


def test_one_image_and_a_last_batch_of_one():
    for name, attack in ATTACKS.items():
        whole, one = attack(NET, X, Y), attack(NET, X[:1], Y[:1])
        assert one.images.shape == (1, *SHAPE) and np.isfinite(one.value).all(), name
        if name != "lbfgs":  # which takes one image after the other
            np.testing.assert_allclose(attack(NET, X, Y, batch_size=N - 1).images, whole.images, atol=1e-5)
    assert np.isfinite(training.fit(network(), X, Y, epochs=1, batch_size=N - 1)["loss"]).all()
    assert evaluation.survivors(NET, [0, 0.1], X[:1], Y[:1], steps=1).shape == (2, 1)


def test_an_l2_radius_beyond_all_images_is_that_of_all_images():
    beyond, free = (square(NET, X, Y, ThreatModel("l2", eps), queries=3) for eps in (1e6, np.inf))
    np.testing.assert_array_equal(beyond.images, free.images)


# ── Attacks on odd networks ──


def mixed():
    """A network that computes in float16 and keeps its weights in float32."""
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        return keras.Sequential([layers.Input(SHAPE), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(),
                                 layers.Dropout(0.3), layers.Dense(3)])
    finally:
        keras.mixed_precision.set_dtype_policy("float32")


@every_attack
def test_a_network_of_mixed_precision_is_attacked_in_float32(attack):
    found = attack(mixed(), X, Y)
    assert found.images.dtype == found.value.dtype == np.float32 and np.isfinite(found.value).all()
    assert (found.images != X[: len(found.images)]).any() or attack is ATTACKS["lbfgs"]  # in so few steps


def test_mixed_precision_trains_and_its_file_is_found(tmp_path):
    model, before = mixed(), mixed()
    assert models.digest(model) == models.digest(before)
    for adversary in (None, training.Adversary(0.1)):
        history = training.fit(model, X, Y, epochs=20, learning_rate=0.01, adversary=adversary, validation=(X, Y))
        assert history["loss"][-1] < history["loss"][0] and history["validation_loss"][-1] < np.log(3)
    again = models.load(tmp_path / models.save(model, tmp_path))
    np.testing.assert_array_equal(evaluation.logits(again, X), evaluation.logits(model, X))
    np.testing.assert_allclose(uncertainty.sample(again, X, draws=3), uncertainty.sample(model, X, draws=3), atol=1e-3)


def test_mixed_precision_is_measured_in_float32():
    model = mixed()
    votes, hidden = uncertainty.sample(model, X, draws=5), closeness.activations(model, X)
    assert votes.dtype == hidden.dtype == np.float32
    np.testing.assert_allclose(votes.sum(axis=2), 1, atol=1e-6)
    near = Closeness.fit(closeness.activations(model, rng_images(60)), np.arange(60) % 3, 1.0, 3)
    table = detection.features(model, X, near.thin(10), draws=2)
    assert np.isfinite(table[[*FEATURES]].to_numpy()).all()
    whole = detection.Guarded(model, Detector(dict.fromkeys(FEATURES, 0.1), 0.0), near, 0.0, draws=2)
    assert np.isfinite(attacks.pgd(whole, X, Y, L2, steps=2, path="EOT").value).all()


def test_a_lambda_layer_is_attacked_like_what_it_computes():
    twice = keras.Sequential([layers.Input(SHAPE), layers.Lambda(lambda x: 2 * x), layers.Flatten(), layers.Dense(3)])
    twice.layers[-1].set_weights([MANY / 2, np.zeros(3)])
    np.testing.assert_allclose(ATTACKS["pgd"](twice, X, Y).images, ATTACKS["pgd"](three_classes, X, Y).images,
                               atol=1e-5)


def test_a_lambda_layer_is_refused_before_it_is_in_a_file_that_nobody_can_read(tmp_path):
    inner = keras.Sequential([layers.Input(SHAPE), layers.Lambda(lambda x: 2 * x, name="twice")])
    with pytest.raises(ValueError, match=r"Lambda layers \['twice'\]"):
        models.save(keras.Sequential([inner, layers.Flatten(), layers.Dense(3)]), tmp_path)
    assert not [*tmp_path.iterdir()]


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A network of a class of its own, which knows no shapes beforehand."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = bare()

    def call(self, x, training=False):
        return self.inner(x, training=training)


def test_a_network_of_a_class_of_its_own_is_attacked():
    np.testing.assert_allclose(ATTACKS["pgd"](Subclassed(), X, Y).images, ATTACKS["pgd"](bare(), X, Y).images)
    with pytest.raises(ValueError, match="gives shape"):
        ATTACKS["pgd"](keras.Sequential([layers.Input(SHAPE), layers.Conv2D(3, 3)]), X, Y)


def test_a_network_that_cannot_be_copied_in_float64_is_checked_without():
    twice = keras.Sequential([layers.Input(SHAPE), layers.Lambda(lambda x: 2 * x), layers.Flatten(), layers.Dense(3)])
    assert [row["passed"] for row in evaluation.gradient_flags(twice, X, Y)] == [True, True]
    with pytest.raises(TypeError, match="makes no copy in float64"):
        models.as_float64(twice)


def test_a_function_of_numpy_is_evaluated_and_has_no_gradient():
    def model(x):
        return np.asarray(x).reshape(len(x), -1) @ MANY

    np.testing.assert_allclose(evaluation.logits(model, X), evaluation.logits(three_classes, X), atol=1e-5)
    np.testing.assert_array_equal(ATTACKS["bim"](model, X, Y).images, X)
    assert not evaluation.gradient_flags(model, X, Y)[0]["passed"]


def several(inputs=1, outputs=1):
    images = [keras.Input(SHAPE) for _ in range(inputs)]
    flat = layers.Flatten()(layers.Add()(images) if inputs > 1 else images[0])
    return keras.Model(images, [layers.Dense(3)(flat) for _ in range(outputs)])


@pytest.mark.parametrize(("model", "message"), [
    (keras.Sequential([layers.Input((16,)), layers.Dense(3)]), r"x holds .*\(4, 4, 1\); expected \(16,\), the size"),
    (several(inputs=2), "model takes 2 tensors; expected one, images"),
    (several(outputs=2), r"model gives 2 tensors; expected one, logits \(n, classes\)"),
], ids=["flat", "two inputs", "two outputs"])
def test_networks_of_another_kind_are_refused_by_what_they_take_and_give(model, message):
    for door in (ATTACKS["pgd"], evaluation.score):
        with pytest.raises(ValueError, match=message):
            door(model, X, Y)


@pytest.mark.parametrize("name", ["bim", "normalised", "apgd", "lbfgs", "fab"])
def test_a_gradient_that_is_nan_is_no_robustness(name):
    x = X.copy()
    x[:, 0, 0] = 0.5  # where the derivative of the root is infinite
    cusps = steady(lambda x: tf.reduce_sum(tf.sqrt(tf.abs(x - 0.5)), axis=(1, 2)) * [1.0, -1.0, -2.0])
    options = {"start": x} if name == "apgd" else {}
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        ATTACKS[name](cusps, x, np.zeros(N, int), **options)


def test_what_is_wrong_already_is_given_back_at_once():
    y = evaluation.logits(three_classes, X).argmax(axis=1)
    for name in ("pgd", "ddn", "apgd", "fab", "square"):
        found = ATTACKS[name](three_classes, X, (y + 1) % 3)
        assert (found.value > 0).all(), name
        np.testing.assert_array_equal(found.images, X, name)


# ── Memory and graphs ──


def test_a_thousand_calls_trace_nothing_new_and_keep_nothing():
    traces, rng = [], np.random.default_rng(0)

    @steady
    def model(x):
        traces.append(x.shape)
        return LINEAR(x)

    def call(seed):
        n = int(rng.integers(2, N + 1))
        attacks.pgd(model, X[:n], Y[:n] % 2, ThreatModel("linf", float(rng.uniform(0.01, 0.2))), seed=seed,
                    steps=int(rng.integers(1, 4)), batch_size=int(rng.integers(1, 99)))
        evaluation.logits(model, X[:n], batch_size=n)

    def held():
        gc.collect()
        return len(gc.get_objects())

    for seed in range(20):
        call(seed)
    before, objects = len(traces), held()
    for seed in range(500):  # of two calls each
        call(seed)
    assert len(traces) == before
    assert held() - objects < 500, "something is kept from every call"


def test_fifty_networks_leave_none_behind():
    dropped, held = [], []
    for _ in range(50):
        model = bare()
        evaluation.logits(model, X)
        dropped.append(weakref.ref(model))
        del model
        if len(dropped) % 25 == 0:
            gc.collect()
            held.append(len(gc.get_objects()))
    assert sum(ref() is not None for ref in dropped) == 0
    assert held[1] - held[0] < 25 * 20, "something is kept from every network"


# ── Detectors and SVMs ──


def test_the_same_samples_with_two_labels_are_fitted_to_a_draw():
    h, y = np.repeat(np.random.default_rng(0).normal(size=(15, 4)), 2, axis=0).astype("float32"), np.arange(30) % 2
    gram = svm.gram(h, 0.5)
    weights, bias = svm.duals(gram, y, 1.0)
    np.testing.assert_allclose(gram @ weights + bias, 0, atol=1e-5)
    assert all(np.isfinite(part).all() for part in svm.duals(gram, y, 1e6))
    assert np.isfinite(svm.platt(svm.out_of_fold(gram, y, 1.0, 5), y)).all()
    assert np.isfinite(svm.platt(svm.out_of_fold(svm.gram(np.ones((30, 4), "float32"), 0.5), y, 1.0, 5), y)).all()


def test_a_feature_that_is_constant_gets_no_weight():
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 6)), columns=FEATURES).assign(KDE=7.0)
    detector = Detector.fit(frame + np.array([1, 1, 1, 1, 0, 1]), frame)
    assert detector.weights["KDE"] == 0 and np.isfinite(detector.score(frame)).all()


@pytest.mark.parametrize("bandwidth", [1e-15, 1e-6, 1e6, 1e15])
def test_a_tiny_and_a_huge_bandwidth_give_a_density_and_no_nan(bandwidth):
    h, y = np.abs(np.random.default_rng(0).normal(size=(12, 5))).astype("float32"), np.arange(12) % 3
    near = Closeness.fit(h, y, bandwidth, 3)
    away, on = near.log_density(h + 1, y), near.log_density(h, y)
    assert not np.isnan(away).any() and np.isfinite(on).all()
    if bandwidth > 1:  # every point is as near as any other
        np.testing.assert_allclose([away, on], 0, atol=1e-5)
    else:
        assert (away < on - 1e6).all()


# ── Files ──


def test_no_flipped_bit_of_a_network_goes_unnoticed(tmp_path):
    model = bare()
    path = tmp_path / models.save(model, tmp_path)
    content, noticed = path.read_bytes(), 0
    for at in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            np.testing.assert_array_equal(models.load(path).get_weights()[0], MANY)  # a date, say, is no part of it
        except ValueError as error:
            assert f"{path.name} is damaged" in str(error)
            noticed += 1
    assert noticed > 20


class Answer(BaseHTTPRequestHandler):
    """A proxy that gives the same page to whatever is asked for."""

    def do_GET(self):
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(b"<html>Please log in</html>")

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    """A proxy between this machine and the data, and an empty cache."""
    monkeypatch.delenv("HELPERS_DATA", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    entry = ["http://data.example/mnist.npz", f"sha256:{hashlib.sha256(b'the file').hexdigest()}"]
    monkeypatch.setitem(data._SOURCES, "mnist", data._SOURCES["mnist"] | {"files": [entry]})
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("status", [200, 404, 407, 503])
def test_a_proxy_that_refuses_and_a_page_that_is_not_there_are_named(proxy, tmp_path, status):
    proxy.status = status
    with pytest.raises(OSError, match="'mnist'.* download to .* failed .*use the profile 'smoke'") as error:
        data.load("mnist")
    assert ("does not match" if status == 200 else str(status)) in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_within_another_repository_does_not_take_its_commit(tmp_path, monkeypatch):
    root = tmp_path / "theirs/book-main"
    (root / "src/helpers").mkdir(parents=True)
    (root / "book").mkdir()
    (root / "book/claims.yml").touch()
    monkeypatch.setattr(provenance, "_PACKAGE", root / "src/helpers")
    git(tmp_path / "theirs", "init")
    git(tmp_path / "theirs", "add", ".")
    git(tmp_path / "theirs", "commit", "-m", "first")
    assert provenance.revision() == (f"v{provenance.__version__}", None)
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    assert provenance.revision() == (git(root, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("ends", ["\r\n", "\n"])
def test_line_ends_of_windows_make_no_other_notebook(tiny, ends):
    book = tiny(RECORD, "x = 1\ny = 2")
    path, before = book.root / "notebooks/02_tiny.ipynb", book.source("02_tiny")
    path.write_bytes(path.read_bytes().replace(b"\n", ends.encode()))
    assert same_code(book.source("02_tiny"), before) and book.code("02_tiny").endswith("x = 1\ny = 2")


def test_a_notebook_that_colab_has_saved_is_shown_like_any_other(tiny):
    """Without ids of cells, which it keeps as metadata, in format 4.0, and with what it adds of its own."""
    book = tiny(RECORD)
    commit(book)
    path = book.root / "notebooks/02_tiny.ipynb"
    saved = json.loads(path.read_text())
    saved |= {"nbformat_minor": 0, "metadata": saved["metadata"] | {"colab": {"provenance": []}, "accelerator": "GPU"}}
    for cell in saved["cells"]:
        cell["metadata"] |= {"id": cell.pop("id"), "colab": {"base_uri": "https://localhost:8080/"}}
    saved["cells"].append({"cell_type": "markdown", "metadata": {}, "source": ["A note"]})
    path.write_text(json.dumps(saved))
    page = _page(book, "02_tiny", book.committed("02_tiny")[0])
    nbformat.validate(page)
    assert [cell.id for cell in page.cells] == ["title", "parameters", "c0", "cell-3"]
    assert page.cells[2].outputs[0].text == "the paper run" and book.code("02_tiny").endswith(RECORD)


@pytest.mark.parametrize("line", ["", "a\rb", "\r", "a\r\n", "a\rb\rc\nd\r", "a\n\rb\r\r\nc", "\r\r\rx\r\n\ry"])
def test_what_is_printed_over_is_what_nbclient_takes_away(line):
    """Whose pattern takes the square of a line's length: book/test_execute has the long one."""
    assert execution.OVERWRITTEN.sub("", line) == re.sub(r".*\r(?=[^\n])", "", line)


# ── Places ──


@pytest.mark.parametrize("folder", ["Übung ε", 'a "quoted" one', "a[b]", "back\\slash", "plain"])
@pytest.mark.parametrize("before", ["", "on the next line\n", "\t"])
def test_no_folder_of_this_machine_stays_on_a_page(tiny, folder, before):
    book = tiny(RECORD, folder=folder)
    commit(book, printed=f"{before}{book.root}/data/x {book.output}/y")
    page = _page(book, "02_tiny", book.committed("02_tiny")[0])
    assert page.cells[-1].outputs[0].text == f"{before}data/x y"


# ── Unclear errors ──

FRAME = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 6)), columns=FEATURES)
HIDDEN = np.abs(np.random.default_rng(0).normal(size=(N, 5))).astype("float32")


def brighter(by):
    x = X.copy()
    x[0, 0, 0] = np.float32(1) + np.float32(by)
    return x


def sampled(seed):
    keras.utils.set_random_seed(0)
    return uncertainty.sample(keras.Sequential([layers.Input(SHAPE), layers.Flatten(), layers.Dropout(0.5),
                                                layers.Dense(3)]), X, draws=2, seed=seed)


@pytest.mark.parametrize("eps", ["8/255", None, [0.1, 0.2], np.array([0.1, 0.2])], ids=str)
def test_an_eps_that_is_no_number_is_named(eps):
    for threat in (lambda: ThreatModel("linf", eps), lambda: training.Adversary(eps)):
        with pytest.raises(ValueError, match=rf"eps is {re.escape(str(eps))}; expected a number >= 0"):
            threat()


@pytest.mark.parametrize("grid", [["8/255"], [None], None, 0.1, "8/255", [[0.1, 0.2]], [0.1, np.inf]], ids=str)
def test_a_grid_that_is_no_rising_eps_is_named(grid):
    with pytest.raises(ValueError, match="grid is .*; expected rising eps values >= 0"):
        evaluation.survivors(NET, grid, X, Y)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "a", 2**31])
@pytest.mark.parametrize("call", [
    lambda seed: attacks.pgd(NET, X, Y, LINF, seed=seed), lambda seed: square(NET, X, Y, LINF, seed=seed),
    lambda seed: training.fit(bare(), X, Y, epochs=1, seed=seed), sampled], ids=["pgd", "square", "fit", "sample"])
def test_a_seed_that_is_none_is_named(call, seed):
    with pytest.raises(ValueError, match=f"seed is {seed!r}; expected a whole number >= 0"):
        call(seed)


@pytest.mark.parametrize("bandwidth", [1e200, 1e-200, None, "silverman"])
def test_a_bandwidth_without_a_square_is_named(bandwidth):
    for fit in (lambda: Closeness.fit(HIDDEN, Y, bandwidth, 3), lambda: adaptive.kernel_density(X, Y, bandwidth)):
        with pytest.raises(ValueError, match=re.escape(f"bandwidth is {bandwidth}; expected a")):
            fit()


LINE = Detector({"KL": 1.0}, 0.0)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: svm.gram(HIDDEN, "scale"), "gamma is scale; expected a finite number > 0"),
    (lambda: rejection.fit(bare(), np.repeat(X, 5, 0), np.repeat(Y, 5), layers=(1,), gamma="auto"), "gamma is auto"),
    (lambda: Detector.fit(FRAME[:0], FRAME), "positives is empty; expected the features of one image or more"),
    (lambda: Detector.fit(FRAME, FRAME[:0]), "negatives is empty"),
    (lambda: detection.area([], []), "positives is empty"),
    (lambda: LINE.auc(FRAME[:0], FRAME), "positives is empty"),
    (lambda: LINE.threshold(FRAME[:0]), "clean is empty"),
    (lambda: Closeness.fit(HIDDEN, Y, 1.0, 3).kl(HIDDEN[:0], Y[:0]), "y is empty"),
    (lambda: evaluation.difference_interval([True], [False]), "a and b are of 1 images; expected two"),
    (lambda: ATTACKS["pgd"](NET, brighter(1.2e-7), Y), r"in \[0.0, 1.0\], which it leaves by 1.2e-07"),
    (lambda: ATTACKS["pgd"](NET, brighter(254), Y), r"in \[0.0, 1.0\], which it leaves by 2.5e.02"),
])
def test_an_error_says_which_argument_what_came_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
