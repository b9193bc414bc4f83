"""The papers' networks. Every one ends in logits: a softmax inside the network would spoil the attacks' gradients."""

import hashlib
import json
import os
from functools import lru_cache, partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from helpers import files
from helpers.profiles import known

tf.get_logger().setLevel("ERROR")  # every network has graphs of its own, which TensorFlow reports as retracing


def two_conv(input_shape=(28, 28, 1), classes=10, *, strided=True, batch_norm=True, dropout=0.5, conv_dropout=0.0,
             seed=0):  # fmt: skip
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

# Each network of keras.applications, its options, and the (scale, offset) that takes pixels in [0, 1] to its own input.
_TORCH = ([1 / 0.229, 1 / 0.224, 1 / 0.225], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
APPLICATIONS = {
    "ResNet50": ("ResNet50", {}, (255.0, [-103.939, -116.779, -123.68])),  # blue first, as its weights were trained
    "MobileNetV2": ("MobileNetV2", {}, (2.0, -1.0)),
    "DenseNet169": ("DenseNet169", {}, _TORCH),
    "MobileNet 0.75": ("MobileNet", {"alpha": 0.75}, (2.0, -1.0)),
}


def imagenet_weights(name):
    """What `application` takes as the ImageNet weights of `name`: the mirror's file if it is there, else "imagenet".

    The mirror is the folder `keras/models` in the one that the environment variable HELPERS_DATA names.
    """
    mirrored = {"MobileNet 0.75": "mobilenet_7_5_224_tf.h5"}.get(known("name", name, APPLICATIONS), "")
    path = Path(os.environ.get("HELPERS_DATA", ""), "keras/models", mirrored)
    return str(path) if path.is_file() else "imagenet"


def application(name, input_shape, classes, *, weights=None, momentum=0.9, seed=0):
    """A network of keras.applications, one of `APPLICATIONS`, with its own preprocessing inside and logits at the end.

    Paper 05, Section III.D. input_shape : (height, width, 1 or 3), 32 pixels a side at least; grey images are repeated
    to three channels. weights : None for random ones (sets Keras' random seed), "imagenet" for those that Keras loads,
    or a file of Keras with them (and the top layer, which is left out). momentum : of every batch normalisation.
    Returns a keras.Model from images (n, *input_shape) in [0, 1] to logits (n, classes).
    """
    builder, options, (scale, offset) = APPLICATIONS[known("name", name, APPLICATIONS)]
    height, width, channels = input_shape
    if channels not in (1, 3) or min(height, width) < 32:
        raise ValueError(f"input_shape is {input_shape}; expected at least 32 x 32 pixels and 1 or 3 channels")
    keras.utils.set_random_seed(seed)
    image = layers.Input(input_shape)
    rgb = image if channels == 3 else layers.Concatenate()([image] * 3)
    rgb = keras.ops.flip(rgb, axis=-1) if name == "ResNet50" else rgb
    base = getattr(keras.applications, builder)(
        include_top=False, pooling="avg", input_tensor=layers.Rescaling(scale, offset)(rgb),
        weights="imagenet" if weights == "imagenet" else None, **options)
    if weights not in (None, "imagenet"):
        base.load_weights(weights, by_name=True)
    for layer in base.layers:  # Keras' momentum of 0.99 needs more steps than a few thousand images give
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = momentum
    return keras.Model(image, layers.Dense(classes)(base.output))



def as_float64(model):
    """A copy of the Keras network `model` that computes in float64, for checks by finite differences."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model is {type(model).__name__}; expected a Keras network, which can be copied in float64")
    config = json.loads(json.dumps(model.get_config()).replace('"float32"', '"float64"'))
    copy = type(model).from_config(config)
    copy.set_weights(model.get_weights())
    return copy


def inference(model):
    """`model` in test mode: dropout off, batch statistics frozen. A plain function is returned as it is."""
    return partial(model, training=False) if isinstance(model, keras.Model) else model


@lru_cache(maxsize=32)
def compiled(model):
    """`inference(model)` as a TensorFlow graph, kept for the next call with the same network."""
    return tf.function(inference(model), reduce_retracing=True)


def predict(model, x, batch_size):
    """Outputs (n, classes) of `compiled(model)` for images `x` that are known to be valid, in batches."""
    graph = compiled(model)
    return np.concatenate([graph(tf.constant(x[i : i + batch_size])) for i in range(0, len(x), batch_size)])


def check_logits(model, x):
    """Logits (m, classes) of the first images of `x`.

    Raises ValueError for outputs of another shape, and where every row is non-negative and sums to 1 (a softmax).
    """
    logits = compiled(model)(tf.constant(x[:8])).numpy()
    if logits.ndim != 2:
        raise ValueError(f"model gives shape {logits.shape}; expected logits of shape (n, classes)")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise ValueError("model gives probabilities (rows >= 0 that sum to 1); expected logits: drop its softmax")
    return logits


def save(model, folder):
    """Keep `model` in `folder` as <SHA-256 of its layers' types and weights>.keras and return that file name."""
    path = Path(folder) / f"{_digest(model)}.keras"
    if not path.exists():
        with files.atomic(path) as temporary:
            model.save(temporary)
    return path.name


def load(path, seed=0):
    """The network of a file that `save` wrote, compared with the SHA-256 in its name.

    Sets Keras' random seed, from which the network's dropout draws its masks if it is trained further.
    Raises FileNotFoundError or ValueError, which name the file, if it is not there or is damaged.
    """
    path, again = Path(path), "remove the folder 'units' beside its folder and run again"
    if not path.exists():
        raise FileNotFoundError(f"no network {path}; {again}")
    keras.utils.set_random_seed(seed)
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, {again}") from error
    if _digest(model) != path.stem:
        raise ValueError(f"{path} is damaged: its weights are not those of its name")
    return model


def _digest(model):
    content = hashlib.sha256(" ".join(type(layer).__name__ for layer in model.layers).encode())
    for weights in model.get_weights():
        content.update(weights.tobytes())
    return content.hexdigest()
