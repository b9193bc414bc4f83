"""The networks: their shapes and sizes, logits at the end, seeds, test mode, copies in float64 and on the disk."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from helpers import files, models
from helpers.filters import Filter

X = np.random.default_rng(0).uniform(0, 1, (5, 6, 6, 1)).astype("float32")
NETWORKS = {
    "strided": lambda **options: models.two_conv((6, 6, 1), 3, **options),
    "pooled": lambda **options: models.two_conv((6, 6, 1), 3, strided=False, batch_norm=False, **options),
    "deep": lambda **options: models.deep_conv((6, 6, 1), 3, **options),
    "inception": lambda **options: models.inception((6, 6, 1), 3, width=4, **options),
}
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def flat(model):
    return np.concatenate([weights.ravel() for weights in model.get_weights()])


@networks
def test_a_network_ends_in_logits(network):
    model = network()
    assert model(X).shape == (5, 3)
    assert isinstance(model.layers[-1], layers.Dense) and model.layers[-1].activation is keras.activations.linear


def test_the_networks_have_the_published_size():
    # weights and biases by hand: 3x3 filters, "same" padding, 28x28 -> 7x7 before the dense layers
    two, deep = 320 + 18_496, 320 + 9_248 + 18_496 + 36_928
    dense = 7 * 7 * 64 * 128 + 128 + 1_290
    assert models.two_conv(batch_norm=False).count_params() == two + dense
    assert models.two_conv(batch_norm=False, strided=False).count_params() == two + dense
    assert models.two_conv().count_params() == two + dense + 4 * (32 + 64 + 128)
    assert models.deep_conv().count_params() == deep + 7 * 7 * 64 * 200 + 200 + 200 * 200 + 200 + 2_010


def test_the_options_change_the_layers():
    assert kinds(models.two_conv()).count("BatchNormalization") == 3
    assert "MaxPooling2D" not in kinds(models.two_conv())
    assert kinds(models.two_conv(strided=False, batch_norm=False))[:4] == ["Conv2D", "MaxPooling2D"] * 2
    assert models.two_conv(dropout=0.2).layers[-2].rate == 0.2
    assert kinds(models.deep_conv()) == [*["Conv2D", "Conv2D", "MaxPooling2D"] * 2, "Flatten",
                                         "Dense", "Dropout", "Dense", "Dropout", "Dense"]


@networks
def test_the_seed_decides_the_weights(network):
    np.testing.assert_array_equal(flat(network(seed=3)), flat(network(seed=3)))
    assert not np.array_equal(flat(network(seed=3)), flat(network(seed=4)))


@networks
def test_test_mode_turns_dropout_off_and_moves_no_statistics(network):
    model = network()
    before = flat(model)
    logits = models.inference(model)
    np.testing.assert_array_equal(logits(X), logits(X))
    np.testing.assert_array_equal(flat(model), before)
    assert not np.array_equal(model(X, training=True), model(X, training=True))


def test_a_plain_function_is_its_own_test_mode():
    assert models.inference(len) is len


@networks
def test_a_float64_copy_computes_the_same_more_exactly(network):
    model = network(seed=1)
    model(X, training=True)  # moves the batch statistics, which the copy must take over
    copy, before = models.as_float64(model), flat(model)
    exact = models.inference(copy)(X.astype("float64"))
    assert exact.dtype == tf.float64
    assert {weights.dtype.name for weights in copy.get_weights()} == {"float64"}
    np.testing.assert_allclose(exact, models.inference(model)(X), atol=1e-6)
    # The float64 copy resolves a change that float32 cannot see.
    assert np.abs(models.inference(copy)(X.astype("float64") + 1e-12) - exact).max() > 0
    np.testing.assert_array_equal(flat(model), before)
    assert model.dtype == "float32"


def test_a_float64_copy_is_of_a_network_a_layer_or_what_makes_its_own():
    with pytest.raises(TypeError, match="expected a Keras network"):
        models.as_float64(lambda x: x)
    assert models.as_float64(Filter("gaussian", 0.5))(X.astype("float64")).dtype == tf.float64

    class Own:
        def as_float64(self):
            return "a copy"

    assert models.as_float64(Own()) == "a copy"


@networks
def test_the_compiled_network_agrees_with_the_plain_one(network):
    model = network()
    graph = models.forward(model, X)
    np.testing.assert_allclose(graph(X), models.inference(model)(X), atol=1e-6)
    assert isinstance(graph, tf.types.experimental.PolymorphicFunction) and models.forward(model, X) is graph
    model.set_weights([weights + 0.1 for weights in model.get_weights()])  # the graph must see new weights
    np.testing.assert_allclose(models.forward(model, X)(X), models.inference(model)(X), atol=1e-5)


# ── What is random ──


@keras.saving.register_keras_serializable("tests")
class Noise(layers.Layer):
    """Always adds noise, from a source that a graph would freeze or from one that draws anew in a graph too."""

    def __init__(self, source, **options):
        super().__init__(**options)
        self.source, self.seeds = source, keras.random.SeedGenerator(0)

    def call(self, x):
        return x + SOURCES[self.source](x, self.seeds)


SOURCES = {
    "numpy": lambda x, seeds: np.random.normal(size=(1, *x.shape[1:])).astype("float32"),  # noqa: NPY002
    "python": lambda x, seeds: random.gauss(),
    "tensorflow": lambda x, seeds: tf.random.normal(tf.shape(x)),
    "keras": lambda x, seeds: keras.random.normal(tf.shape(x), seed=seeds),
    "generator": lambda x, seeds: GENERATOR.normal(tf.shape(x)),
    "coin": lambda x, seeds: float(next(COIN)),
}
GENERATOR, COIN = tf.random.Generator.from_seed(0), itertools.cycle([0, 0, 1])
sources = pytest.mark.parametrize("source", SOURCES)


def noisy_network(source):
    keras.utils.set_random_seed(0)
    return keras.Sequential([layers.Input((6, 6, 1)), Noise(source), layers.Flatten(), layers.Dense(3)])


def noisy_function(source):
    network = noisy_network(source)
    return lambda x: network(x, training=False)


class Voter:
    def __init__(self, source, **said):
        self.network = noisy_network(source)
        vars(self).update(said)

    def logits(self, x):
        return self.network(x, training=False)


@sources
def test_a_random_function_answers_anew(source):
    network = noisy_network(source)
    network.randomised = True
    for model in (noisy_function(source), Voter(source).logits, Voter(source, randomised=True).logits, network):
        answers = [models.predict(model, X, 5) for _ in range(3)]
        assert any(np.abs(answer - answers[0]).max() > 1e-2 for answer in answers), "frozen in a graph"


@sources
@pytest.mark.parametrize("door", [models.forward, lambda model, x: models.predict(model, x, 5)])
def test_a_random_network_has_to_say_so(source, door):
    lying = noisy_function(source)
    lying.randomised = False
    for model in (noisy_network(source), lying, Voter(source, randomised=False).logits):
        with pytest.raises(ValueError, match="model answers differently .* or an attribute `randomised = True`"):
            door(model, X)


def test_what_says_that_it_is_not_random_becomes_a_graph():
    traces = []

    def model(x):
        traces.append(x.shape)
        return tf.reshape(x, (-1, 36))[:, :3]

    models.predict(model, X, 5)
    models.predict(model, X, 5)
    assert len(traces) == 2, "called, not traced"
    model.randomised = False
    models.predict(model, X, 5)
    steady = len(traces)
    np.testing.assert_array_equal(models.predict(model, X, 5), X.reshape(5, -1)[:, :3])
    assert len(traces) == steady, "traced once"


def test_a_part_of_a_random_network_is_random():
    network = noisy_network("numpy")
    assert not models.part(network, network.layers[-1].input).randomised
    network.randomised = True
    assert models.part(network, network.layers[-1].input).randomised


def test_a_graph_of_its_own_is_not_merged_into_its_caller():
    double = models.own_graph(lambda x: 2 * x)
    caller = tf.function(lambda x: double(x) + 1).get_concrete_function(tf.constant(1.0))
    (inner,) = [f for f in caller.graph.as_graph_def().library.function if f.attr["_noinline"].b]
    assert inner.signature.name in [node.attr["f"].func.name for node in caller.graph.as_graph_def().node]
    assert caller(tf.constant(3.0)) == 7


@networks
def test_logits_pass_and_probabilities_do_not(network):
    z = models.predict(network(), X, 5)
    models.check_logits(z)
    models.check_logits(z.astype("float64"))
    for factor in (1, 1000):  # all but one-hot, as after long training
        with pytest.raises(ValueError, match="drop its softmax"):
            models.check_logits(np.asarray(tf.nn.softmax(factor * z)))
    z[3, 1] = np.nan
    with pytest.raises(ValueError, match="model gives NaN on some images; expected logits"):
        models.check_logits(z)


@pytest.mark.parametrize("z", [X, X[:, 0, 0, 0], np.float32(1)], ids=["images", "numbers", "one number"])
def test_outputs_of_another_shape_are_refused(z):
    with pytest.raises(ValueError, match=r"expected logits of shape \(n, classes\)"):
        models.check_logits(z)


def test_several_outputs_are_given_as_they_come():
    network = NETWORKS["strided"]()
    both = keras.Model(network.inputs, {"logits": network.outputs[0], "image": network.inputs[0]})
    found = models.predict(both, X, 2)
    np.testing.assert_array_equal(found["image"], X)
    np.testing.assert_allclose(found["logits"], models.predict(network, X, 5), atol=1e-5)


@networks
def test_a_saved_network_comes_back(network, tmp_path):
    model = network(seed=5)
    model(X, training=True)
    name = models.save(model, tmp_path)
    assert models.save(model, tmp_path) == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    copy = models.load(tmp_path / name)
    np.testing.assert_array_equal(flat(copy), flat(model))
    np.testing.assert_array_equal(models.inference(copy)(X), models.inference(model)(X))


def test_other_weights_have_another_file(tmp_path):
    model = NETWORKS["deep"](seed=0)
    name = models.save(model, tmp_path)
    *others, last = model.get_weights()
    model.set_weights([*others, last + 1e-6])
    assert models.save(model, tmp_path) != name and len(list(tmp_path.iterdir())) == 2


def convolution(name=None, activation="relu", strides=1, padding="same"):
    keras.utils.set_random_seed(0)
    return keras.Sequential([layers.Input((6, 6, 1)), layers.Conv2D(2, 3, strides, padding, activation=activation),
                             layers.GlobalAveragePooling2D(), layers.Dense(3)], name=name)


def residual(skip=True):
    keras.utils.set_random_seed(0)
    image = layers.Input((6, 6, 1))
    hidden = layers.Conv2D(2, 3, padding="same")(image)
    again = layers.Conv2D(2, 3, padding="same")(hidden)
    joined = layers.Add()([hidden if skip else again, again])
    return keras.Model(image, layers.Dense(3)(layers.Flatten()(joined)))


OTHERS = {  # pairs of networks with the same kinds of layers and the same weights
    "dropout": [lambda rate=rate: models.two_conv((6, 6, 1), 3, dropout=rate) for rate in (0.1, 0.5)],
    "activation": [lambda name=name: convolution(activation=name) for name in ("relu", "tanh")],
    "strides": [lambda strides=strides: convolution(strides=strides) for strides in (1, 2)],
    "padding": [lambda padding=padding: convolution(padding=padding) for padding in ("same", "valid")],
    "momentum": [lambda m=m: normalised(m) for m in (0.9, 0.8)],
    "connections": [lambda skip=skip: residual(skip) for skip in (True, False)],
    "nested": [lambda name=name: keras.Sequential([layers.Input((6, 6, 1)), convolution(activation=name)])
               for name in ("relu", "tanh")],
    "filter": [lambda size=size: keras.Sequential([layers.Input((6, 6, 1)), Filter("median", size), convolution()])
               for size in (3, 5)],
    "precision": [lambda kind=kind: keras.Sequential([layers.Input((6, 6, 1)), layers.Flatten(),
                                                      layers.Dense(3, "relu", dtype=kind, kernel_initializer="ones")])
                  for kind in ("float32", "mixed_bfloat16")],
}


def normalised(momentum):
    return keras.Sequential([convolution(), layers.BatchNormalization(momentum=momentum)])


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_another_network_with_the_same_weights_has_another_file(pair, tmp_path):
    one, other = (build() for build in pair)
    for ours, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert models.save(one, tmp_path) != models.save(other, tmp_path)
    for model in (one, other):
        models.load(tmp_path / models.save(model, tmp_path))  # which compares the name
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("build", [build for build, _ in OTHERS.values()], ids=OTHERS)
def test_a_network_that_is_built_again_has_the_same_file(build):
    model, again = build(), build()  # Keras numbers the layers of a process: the names differ
    assert model.to_json() != again.to_json() and models.digest(model) == models.digest(again)


def test_the_file_name_does_not_change_with_training_or_the_process(tmp_path):
    model, name = convolution(), models.digest(convolution())
    model.compile("adam", "mse")
    model.trainable = False
    models.load(tmp_path / models.save(model, tmp_path))
    assert models.digest(model) == name == models.digest(convolution("named by hand"))
    outer = keras.Sequential([layers.Input((6, 6, 1)), model])
    assert models.digest(outer) == models.digest(keras.Sequential([layers.Input((6, 6, 1)), convolution()]))
    code = """from test_models import convolution, models
