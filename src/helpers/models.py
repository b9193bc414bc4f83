"""The papers' networks. Every one ends in logits: a softmax inside the network would spoil the attacks' gradients."""

import hashlib
import json
import operator
import os
import re
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from helpers import files
from helpers.checks import known

_KEPT = 32  # graphs on one object
tf.get_logger().setLevel("ERROR")  # every network has graphs of its own, which TensorFlow reports as retracing


def two_conv(input_shape=(28, 28, 1), classes=10, *, strided=True, batch_norm=True, dropout=0.5, conv_dropout=0.0,
             seed=0):
    """Two convolutions of 32 and 64 filters (3x3), a dense layer of 128, logits. Sets Keras' random seed.

    Paper 02 states two convolution layers and a softmax (Table II), nothing else: whether they stride or are
    followed by max-pooling, and whether they are normalised, is left to the caller. So is paper 04's network, of whose
    layers the text has no table: `conv_dropout` is the rate behind each convolution, `dropout` before the last layer.
    Returns a keras.Sequential from images (n, *input_shape) in [0, 1] to logits (n, classes).
    """
    keras.utils.set_random_seed(seed)
    # Keras' momentum of 0.99 needs hundreds of steps to forget its start: more than a small profile has.
    norm = partial(layers.BatchNormalization, momentum=0.9)
    stack = [layers.Input(input_shape)]
    for filters in (32, 64):
        stack.append(layers.Conv2D(filters, 3, 2 if strided else 1, padding="same", activation="relu"))
        stack += [norm()] if batch_norm else []
        stack += [] if strided else [layers.MaxPooling2D()]
        stack += [layers.Dropout(conv_dropout)] if conv_dropout else []
    stack += [layers.Flatten(), layers.Dense(128, activation="relu")]
    stack += [norm()] if batch_norm else []
    return keras.Sequential([*stack, layers.Dropout(dropout), layers.Dense(classes)])


def deep_conv(input_shape=(28, 28, 1), classes=10, *, dropout=0.5, seed=0):
    """The base network of paper 01 (Table 1): 2 x 32 and 2 x 64 convolutions with pooling, 200, 200, logits.

    Returns a keras.Sequential from images (n, *input_shape) in [0, 1] to logits (n, classes). Sets Keras' random seed.
    """
    keras.utils.set_random_seed(seed)
    stack = [layers.Input(input_shape)]
    for filters in (32, 64):
        stack += [layers.Conv2D(filters, 3, padding="same", activation="relu") for _ in range(2)]
        stack.append(layers.MaxPooling2D())
    stack.append(layers.Flatten())
    for _ in range(2):
        stack += [layers.Dense(200, activation="relu"), layers.Dropout(dropout)]
    return keras.Sequential([*stack, layers.Dense(classes)])


# Preprocessing: whether blue comes first, scale and offset of pixels in [0, 1].
_CAFFE = True, 255.0, [-103.939, -116.779, -123.68]
_TF = False, 2.0, -1.0
_TORCH = False, [1 / 0.229, 1 / 0.224, 1 / 0.225], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
APPLICATIONS = {  # name: function of keras.applications, its options, preprocessing, side of images, file of weights
    "MobileNet 0.25": ("MobileNet", {"alpha": 0.25}, _TF, 224, "mobilenet_2_5_224_tf"),
    "MobileNet 0.75": ("MobileNet", {"alpha": 0.75}, _TF, 224, "mobilenet_7_5_224_tf"),
    "MobileNetV2": ("MobileNetV2", {}, _TF, 224, "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224"),
    "InceptionV3": ("InceptionV3", {}, _TF, 299, "inception_v3_weights_tf_dim_ordering_tf_kernels"),
    "VGG16": ("VGG16", {}, _CAFFE, 224, "vgg16_weights_tf_dim_ordering_tf_kernels"),
    "ResNet50": ("ResNet50", {}, _CAFFE, 224, "resnet50_weights_tf_dim_ordering_tf_kernels"),
    "DenseNet169": ("DenseNet169", {}, _TORCH, 224, "densenet169_weights_tf_dim_ordering_tf_kernels"),
}
_MIRRORED = {  # file of weights in the mirror: its SHA-256
    "mobilenet_2_5_224_tf": "d37f6e0dc3cbc86e52e817a020459e8f242ea31f002236633fde0abddb75fa08",
    "mobilenet_7_5_224_tf": "c80c6d56bf40cd8fd8c6927a3c4a03da0732323cbbf173e06c8409ebaf8fdd88",
    "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224":
        "815beb34e388494a301134caa65a121de3f783a7155525e744fd4671fe8a32d4",
}


