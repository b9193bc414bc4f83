"""Neural rejection: the SVMs are scikit-learn's, their gradients right, refusals counted, and attacks within bounds."""

from dataclasses import replace
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy.special import expit
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC

from helpers import adaptive, attacks, evaluation, models, rejection, soundness
from helpers import svm as svms
from helpers.defence import Outputs, answers
from helpers.losses import evasion
from helpers.rejection import Rejection
from helpers.svm import SVM
from helpers.threat import ThreatModel

SHAPE, CLASSES = (6, 6, 1), 3


def images(n=90, seed=0):
    """Three classes: the upper, middle or lower two rows are lighter, under noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    x = rng.uniform(0, 0.5, (n, *SHAPE))
    for k in range(CLASSES):
        x[y == k, 2 * k : 2 * k + 2] += 0.4
    return x.astype("float32"), y


X, Y = images()
NEW, NEW_Y = images(30, seed=1)


@pytest.fixture(scope="module")
def network():
    """A small network with the paper's kinds of layers: convolution, pooling, two dense ones (numbers 1 to 5)."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential([
        layers.Input(SHAPE), layers.Conv2D(4, 3, padding="same", activation="relu"), layers.MaxPooling2D(),
        layers.Flatten(), layers.Dense(8, activation="relu"), layers.Dropout(0.5), layers.Dense(8, "relu"),
        layers.Dense(CLASSES),
    ])
    net.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.fit(X, Y, epochs=15, batch_size=30, verbose=0)
    return net


@pytest.fixture(scope="module")
def dnr(network):
    return rejection.fit(network, X, Y, layers=(1, 3, 4), C=1.0, gamma=0.05)


@pytest.fixture(scope="module")
def nr(network):
    return rejection.fit(network, X, Y, layers=(4,), C=1.0, gamma=0.05)


@pytest.fixture(params=["bare", "nr", "dnr"])
def defence(request, network):
    return Rejection(network) if request.param == "bare" else request.getfixturevalue(request.param)


def blobs(n=150, p=5, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    return (rng.normal(size=(n, p)) + 2 * np.eye(p)[y]).astype("float32"), y


def fitted(h, y, C, gamma):
    gram = svms.kernel(svms.squared_distances(h), gamma)
    return svms.SVM.of(h, *svms.duals(gram, y, C), gamma, C)


# ── The SVMs ──


@pytest.mark.parametrize(("C", "gamma"), [(0.1, 0.01), (1.0, 0.2), (10.0, 1.0)])
def test_decision_values_are_those_of_scikit_learn(C, gamma):
    (h, y), (new, _) = blobs(), blobs(40, seed=1)
    ours = fitted(h, y, C, gamma).scores(tf.constant(new, tf.float64)).numpy()
    for k in range(CLASSES):
        theirs = SVC(C=C, gamma=gamma, tol=1e-4).fit(h.astype("float64"), y == k)
        np.testing.assert_allclose(ours[:, k], theirs.decision_function(new.astype("float64")), atol=1e-4)


def test_duals_folds_and_grid_are_those_of_scikit_learn_on_the_same_kernel():
    (h, y), folds = blobs(), StratifiedKFold(5, shuffle=True, random_state=0)
    distances = svms.squared_distances(h)
    gram, theirs = svms.kernel(distances, 0.2), OneVsRestClassifier(SVC(kernel="precomputed", tol=1e-4))
    weights, bias = svms.duals(gram, y, 1.0)
    np.testing.assert_allclose(gram @ weights + bias, theirs.fit(gram, y).decision_function(gram), atol=1e-12)
    np.testing.assert_allclose(svms.out_of_fold(gram, y, 1.0),
                               cross_val_predict(theirs, gram, y, cv=folds, method="decision_function"), atol=1e-12)
    search = GridSearchCV(theirs, {"estimator__C": [0.01, 1.0]}, cv=folds, refit=False).fit(gram, y).cv_results_
    np.testing.assert_allclose(svms.grid_search(distances, y, [0.01, 1.0], [0.2])[0],
                               np.stack([search[f"split{fold}_test_score"] for fold in range(5)], axis=1))


def test_only_support_vectors_are_kept():
    h, y = blobs()
    svm = fitted(h, y, 1.0, 0.1)
    own = [SVC(C=1.0, gamma=0.1, tol=1e-4).fit(h.astype("float64"), y == k).support_ for k in range(CLASSES)]
    np.testing.assert_array_equal(svm.vectors, h[np.unique(np.concatenate(own))])
    assert svm.columns.all()
    assert (svm.weights == 0).any() and svm.weights.any(axis=1).all()  # a union: not each supports each class


@pytest.mark.parametrize("rows", [7, 64, 2048])
def test_distances_do_not_depend_on_the_blocks(rows):
    h, _ = blobs(p=300)
    exact = ((h[:, None].astype("float64") - h) ** 2).sum(-1)
    found = svms.squared_distances(h, rows)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found, found.T, rtol=1e-5, atol=1e-3)
    assert not found.diagonal().any() and found.dtype == np.float32


def test_an_offset_that_all_features_share_costs_no_digits():
    h = np.random.default_rng(0).normal(100, 0.01, (30, 12544)).astype("float32")
    wide = h.astype("float64")
    exact = ((wide[:, None] - wide) ** 2).sum(axis=-1)
    np.testing.assert_allclose(svms.squared_distances(h, 7), exact, atol=1e-5)  # about 2.5; 70 too large once