print(models.digest(convolution()))"""
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split()[-1] == name


def test_damaged_missing_and_swapped_files_are_named(tmp_path):
    first, second = (tmp_path / models.save(NETWORKS["deep"](seed=seed), tmp_path) for seed in (0, 1))
    with pytest.raises(FileNotFoundError, match="no file .*nothing.keras; remove the folder 'units' beside its folder"):
        models.load(tmp_path / "nothing.keras")
    second.replace(first)
    with pytest.raises(ValueError, match=f"{first.name} is damaged: its content is not that of its name; remove it, "):
        models.load(first)
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{first.name} is damaged: .*; remove it, remove the folder 'units'"):
        models.load(first)


# ── Inception blocks, and networks of ImageNet ──


def test_inception_has_three_blocks_and_stays_small():
    model = models.inception((64, 64, 3), 10)
    assert kinds(model).count("Concatenate") == 3 and kinds(model).count("AveragePooling2D") == 3
    assert model.output_shape == (None, 10) and 50_000 < model.count_params() < 200_000
    assert models.inception((16, 16, 1), 3, width=4).count_params() < 10_000


@pytest.mark.parametrize(("name", "module", "side"), [
    ("MobileNet 0.25", "mobilenet", 32), ("MobileNetV2", "mobilenet_v2", 32), ("ResNet50", "resnet50", 32),
    ("InceptionV3", "inception_v3", 75), ("VGG16", "vgg16", 32), ("DenseNet169", "densenet", 32)])
def test_a_network_of_imagenet_brings_its_own_preprocessing(name, module, side):
    """Pixels in [0, 1] give what keras gives for 0 ... 255 and its own preprocessing, without the softmax."""
    model = models.application(name, (side, side, 3))
    x = np.random.default_rng(0).uniform(0, 1, (2, side, side, 3)).astype("float32")
    assert model.output_shape == (None, 1000) and model.layers[-1].name.startswith("predictions")
    network, options, *_ = models.APPLICATIONS[name]
    options = options | {"input_shape": (side, side, 3), "weights": None, "classifier_activation": None}
    bare = getattr(keras.applications, network)(**options)
    bare.set_weights(model.get_weights())
    expected = bare(getattr(keras.applications, module).preprocess_input(255.0 * x.copy()), training=False)
    np.testing.assert_allclose(models.inference(model)(x), expected, rtol=1e-3, atol=1e-4)


def test_images_of_another_size_are_refused():
    models.check_size(models.two_conv((6, 6, 1), 3), X)
    models.check_size(keras.Sequential([layers.Input((None, None, 1)), layers.GlobalMaxPooling2D()]), X)
    with pytest.raises(ValueError, match=r"x holds images \(6, 6, 1\); expected \(8, 8, 1\), the size that .* takes$"):
        models.check_size(models.two_conv((8, 8, 1), 3), X)
    with pytest.raises(ValueError, match=r"it has channels first, so put a Permute\(\(3, 1, 2\)\) before it"):
        models.check_size(keras.Sequential([layers.Input((1, 6, 6)), layers.Flatten()]), X)


# ── Networks of keras.applications ──


def applied(name="MobileNetV2", shape=(32, 32, 1), **options):
    return models.application(name, shape, 3, momentum=0.9, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_application_takes_pixels_in_0_1_and_ends_in_logits(channels):
    model, x = applied(shape=(32, 32, channels)), np.full((2, 32, 32, channels), 0.5, "float32")
    assert model(x).shape == (2, 3)
    assert isinstance(model.layers[-1], layers.Dense) and model.layers[-1].activation is keras.activations.linear
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    assert len(norms) > 10 and {norm.momentum for norm in norms} == {0.9}


def test_a_grey_image_is_the_colour_image_of_equal_channels():
    grey, colour = applied(seed=2), applied(shape=(32, 32, 3), seed=2)
    np.testing.assert_array_equal(flat(grey), flat(colour))
    x = np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 1)).astype("float32")
    np.testing.assert_allclose(models.inference(grey)(x), models.inference(colour)(np.repeat(x, 3, -1)), atol=1e-6)


def test_an_application_comes_back_from_the_disk_and_in_float64(tmp_path):
    model, x = applied(seed=4), np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 1)).astype("float32")
    copy = models.load(tmp_path / models.save(model, tmp_path))
    np.testing.assert_array_equal(models.inference(copy)(x), models.inference(model)(x))
    np.testing.assert_allclose(models.inference(models.as_float64(model))(x.astype("float64")),
                               models.inference(model)(x), atol=1e-4)


@pytest.mark.parametrize("classes", [None, 7])
def test_pretrained_weights_come_from_the_mirror(tmp_path, monkeypatch, classes):
    monkeypatch.setenv("HELPERS_DATA", str(tmp_path))
    file = tmp_path / f"keras/models/{models.APPLICATIONS['MobileNet 0.25'][-1]}.h5"
    file.parent.mkdir(parents=True)
    whole = keras.applications.MobileNet(alpha=0.25, weights=None, input_shape=(32, 32, 3))
    whole.save(file)
    with pytest.raises(ValueError, match="mobilenet_2_5_224_tf.h5 is corrupt, truncated or another file"):
        models.application("MobileNet 0.25", (32, 32, 3), classes, pretrained=True)
    monkeypatch.setitem(models._MIRRORED, file.stem, files.sha256(file))
    model = models.application("MobileNet 0.25", (32, 32, 3), classes, pretrained=True, seed=1)
    for name in ("conv1", "conv1_bn", "conv_pw_13", *([] if classes else ["conv_preds"])):
        for ours, theirs in zip(model.get_layer(name).get_weights(), whole.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_pretrained_weights_that_are_nowhere(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise Exception("URL fetch failure")

    monkeypatch.setenv("HELPERS_DATA", str(tmp_path))
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", no_network)
    with pytest.raises(OSError, match="HELPERS_DATA names no folder with keras/models/mobilenet_2_5.*fetch failure"):
        models.application("MobileNet 0.25", (32, 32, 3), pretrained=True)


@pytest.mark.parametrize("change, message", [
    ({"name": "MobileNetV3"}, "name: unknown 'MobileNetV3', did you mean 'MobileNetV2'"),
    ({"shape": (32, 32, 2)}, r"input_shape is \(32, 32, 2\); expected at least 32 x 32 pixels and 1 or 3 channels"),
    ({"shape": (16, 64, 3)}, "expected at least 32 x 32 pixels"),
])
def test_bad_input_of_an_application_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        applied(**change)