def application(name, input_shape=None, classes=None, *, pretrained=False, momentum=None, seed=0):
    """A network of keras.applications, one of `APPLICATIONS`, with its own preprocessing inside and logits at the end.

    input_shape : (height, width, 1 or 3), 32 pixels a side at least, by default the network's own; grey images are
    repeated to three channels. classes : of a new last layer; None keeps the one for ImageNet's 1000.
    pretrained : with ImageNet's weights, from the file in keras/models of the folder that HELPERS_DATA names, or else
    from Keras' cache or download. momentum : of every batch normalisation; None leaves Keras' own. Sets Keras' seed.
    Returns a keras.Model from images (n, *input_shape) in [0, 1] to logits (n, classes).
    Raises ValueError for another name or shape and for a damaged file of weights, OSError where there are no weights.
    """
    builder, options, (blue_first, scale, offset), side, file = APPLICATIONS[known("name", name, APPLICATIONS)]
    height, width, channels = shape = input_shape or (side, side, 3)
    if channels not in (1, 3) or min(height, width) < 32:
        raise ValueError(f"input_shape is {shape}; expected at least 32 x 32 pixels and 1 or 3 channels")
    keras.utils.set_random_seed(seed)
    top = {"classifier_activation": None} if classes is None else {"include_top": False, "pooling": "avg"}
    build = partial(getattr(keras.applications, builder), **options, **top)
    image = layers.Input(shape)
    rgb = image if channels == 3 else layers.Concatenate()([image] * 3)
    rgb = keras.ops.flip(rgb, axis=-1) if blue_first else rgb
    base = build(input_tensor=layers.Rescaling(scale, offset)(rgb), weights=None)
    if pretrained:
        _load_imagenet(base, build, Path(os.environ.get("HELPERS_DATA", ""), f"keras/models/{file}.h5"))
    for layer in base.layers:
        if momentum and isinstance(layer, layers.BatchNormalization):
            layer.momentum = momentum
    return keras.Model(image, base.output if classes is None else layers.Dense(classes)(base.output))


def _load_imagenet(base, build, path):
    """Give `base` the weights of a file of Keras, whose last layer may be one too many, or those that Keras finds."""
    if path.stem in _MIRRORED and path.exists():
        files.check(path, _MIRRORED[path.stem])
        whole = any(layer.name == "predictions" for layer in base.layers)
        return base.load_weights(path, by_name=not whole)
    try:
        base.set_weights(build(weights="imagenet").get_weights())
    except Exception as error:  # Keras raises no kind of its own for a failed download
        raise OSError(f"weights: HELPERS_DATA names no folder with keras/models/{path.name}, and the download by Keras "
                      f"failed ({error}). Set it, or use the profile 'smoke'.") from error