@pytest.mark.parametrize(("omp", "threads"), [("", 1), ("3", 3)])
def test_the_machines_are_fitted_on_the_cores_that_the_process_may_use(monkeypatch, omp, threads):
    asked, pool = [], svms.ThreadPoolExecutor
    monkeypatch.setattr(svms, "ThreadPoolExecutor", lambda n: asked.append(n) or pool(n))
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    fitted(*blobs(), 1.0, 0.1)
    assert asked == [threads]


def test_out_of_fold_scores_come_from_the_other_folds():
    """Labels that cannot be learnt: in-sample scores know them by heart, out-of-fold scores do not."""
    rng = np.random.default_rng(0)
    h, y = rng.normal(size=(120, 20)).astype("float32"), np.arange(120) % CLASSES
    gram = svms.kernel(svms.squared_distances(h), 0.5)
    weights, bias = svms.duals(gram, y, 10.0)
    assert ((gram @ weights + bias).argmax(1) == y).all()
    assert (svms.out_of_fold(gram, y, 10.0).argmax(1) == y).mean() < 0.6


def test_the_grid_search_tells_a_kernel_that_learns_by_heart():
    h, y = blobs(p=20)
    found = svms.grid_search(svms.squared_distances(h), y, [0.1, 1.0], [1e-4, 0.05, 50.0], folds=3)
    assert found.shape == (3, 2, 3)
    assert found[1].mean() > found[2].mean() + 0.3
    rows = svms.out_of_fold(svms.kernel(svms.squared_distances(h), 0.05), y, 1.0, folds=3)
    assert found[1, 1].mean() == pytest.approx((rows.argmax(1) == y).mean())