def inception(input_shape=(64, 64, 3), classes=10, *, width=16, blocks=(1, 2, 2), dropout=0.3, seed=0):
    """A small network of Inception blocks, as paper 03 puts behind a filter: convolution, blocks, logits.

    Each block joins a 1x1 convolution, a 3x3, two 3x3 in a row and an average pooling (Szegedy et al. 2016), all with
    batch normalisation; `width` times its number in `blocks` are its 1x1 filters. Sets Keras' random seed.
    Returns a keras.Model from images (n, *input_shape) in [0, 1] to logits (n, classes).
    """
    keras.utils.set_random_seed(seed)

    def conv(x, filters, size=1, stride=1):
        x = layers.Conv2D(filters, size, stride, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    def block(x, width):
        three = conv(conv(x, width), 3 * width // 2, 3)
        five = conv(conv(conv(x, width // 2), width, 3), width, 3)
        pooled = conv(layers.AveragePooling2D(3, 1, padding="same")(x), width // 2)
        return layers.Concatenate()([conv(x, width), three, five, pooled])

    images = keras.Input(input_shape)
    x = layers.MaxPooling2D(3, 2, padding="same")(conv(images, 2 * width, 3, 2))
    x = layers.MaxPooling2D(3, 2, padding="same")(block(x, blocks[0] * width))
    for factor in blocks[1:]:
        x = block(x, factor * width)
    x = layers.Dropout(dropout)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(images, layers.Dense(classes)(x))


def as_float64(model):
    """A copy of `model`, a Keras network or layer, that computes in float64, for checks by finite differences.

    Any other object is asked by its own method `as_float64`; TypeError where it has none, and for a network that Keras
    cannot copy, such as one with a lambda.
    """
    if hasattr(model, "as_float64"):
        return model.as_float64()
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model is {type(model).__name__}; expected a Keras network, which can be copied in float64")
    try:
        config = re.sub(r'"(mixed_)?b?float(16|32)"', '"float64"', json.dumps(model.get_config()))
        copy = type(model).from_config(json.loads(config))
    except Exception as error:  # of many kinds
        kind = type(model).__name__
        raise TypeError(f"model is {kind}, of which Keras makes no copy in float64: {error!s:.200}") from error
    copy.set_weights(model.get_weights())
    return copy


def inference(model):
    """`model` in test mode: dropout off, batch statistics frozen. A plain function is returned as it is."""
    return partial(model, training=False) if isinstance(model, keras.Model) else model


def randomised(model):
    """Whether `model` may give one image two answers, so that no graph, which would freeze them, may be made of it.

    An object says so itself by its attribute `randomised`, which also speaks for its methods. Where nothing is said, a
    Keras layer or network is taken for deterministic, and any other function for random.
    """
    owner = model.__self__ if isinstance(model, MethodType) else model
    return bool(getattr(owner, "randomised", not isinstance(owner, keras.Layer)))


def traced(function, model, **options):
    """`function`, which calls `model`, as a TensorFlow graph, or as it is where the model is `randomised`."""
    if not randomised(model):
        return tf.function(function, **options)
    kinds = [spec.dtype for spec in options.get("input_signature", ())]

    def called(*arguments):
        return function(*map(tf.convert_to_tensor, arguments, kinds) if kinds else arguments)

    return called


def forward(model, x):
    """`inference(model)` to be called with tensors: a graph, kept on the model, or itself where it is `randomised`.

    Raises ValueError where a graph would freeze what it draws: `model` answers differently to the first of `x`.
    """
    def build():
        _check_steady(model, tf.constant(x[:2]))
        return tf.function(inference(model), input_signature=[tf.TensorSpec((None, *x.shape[1:]), x.dtype)])

    key = "forward", tuple(x.shape[1:]), x.dtype  # one graph for batches of all sizes
    return inference(model) if randomised(model) else graph_of(model, key, build)


def _check_steady(model, x, calls=3):
    first, *others = (np.concatenate([np.ravel(part).astype(float) for part in tf.nest.flatten(inference(model)(x))])
                      for _ in range(calls))
    slack = 1e-3 * np.abs(first[np.isfinite(first)]).max(initial=1.0)  # on a GPU sums may differ from call to call
    if not all(np.allclose(first, other, rtol=0, atol=slack, equal_nan=True) for other in others):
        raise ValueError("model answers differently when it is called again; expected the same each time, or an "
                         "attribute `randomised = True` that says so")


class _Graphs(dict):
    """What is kept for `owner`, made of `parts`; a copy of the owner, or one from a pickle, begins without."""

    def __init__(self, owner=None, parts=()):
        super().__init__()
        self.owner, self.parts = owner, parts

    def __reduce__(self):
        return _Graphs, ()

    def fit(self, owner, parts):
        """Whether this was made for the `owner` as it is now."""
        same = len(parts) == len(self.parts) and all(map(operator.is_, parts, self.parts))
        return self.owner is owner and same


def _parts(owner, seen):
    """The layers and activations below `owner`, a network or an object that holds some: with others it is another."""
    if id(owner) in seen or isinstance(owner, layers.InputLayer):
        return []
    seen.add(id(owner))
    if isinstance(owner, keras.Layer) and not isinstance(owner, keras.Model):
        return [owner, getattr(owner, "activation", None)]
    if isinstance(owner, keras.Model):
        below = owner.layers
    else:
        held = [value for name, value in getattr(owner, "__dict__", {}).items() if name != "__graphs__"]
        each = chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in held)
        below = [value for value in each if isinstance(value, keras.Layer) or hasattr(value, "randomised")]
    return [part for value in below for part in _parts(value, seen)]


def graph_of(owner, key, build):
    """`build()`, kept on `owner` for the next call with this `key`, and gone with it, or when its layers change.

    For a method it is kept on its object. An object that takes no attributes keeps nothing. The attribute's name makes
    Keras overlook it, and so it is in no file, configuration or copy.
    """
    owner, key = (owner.__self__, (owner.__func__, key)) if isinstance(owner, MethodType) else (owner, key)
    if not isinstance(attributes := getattr(owner, "__dict__", None), dict):
        return build()
    graphs, parts = attributes.get("__graphs__"), _parts(owner, set())
    if graphs is None or not graphs.fit(owner, parts):
        graphs = attributes["__graphs__"] = _Graphs(owner, parts)
    if key not in graphs:
        while len(graphs) >= _KEPT:  # a loss of its own for every call would fill the memory
            del graphs[next(iter(graphs))]
        graphs[key] = build()
    return graphs[key]


def part(model, outputs):
    """The Keras network from what enters `model` to `outputs`, tensors within it; `randomised` where the whole is."""
    inner = keras.Model(model.inputs[0], outputs)
    inner.randomised = randomised(model)
    return inner


def own_graph(function):
    """`function` as a TensorFlow graph that stays one when a compiled loop calls it.

    Merged into a loop, the gradient of max-pooling is computed by oneDNN in some graphs and in others not, nine times
    slower: the loop makes the graph cyclic, and the pass that picks kernels seems to meet its nodes in no fixed order.
    """
    return tf.function(function, experimental_attributes={"_noinline": True})


def inner_graph(function, model):
    """`own_graph` of `function`, which calls `model`, or itself where the model is `randomised`."""
    return function if randomised(model) else own_graph(function)


def predict(model, x, batch_size):
    """Outputs of `forward(model, x)` for images `x` that are known to be valid, in batches: arrays (n, ...)."""
    outputs = forward(model, x)
    parts = [outputs(tf.constant(x[i : i + batch_size])) for i in range(0, len(x), batch_size)]
    return tf.nest.map_structure(lambda *each: np.concatenate(each), *parts)


def check_size(model, x):
    """Raise ValueError unless the Keras network `model` takes one batch of images, of the size of `x`, and gives one.

    A subclass of keras.Model says neither beforehand.
    """
    if not hasattr(model, "input_shape"):
        return
    for side, word in ((model.inputs, "takes"), (model.outputs, "gives")):
        if len(side) != 1:
            raise ValueError(f"model {word} {len(side)} tensors; expected one, " +
                             ("images" if side is model.inputs else "logits (n, classes)"))
    expected = model.input_shape[1:]
    if len(expected) != 3 or any(side not in (None, given) for side, given in zip(expected, x.shape[1:], strict=True)):
        turned = expected == (x.shape[3], *x.shape[1:3]) and expected != x.shape[1:]
        raise ValueError(f"x holds images {x.shape[1:]}; expected {expected}, the size that the network takes"
                         + (": it has channels first, so put a Permute((3, 1, 2)) before it" if turned else ""))


def check_logits(logits):
    """Raise ValueError where `logits` are not (n, classes), are NaN, or have rows of a softmax: >= 0, with sum 1."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"model gives shape {logits.shape}; expected logits of shape (n, classes), of 2 or more")
    if np.isnan(logits).any():
        raise ValueError("model gives NaN on some images; expected logits")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise ValueError("model gives probabilities (rows >= 0 that sum to 1); expected logits: drop its softmax")


def save(model, folder):
    """Keep `model` in `folder` as <its `digest`>.keras and return that file name."""
    if code := [layer.name for layer in _parts(model, set()) if isinstance(layer, layers.Lambda)]:
        raise ValueError(f"model holds the Lambda layers {code}, whose code no file may bring back; expected layers of "
                         "a class that is registered with Keras, or keras.ops")
    path = Path(folder) / f"{digest(model)}.keras"
    if not path.exists():
        with files.atomic(path) as temporary:
            model.save(temporary)
    return path.name


def load(path, seed=0):
    """The network of a file that `save` wrote, compared with the `digest` in its name.

    Sets Keras' random seed, from which the network's dropout draws its masks if it is trained further.
    Raises FileNotFoundError or ValueError, which name the file, if it is not there or is damaged.
    """
    keras.utils.set_random_seed(seed)
    return files.kept(path, partial(keras.saving.load_model, compile=False, safe_mode=True), digest)


def digest(model):
    """SHA-256 of all that `model` is: its layers, their settings and connections, and its weights.

    What layers are called does not count, nor do an optimizer and what is frozen, which Keras keeps for some networks
    only: the same network, built again, has the same.
    """
    content = hashlib.sha256(json.dumps(_nameless(json.loads(model.to_json())), sort_keys=True).encode())
    for weights in model.get_weights():
        content.update(f"{weights.dtype} {weights.shape}".encode())
        content.update(weights.tobytes())
    return content.hexdigest()


def _nameless(config, places=None):
    """A network's configuration with the places of its layers for their names, which Keras numbers in a process."""
    if isinstance(config, list):
        if len(config) == 3 and isinstance(config[0], str) and config[0] in (places or {}):  # a connection
            return [places[config[0]], *config[1:]]
        return [_nameless(part, places) for part in config]
    if not isinstance(config, dict) or str(config.get("class_name")).endswith("DTypePolicy"):  # whose name is its kind
        return config
    if isinstance(layers := config.get("layers"), list):
        places = {layer["config"]["name"]: place for place, layer in enumerate(layers)}
        if isinstance(config.get("dtype"), dict):  # the layers have their own, and Keras's file forgets a Sequential's
            config = config | {"dtype": config["dtype"] | {"config": {"name": "float32"}}}
    dropped = ("name", "build_config", "compile_config", "trainable")
    return {key: _nameless(value, places) for key, value in config.items() if key not in dropped}