def test_probabilities_are_calibrated():
    """Scores whose true log-odds are 2 s - 1: the fitted line is found again."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 2))
    y = (rng.uniform(size=4000) < expit(2 * scores[:, 1] - 1)).astype(int)
    np.testing.assert_allclose(svms.platt(scores, y)[:, 1], [2, -1], atol=0.2)
    far = np.stack([-np.sign(y - 0.5), np.sign(y - 0.5)], axis=1)  # separated: Platt's targets keep the slope finite
    assert 1 < svms.platt(far, y)[0, 1] < 20


# ── Gradients ──


def single(x):
    """An SVM of one class and two vectors by hand: scores and gradient from the equation."""
    weights, bias = np.array([[1.0], [-0.5]]), np.array([0.3])
    svm = SVM(np.array([[0.0, 0.0], [1.0, 2.0]], "float32"), np.ones(2, bool), weights, bias, 0.7, 1.0)
    h = tf.constant(x, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(h)
        scores = svm.scores(h, dtype=tf.float64)
    kernel = np.exp(-0.7 * ((x[:, None] - svm.vectors) ** 2).sum(-1))
    by_hand = -2 * 0.7 * ((kernel * svm.weights[:, 0])[:, :, None] * (x[:, None] - svm.vectors)).sum(1)
    return scores.numpy()[:, 0], kernel @ svm.weights[:, 0] + 0.3, tape.gradient(scores, h).numpy(), by_hand


def test_the_rbf_gradient_is_that_of_the_equation():
    scores, expected, gradient, by_hand = single(np.random.default_rng(0).normal(size=(20, 2)))
    np.testing.assert_allclose(scores, expected, rtol=1e-10)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-9, atol=1e-12)


def test_features_that_no_support_vector_has_still_count():
    """They are dropped from the products, not from the distance."""
    h, y = blobs()
    h[:, 3:] = 0
    svm, new = fitted(h, y, 1.0, 0.1), tf.constant(blobs(8, seed=1)[0], tf.float64)
    assert svm.vectors.shape[1] == 3 and svm.columns.tolist() == [True] * 3 + [False] * 2
    whole = replace(svm, vectors=np.pad(svm.vectors, ((0, 0), (0, 2))), columns=np.ones(5, bool))
    gradients = []
    for machine in (svm, whole):
        with tf.GradientTape() as tape:
            tape.watch(new)
            scores = machine.scores(new)
        gradients.append((scores.numpy(), tape.gradient(scores, new).numpy()))
    np.testing.assert_allclose(gradients[0][0], gradients[1][0], rtol=1e-6)
    np.testing.assert_allclose(gradients[0][1], gradients[1][1], rtol=1e-5, atol=1e-9)
    assert np.abs(gradients[0][1][:, 3:]).max() > 1e-3


def test_the_input_gradient_agrees_with_finite_differences(defence):
    exact, rng, h = defence.as_float64(), np.random.default_rng(0), 1e-6
    x = tf.constant(NEW[:5] + rng.uniform(-0.01, 0.01, NEW[:5].shape), tf.float64)
    v = rng.normal(size=x.shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(exact(x).logits * [1.0, -2.0, 0.5], axis=1)
    slope = tf.reduce_sum(tape.gradient(total, x) * v, axis=(1, 2, 3))
    ends = [tf.reduce_sum(exact(x + s * v).logits * [1.0, -2.0, 0.5], axis=1) for s in (h, -h)]
    assert np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def directions(defence, x, scaled):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        scores = defence.scores(x, scaled=scaled)[:, 0]
    gradient = tape.gradient(scores, x).numpy().astype("float64").reshape(len(x), -1)
    return gradient, gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-300)


def test_a_kernel_that_underflows_in_float32_keeps_its_direction(nr):
    """gamma d^2 of about 250: exp(-250) is 0 in float32."""
    h = rejection.features(nr.network, NEW, (4,))[0].astype("float64")
    vectors = np.zeros((len(nr.svms[0].vectors), 8))
    vectors[:, nr.svms[0].columns] = nr.svms[0].vectors
    nearest = ((h[:, None] - vectors) ** 2).sum(-1).min(1)
    sharp = replace(nr, svms=(replace(nr.svms[0], gamma=250 / nearest.max()),))
    i = np.argsort(nearest)[-3:]
    assert not directions(sharp, NEW[i], scaled=False)[0][-1].any()  # lost
    exact = directions(sharp.as_float64(), NEW[i].astype("float64"), scaled=False)[1]
    np.testing.assert_allclose(directions(sharp, NEW[i], scaled=True)[1], exact, atol=1e-3)


def test_a_gradient_that_float32_holds_is_not_scaled(dnr):
    np.testing.assert_array_equal(directions(dnr, NEW, scaled=True)[0], directions(dnr, NEW, scaled=False)[0])


def test_a_smaller_gamma_widens_the_kernel(dnr):
    np.testing.assert_array_equal(dnr.smoothed(1.0).scores(NEW), dnr.scores(NEW))
    halved = replace(dnr, svms=tuple(replace(svm, gamma=svm.gamma / 2) for svm in dnr.svms),
                     combiner=replace(dnr.combiner, gamma=dnr.combiner.gamma / 2))
    wide = dnr.smoothed(0.5)
    np.testing.assert_allclose(wide.scores(NEW), halved.scores(NEW))
    assert np.abs(wide.scores(NEW) - dnr.scores(NEW)).max() > 0.01
    assert dnr.smoothed(0.5) is wide and wide.threshold == dnr.threshold, "kept, with its graphs"


# ── Thin machines ──


def layer(n, seed, rest=0.05):
    """Features in 8 directions of 600, about classes, and a little of everything else, which is what is lost."""
    rng = np.random.default_rng((1, seed))
    y, directions = np.arange(n) % CLASSES, np.random.default_rng(7).normal(size=(8, 600))
    inside = rng.normal(size=(n, 8)) + 2 * np.eye(8)[y]
    return (5 + inside @ directions / 600**0.5 + rest * rng.normal(size=(n, 600)) / 600**0.5).astype("float32"), y


def test_a_thin_machine_has_the_decision_values_and_gradients_of_the_whole():
    (h, y), (probe, _), (new, _) = layer(300, 0), layer(40, 1), layer(40, 2)
    svm = fitted(h, y, 1.0, 0.1)
    thin = svm.thin(probe, ranks=(4, 24, 100))
    assert thin.basis.shape == (600, 24) and thin.vectors.shape == (len(svm.vectors), 24), "4 directions were too few"
    np.testing.assert_allclose(thin.basis.T @ thin.basis, np.eye(24), atol=1e-5)
    found = []
    for machine in (svm, thin):
        x = tf.constant(new, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(x)
            scores = machine.scores(x)
        found.append((scores.numpy(), tape.gradient(scores, x).numpy()))
    assert 0 < np.abs(found[0][0] - found[1][0]).max() < 1e-3
    length = np.linalg.norm(found[0][1], axis=1)  # the pull along the rest is what is lost
    assert (np.linalg.norm(found[0][1] - found[1][1], axis=1) < 0.15 * length).all()


def test_what_a_thin_machine_loses_is_bounded():
    (h, y), (new, _) = layer(300, 0, rest=1.0), layer(40, 2, rest=1.0)
    svm = fitted(h, y, 1.0, 0.1)
    thin = svm.thin(new, tolerance=1.0, ranks=(8,))
    exact = ((new[:, None].astype("float64") - svm.vectors) ** 2).sum(axis=2)
    away = new.astype("float64") - thin.centre
    inside = away[:, thin.columns] @ thin.basis
    kept = (away**2).sum(axis=1)[:, None] + thin.norms - 2 * inside @ thin.vectors.T
    lost = np.abs(exact - kept).max(axis=1)
    assert (lost <= thin.lost(new) * (1 + 1e-5)).all() and lost.max() > 0.01 and not svm.lost(new).any()


def test_a_machine_that_would_change_or_is_narrow_stays_whole():
    (h, y), (probe, _) = layer(300, 0, rest=3.0), layer(40, 1, rest=3.0)
    svm = fitted(h, y, 1.0, 0.3)
    assert svm.thin(probe, tolerance=1e-6, ranks=(2, 4)) is svm
    narrow = fitted(*blobs(), 1.0, 0.1)
    assert narrow.thin(blobs(8, seed=1)[0]) is narrow


def test_a_thin_defence_is_saved_and_attacked_like_the_whole(network, dnr, tmp_path):
    svm = dnr.svms[0]
    thin = replace(dnr, svms=(svm.thin(rejection.features(network, NEW, (1,))[0], 9.0, ranks=(16,)), *dnr.svms[1:]))
    assert thin.svms[0].basis is not None
    again = rejection.load(tmp_path / rejection.save(thin, tmp_path))
    np.testing.assert_array_equal(answers(again, NEW).logits, answers(thin, NEW).logits)
    found = attacks.pgd(again, NEW, NEW_Y, ThreatModel("l2", 0.7), steps=10)
    np.testing.assert_array_equal(found.value > 0, evaluation.outcomes(thin, found.images, NEW_Y) == 2)


@pytest.mark.parametrize("gamma", [0.01, 3.0])
def test_a_kernel_made_in_one_matrix_is_that_of_the_distances(gamma):
    h, _ = blobs(p=300)
    both = svms.gram(h, gamma), svms.kernel(svms.squared_distances(h), gamma)
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-7)
    assert both[0].dtype == np.float64 and (both[0].diagonal() == 1).all()


# ── The defences ──


def test_features_are_the_layers_outputs_in_test_mode(network):
    assert [h.shape for h in rejection.features(network, X, (1, 2, 3, 5))] == [(90, 144), (90, 36), (90, 8), (90, 3)]
    np.testing.assert_allclose(rejection.features(network, X, (5,))[0], network(X, training=False), atol=1e-5)
    part = rejection.feature_network(network, (5,))
    graph = models.forward(part, X)
    rejection.features(network, X, [5])
    assert rejection.feature_network(network, (5,)) is part and models.forward(part, X) is graph, "traced once"


def test_dnr_is_a_combiner_on_the_scores_of_its_layers(dnr):
    stacked = [svm.scores(tf.constant(h, tf.float64)).numpy()
               for svm, h in zip(dnr.svms, rejection.features(dnr.network, NEW, dnr.layers), strict=True)]
    assert len(dnr.combiner.columns) == 3 * CLASSES
    expected = dnr.combiner.scores(tf.constant(np.concatenate(stacked, axis=1)))
    np.testing.assert_allclose(dnr.scores(NEW), expected, atol=1e-5)
    found, odds = answers(dnr, NEW), expected * dnr.platt[0] + dnr.platt[1]
    np.testing.assert_allclose(expit(found.logits), expit(odds), atol=1e-5)
    np.testing.assert_allclose(found.refusal, dnr.threshold - odds.numpy().max(axis=1), atol=1e-4)


def test_defences_classify_and_refuse(defence):
    shares = evaluation.rates(evaluation.outcomes(defence, NEW, NEW_Y))
    assert sum(shares.values()) == pytest.approx(1) and shares["correct"] > 0.9
    never = replace(defence, threshold=-np.inf)
    assert evaluation.rates(evaluation.outcomes(never, NEW, NEW_Y))["rejected"] == 0
    assert (answers(never, NEW).refusal == -np.inf).all()
    always = replace(defence, threshold=np.inf)
    assert evaluation.rates(evaluation.outcomes(always, NEW, NEW_Y))["rejected"] == 1


def test_the_paths_are_the_network_the_defence_and_the_smoothed_one(dnr):
    paths = dnr.paths()
    assert list(paths) == ["unaware", "smoothed", "exact"] and paths["exact"].outputs is dnr  # the strongest last
    np.testing.assert_allclose(paths["unaware"].outputs(NEW).logits, dnr.network(NEW, training=False), atol=1e-5)
    assert (paths["unaware"].outputs(NEW).refusal.numpy() == -np.inf).all()
    np.testing.assert_array_equal(paths["smoothed"].outputs(NEW).logits, dnr.smoothed(0.3)(NEW).logits)
    assert [path.losses for path in paths.values()] == [(), (rejection.margin,), (rejection.margin,)]


def test_an_attack_on_any_path_is_judged_by_the_defence(dnr):
    strict, threat = dnr.at_rate(X, 0.3), ThreatModel("l2", 2.0)
    found = {path: attacks.pgd(strict, NEW, NEW_Y, threat, steps=10, path=path) for path in strict.paths()}
    for each in found.values():
        np.testing.assert_array_equal(each.value > 0, evaluation.outcomes(strict, each.images, NEW_Y) == 2)
    assert (found["exact"].value > 0).sum() > (found["unaware"].value > 0).sum()


def test_outcomes_follow_the_most_probable_class(nr):
    z = answers(nr, NEW).logits
    best = expit(z.max(axis=1))
    for theta in (0.5, float(np.median(best)), 0.999):
        found = evaluation.outcomes(nr.at(theta), NEW, np.roll(NEW_Y, 1))
        seen = z.argmax(axis=1)
        expected = np.where(best < theta, 1, np.where(seen == np.roll(NEW_Y, 1), 0, 2))
        np.testing.assert_array_equal(found, expected)
        assert nr.at(theta).theta == pytest.approx(theta)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_the_threshold_refuses_the_wanted_share_of_clean_images(dnr, rate):
    refused = evaluation.outcomes(dnr.at_rate(NEW, rate), NEW, NEW_Y) == 1
    assert refused.mean() == pytest.approx(rate, abs=1 / len(NEW))


def test_out_of_fold_scores_change_the_combiner_only(network, dnr):
    folded = rejection.fit(network, X, Y, layers=(1, 3, 4), C=1.0, gamma=0.05, folds=5)
    for svm, other in zip(dnr.svms, folded.svms, strict=True):
        np.testing.assert_array_equal(svm.weights, other.weights)
    assert not np.array_equal(dnr.combiner.vectors, folded.combiner.vectors)


def test_the_combiner_may_be_given_probabilities(network, tmp_path):
    made = rejection.fit(network, X, Y, layers=(3, 4), C=1.0, gamma=0.05, probabilities=True)
    scores = [svm.scores(tf.constant(h, tf.float64)).numpy()
              for svm, h in zip(made.svms, rejection.features(network, NEW, (3, 4)), strict=True)]
    chances = [expit(s * a + b) for s, (a, b) in zip(scores, made.inner, strict=True)]
    np.testing.assert_allclose(made.scores(NEW), made.combiner.scores(np.concatenate(chances, axis=1)), atol=1e-5)
    assert evaluation.correct(made, NEW, NEW_Y).mean() > 0.8
    again = rejection.load(tmp_path / rejection.save(made, tmp_path))
    np.testing.assert_allclose(again.scores(NEW), made.scores(NEW), rtol=1e-12)


def test_an_uncalibrated_defence_answers_in_scores_and_refuses_by_rate(network, dnr):
    bare = rejection.fit(network, X, Y, layers=(1, 3, 4), C=1.0, gamma=0.05, calibrated=False)
    found = answers(bare, NEW)
    np.testing.assert_allclose(found.logits, dnr.scores(NEW), atol=1e-6)
    assert (found.refusal == -np.inf).all()
    assert (evaluation.outcomes(bare.at_rate(NEW, 0.2), NEW, NEW_Y) == 1).mean() == pytest.approx(0.2, abs=0.04)


def test_parameters_may_differ_by_layer(network):
    C = {1: 0.5, 3: 2.0, "combiner": 4.0}
    found = rejection.fit(network, X, Y, layers=(1, 3), C=C, gamma={1: 0.01, 3: 0.02, "combiner": 0.03})
    assert [(svm.C, svm.gamma) for svm in (*found.svms, found.combiner)] == [(0.5, 0.01), (2.0, 0.02), (4.0, 0.03)]


def test_shared_distances_and_a_second_fit_give_the_same(network, dnr):
    shared = rejection.prepare(network, X, (1, 3, 4))
    again = rejection.fit(network, X, Y, layers=(1, 3, 4), C=1.0, gamma=0.05, shared=shared)
    np.testing.assert_allclose(answers(again, NEW).logits, answers(dnr, NEW).logits, rtol=1e-3)  # float32 kernels


def test_labels_and_layers_may_be_lists(network, nr):
    again = rejection.fit(network, X, Y.tolist(), layers=[4], C=1.0, gamma=0.05)
    np.testing.assert_array_equal(answers(again, NEW).logits, answers(nr, NEW).logits)


def test_fitting_shows_progress_where_asked(network, capsys):
    rejection.fit(network, X, Y, layers=(4,), C=1.0)
    assert capsys.readouterr().err == ""
    rejection.fit(network, X, Y, layers=(4,), C=1.0, label="NR")
    assert "NR, layer 4" in capsys.readouterr().err


# ── On the disk ──


def test_a_saved_defence_is_loaded_alike(defence, tmp_path):
    name = rejection.save(defence.at(0.8), tmp_path)
    again = rejection.load(tmp_path / name)
    for found, expected in zip(answers(again, NEW), answers(defence.at(0.8), NEW), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert rejection.save(again, tmp_path) == name
    wide = rejection.load(tmp_path / rejection.save(defence.smoothed(0.3), tmp_path))
    assert wide.width == 0.3 and again.width == 1
    with np.load(tmp_path / name, allow_pickle=False) as npz:
        assert all(npz[key].dtype != object for key in npz)


def test_a_damaged_or_missing_file_is_named(nr, tmp_path):
    path = tmp_path / rejection.save(nr, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*; remove it, remove the folder 'units'"):
        rejection.load(path)
    with np.load(tmp_path / rejection.save(replace(nr, threshold=0.5), tmp_path)) as npz:
        np.savez(path, **npz)  # whole, and another defence
    with pytest.raises(ValueError, match="is damaged: its content is not that of its name; remove it, "):
        rejection.load(path)
    with pytest.raises(FileNotFoundError, match="no file .*absent.npz; remove the folder 'units' beside"):
        rejection.load(tmp_path / "absent.npz")


# ── Bad input ──


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"C": 0.0}, ValueError, "C is 0.0"),
    ({"C": float("nan")}, ValueError, "C is nan"),
    ({"gamma": -0.1}, ValueError, "gamma is -0.1"),
    ({"gamma": {4: 1.0}}, ValueError, "lack 3"),
    ({"C": {3: 1.0, 4: 1.0}}, ValueError, "lack 'combiner'"),
    ({"theta": 1.0}, ValueError, "theta is 1.0"),
    ({"theta": -0.1}, ValueError, "theta is -0.1"),
    ({"layers": (3, 6)}, ValueError, "from 1 to 5"),
    ({"layers": ()}, ValueError, "layers"),
    ({"y": np.zeros(90, int)}, ValueError, "two classes or more"),
    ({"y": np.where(Y == 1, 0, Y)}, ValueError, r"\[60, 0, 30\]"),
    ({"y": Y[:-1]}, TypeError, "90 integer labels"),
    ({"y": Y.astype(float)}, TypeError, "integer labels"),
    ({"x": 255 * X}, ValueError, "expected pixels in"),
    ({"folds": 0}, ValueError, "folds is 0; expected None or a whole number from 2 to 90"),
    ({"folds": 1}, ValueError, "folds is 1"),
    ({"folds": 2.5}, ValueError, "folds is 2.5"),
])
def test_bad_arguments_of_fit_are_named_before_the_work(network, monkeypatch, options, error, message):
    monkeypatch.setattr(rejection, "_features", None)
    with pytest.raises(error, match=message):
        rejection.fit(network, **{"x": X, "y": Y, "layers": (3, 4)} | options)


def test_features_of_another_width_are_refused(nr):
    with pytest.raises(ValueError, match="h has 5 features; expected 8"):
        nr.svms[0].scores(tf.zeros((2, 5), tf.float64))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(nr, rate):
    with pytest.raises(ValueError, match="rate is"):
        nr.at_rate(NEW, rate)


def test_too_many_samples_are_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(svms, "_free_memory", lambda: 1e6)
    with pytest.raises(MemoryError, match=r"1,000,000 samples need 1.45e\+04 GB .* 0.001 GB are free: fit at most 262"):
        svms.squared_distances(np.broadcast_to(np.float32(0), (10**6, 3)))  # whose work would need 4 TB


@pytest.mark.parametrize(("files", "free"), [
    ({}, np.inf), ({"meminfo": "MemTotal: 9 kB\n"}, np.inf),
    ({"meminfo": "MemTotal: 9 kB\nMemAvailable:  4 kB\n"}, 4096),
    ({"memory.max": "5000\n", "memory.current": "2000\n"}, 3000),
    ({"memory.max": "5000\n", "memory.current": "4000\n", "memory.stat": "anon 7\ninactive_file 1500\n"}, 2500),
    ({"memory.max": "5000\n", "memory.current": "5001\n"}, 0), ({"memory.max": "5000\n"}, np.inf),
    ({"memory.max": "max\n", "memory.current": "2000\n", "meminfo": "MemAvailable: 4 kB"}, 4096),
    ({"memory.max": "9000\n", "memory.current": "2000\n", "meminfo": "MemAvailable: 4 kB"}, 4096),
])
def test_free_memory_is_the_machine_s_and_within_the_container_s_limit(tmp_path, monkeypatch, files, free):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(svms, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(svms, "_GROUP", tmp_path)
    assert svms._free_memory() == free


def test_bad_values_of_the_grid_are_refused():
    h, y = blobs()
    with pytest.raises(ValueError, match="gamma is 0"):
        svms.grid_search(svms.squared_distances(h), y, [1.0], [0])


# ── The attacks ──

EPS = [0.0, 0.5, 2.0]


def attacked(defence, attack, eps, seed=0):
    threat = ThreatModel("l2", eps)
    if attack == "algorithm 1":
        return adaptive.algorithm_1(defence, NEW, NEW_Y, threat, step_size=0.1, steps=15, seed=seed)
    return adaptive.strong(defence, NEW, NEW_Y, threat, X, Y, steps=15, seed=seed)


@pytest.mark.parametrize("attack", ["algorithm 1", "strong"])
@pytest.mark.parametrize("eps", EPS)
def test_attacks_keep_to_the_ball_and_the_bounds(dnr, attack, eps):
    found = attacked(dnr, attack, eps)
    x_adv = found.images
    assert ThreatModel("l2", eps).distance(x_adv, NEW).max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.dtype == np.float32
    assert (eps > 0) == bool((x_adv != NEW).any())
    np.testing.assert_array_equal(found.value > 0, evaluation.outcomes(dnr, x_adv, NEW_Y) == 2)


@pytest.mark.parametrize("attack", ["algorithm 1", "strong"])
def test_the_same_seed_gives_the_same_images(nr, attack):
    first = attacked(nr, attack, 0.5)
    for one, other in zip(first, attacked(nr, attack, 0.5), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first.images, attacked(nr, attack, 0.5, seed=1).images)


def evaded(defence, found):
    return (evaluation.outcomes(defence, found.images, NEW_Y) == 2).mean()


def test_the_strong_attack_is_at_least_as_good_as_the_papers(defence):
    for eps in (0.5, 1.0):
        strong, weak = (evaded(defence, attacked(defence, name, eps)) for name in ("strong", "algorithm 1"))
        assert strong >= weak


def test_more_restarts_and_the_smoothed_half_never_lose_an_image(dnr):
    threat = ThreatModel("l2", 0.7)
    gains = [adaptive.strong(dnr, NEW, NEW_Y, threat, X, Y, steps=10, restarts=r) for r in (1, 2, 4)]
    for found in gains:
        reached = rejection.margin(answers(dnr, found.images), NEW_Y)
        np.testing.assert_allclose(found.value, reached, rtol=1e-4, atol=1e-4)
    gains = [found.value for found in gains]
    assert (gains[0] > 0).sum() <= (gains[1] > 0).sum() <= (gains[2] > 0).sum()
    clean = rejection.margin(answers(dnr, NEW), NEW_Y).numpy()
    assert all((gain >= clean - 1e-6).all() for gain in gains) and (gains[2] > clean).any()


@pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}, {"width": -1.0}, {"batch_size": -1}])
def test_bad_arguments_of_the_strong_attack_are_named_before_the_work(nr, monkeypatch, options):
    monkeypatch.setattr(adaptive, "answers", None)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        adaptive.strong(nr, NEW, NEW_Y, ThreatModel("l2", 1.0), X, Y, **options)


def test_the_strong_attack_evades_everything_in_a_large_ball(defence):
    assert evaded(defence, attacked(defence, "strong", 6.0)) == 1


def test_being_refused_is_no_success(nr):
    """A margin that forgets the refusal is satisfied with refused images; the reject-aware one is not."""
    strict, threat = nr.at_rate(X, 0.3), ThreatModel("l2", 1.0)
    z, threshold = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]]), np.array([1.5, 1.5, 3.0])
    refused = Outputs(z, threshold - z.max(axis=1))
    np.testing.assert_allclose(rejection.margin(refused, tf.constant([0, 0, 0])), [-1.0, 0.5, -1.0])
    never = Outputs(z, np.full(3, -np.inf))
    np.testing.assert_allclose(rejection.margin(never, tf.constant([0, 0, 0])), [-1.0, 1.0, 1.0])
    found = attacks.pgd(strict, NEW, NEW_Y, threat, steps=10, losses=(rejection.margin,), goal=rejection.margin)
    outcome = evaluation.outcomes(strict, found.images, NEW_Y)
    np.testing.assert_array_equal(found.value > 0, outcome == 2)
    for goal in (rejection.margin, evasion):  # the two are above 0 for the same images
        np.testing.assert_array_equal(goal(answers(strict, found.images), NEW_Y).numpy() > 0, outcome == 2)
    forgetful = attacks.pgd(strict, NEW, NEW_Y, threat, steps=10, losses=("margin",), goal=lambda outputs, y: (
        attacks.margin(outputs.logits, y)))
    assert (evaluation.outcomes(strict, forgetful.images, NEW_Y) == 2).sum() < (forgetful.value > 0).sum()


def test_the_strong_attack_passes_the_checks_that_a_weak_one_on_the_same_defence_fails(dnr):
    threat, options = ThreatModel("l2", 2.0), {"steps": 20, "queries": 60}
    strong = partial(adaptive.strong, x_train=X, y_train=Y, restarts=2)
    table = evaluation.sanity_checks(dnr, NEW, NEW_Y, threat, attack=strong, **options)
    assert table["passed"].all() and len(table) == 14, table.to_string()
    table = evaluation.sanity_checks(dnr, NEW, NEW_Y, threat, path="smoothed", **options)
    assert "PGD less a gradient-free attack" in set(table["check"][~table["passed"]]), table.to_string()


def test_the_strong_attack_finds_what_is_planted_and_one_that_hardly_moves_does_not(network, dnr):
    threat, near = ThreatModel("l2", 1.0), ThreatModel("l2", 0.01)
    strong = partial(adaptive.strong, x_train=X, y_train=Y, steps=30, restarts=3)

    def weak(defence, x, y, threat):
        return strong(defence, x, y, near, steps=2)

    for model in (network, dnr):  # the readouts that stand in their places have neither layers nor a kernel
        success, failure = (soundness.binarization(model, attack, NEW[:10], threat, draws=20)[0]["measured"]
                            for attack in (strong, weak))
        assert failure < 0.5 < 0.9 <= success, (model, failure, success)


def test_algorithm_1_descends_the_hinge_loss_of_the_runner_up(dnr):
    z = answers(dnr, NEW).logits
    z[np.arange(len(NEW)), NEW_Y] = -np.inf
    signs = np.where(np.arange(CLASSES) == z.argmax(1)[:, None], 1, -1)

    def loss(x):
        return np.maximum(0, 1 - signs * dnr.scores(x).numpy()).sum(axis=1)

    threat = ThreatModel("l2", 1.0)
    start = threat.random_start(NEW, 0)
    one, left, steps = adaptive.algorithm_1(dnr, NEW, NEW_Y, threat, step_size=0.05, steps=1)
    with tf.GradientTape() as tape:
        x = tf.constant(start)
        tape.watch(x)
        value = tf.reduce_sum(tf.nn.relu(1 - signs * dnr.scores(x)), axis=1)
    by_hand = threat.project(x - 0.05 * tape.gradient(value, x), NEW)
    np.testing.assert_allclose(one, by_hand, atol=1e-6)
    assert (steps == 1).all()
    np.testing.assert_allclose(left, evasion(answers(dnr, one), NEW_Y), rtol=1e-5, atol=1e-5)
    many, _, steps = adaptive.algorithm_1(dnr, NEW, NEW_Y, threat, step_size=0.05, steps=30)
    assert loss(many).mean() < loss(one).mean() < loss(start).mean()
    assert steps.min() < 30  # some have stopped
    np.testing.assert_allclose(
        adaptive.algorithm_1(dnr, NEW, NEW_Y, threat, step_size=0.05, tolerance=1e9).steps, 1)


def test_algorithm_1_goes_on_without_a_tolerance_and_reads_scores_from_log_odds(dnr):
    threat, options = ThreatModel("l2", 1.0), {"step_size": 0.05, "steps": 20}
    on = adaptive.algorithm_1(dnr, NEW, NEW_Y, threat, tolerance=None, **options)
    assert (on.steps == 20).all()
    shown = evaluation.as_defence(lambda x: dnr(x).logits)
    object.__setattr__(shown.model, "randomised", False)
    blind = adaptive.algorithm_1(shown, NEW, NEW_Y, threat, tolerance=None, platt=dnr.platt, **options)
    np.testing.assert_allclose(blind.images, on.images, atol=1e-3)


def test_restarts_beyond_the_classes_differ(nr, monkeypatch):
    seeds, real = [], attacks.pgd
    monkeypatch.setattr(adaptive.attacks, "pgd", lambda *a, **more: seeds.append(more["seed"]) or real(*a, **more))
    adaptive.strong(nr.at_rate(X, 0.3), NEW, NEW_Y, ThreatModel("l2", 1e-3), X, Y, steps=2, restarts=5)
    assert len(set(seeds)) == 5


def test_what_is_evaded_in_a_smaller_ball_is_not_attacked_again_where_it_is_carried(nr):
    sizes, next_class = [], [NEW[(k + 1) % CLASSES] for k in range(CLASSES)]  # the first images show 0, 1, 2

    def attack(defence, x, y, threat):  # a ball of 6 holds all images: those of the next class evade, if not refused
        sizes.append(len(x))
        return adaptive.Found(np.stack([next_class[k] for k in y]), np.ones(len(x)), np.full(len(x), 7))

    found = adaptive.by_eps(nr.at(0.5), NEW, NEW_Y, [0.0, 6.0, 7.0], attack)
    np.testing.assert_array_equal(found["outcome"][0], evaluation.outcomes(nr.at(0.5), NEW, NEW_Y))
    evaded = int((found["outcome"][1] == 2).sum())
    assert evaded > 0 and sizes == [30, 30] and found["steps"].tolist() == [0, 7, 7]
    carried = adaptive.by_eps(nr.at(0.5), NEW, NEW_Y, [0.0, 6.0, 7.0], attack, carry=True)["outcome"]
    np.testing.assert_array_equal(carried, found["outcome"])
    assert sizes[2:] == [left for left in (30 - (carried[0] == 2).sum(), 30 - evaded) if left]
    with pytest.raises(AssertionError, match="leaves the ball"):
        adaptive.by_eps(nr, NEW, NEW_Y, [1.0], attack)


def test_noise_has_its_whole_length_in_spite_of_clipping(nr):
    threat = ThreatModel("l2", 1.5)
    found = adaptive.noise(nr, NEW, NEW_Y, threat)
    np.testing.assert_allclose(threat.distance(found.images, NEW), 1.5, atol=1e-4)
    assert threat.contains(found.images, NEW).all()
    np.testing.assert_array_equal(found.value > 0, evaluation.outcomes(nr, found.images, NEW_Y) == 2)


def test_training_points_of_other_classes_start_the_attack(nr):
    threat = ThreatModel("l2", 1.0)
    starts = adaptive.nearest_starts(nr, NEW, NEW_Y, threat, X, Y)
    assert threat.distance(starts, NEW).max() <= 1 + 1e-6
    d2 = ((X[None] - NEW[:, None]) ** 2).sum(axis=(2, 3, 4))
    d2[Y[None] == NEW_Y[:, None]] = np.inf
    for i, near in enumerate(np.argsort(d2, axis=1)[:, :5]):
        options = threat.project(X[near], np.repeat(NEW[i : i + 1], 5, axis=0)).numpy()
        scores = rejection.margin(answers(nr, options), tf.constant([NEW_Y[i]] * 5)).numpy()
        np.testing.assert_allclose(starts[i], options[scores.argmax()], atol=1e-6)


def test_the_density_pulls_towards_the_wrong_class(nr):
    density = adaptive.kernel_density(X, Y, 0.5)
    by_hand = [np.log(np.exp(-((NEW[0] - X[k == Y]) ** 2).sum(axis=(1, 2, 3)) / 0.5).sum()) for k in range(CLASSES)]
    np.testing.assert_allclose(density(NEW[:1])[0], by_hand, rtol=1e-6)
    options = dict(threat=ThreatModel("l2", 1.0), x_train=X, y_train=Y, steps=15)
    plain, dense = (adaptive.strong(nr, NEW, NEW_Y, density=d, weight=w, **options).images
                    for d, w in ((None, 0.0), (density, 10.0)))
    wrong = (NEW_Y[:, None] != np.arange(CLASSES))
    best = [np.where(wrong, density(x), -np.inf).max(1).mean() for x in (NEW, plain, dense)]
    assert best[2] > best[0]
    with pytest.raises(ValueError, match="bandwidth is 0"):
        adaptive.kernel_density(X, Y, 0)


@pytest.mark.parametrize("options", [{"step_size": 0}, {"steps": 0}, {"tolerance": -1}, {"batch_size": -1}])
def test_bad_arguments_of_algorithm_1_are_named(nr, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        adaptive.algorithm_1(nr, NEW, NEW_Y, ThreatModel("l2", 1.0), **{"step_size": 0.1} | options)


def test_the_last_loaded_defences_are_kept_with_their_graphs(nr, dnr, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptive, "_MANY", 2)
    paths = [tmp_path / rejection.save(defence, tmp_path) for defence in (nr, dnr, nr.at(0.7))]
    kept = adaptive.loaded(paths[0])
    assert adaptive.loaded(paths[1]).layers == dnr.layers
    assert adaptive.loaded(paths[0]) is kept and adaptive.loaded(paths[0], kept.threshold) is kept
    strict = adaptive.loaded(paths[0], 5.0)
    assert strict.threshold == 5.0 and strict.svms is kept.svms and adaptive.loaded(paths[0], 5.0) is strict
    adaptive.loaded(paths[2])
    assert adaptive.loaded(paths[0]) is not kept
    adaptive.clear_graphs()


def test_attacks_show_progress_where_asked(nr, capsys):
    threat = ThreatModel("l2", 0.5)
    adaptive.algorithm_1(nr, NEW, NEW_Y, threat, step_size=0.1, steps=2)
    adaptive.strong(nr, NEW, NEW_Y, threat, X, Y, steps=2)
    assert capsys.readouterr().err == ""
    adaptive.algorithm_1(nr, NEW, NEW_Y, threat, step_size=0.1, steps=2, label="Algorithm 1")
    adaptive.strong(nr, NEW, NEW_Y, threat, X, Y, steps=2, label="strong attack")
    shown = capsys.readouterr().err
    assert "Algorithm 1" in shown and "strong attack" in shown
