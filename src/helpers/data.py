"""The data sets of the book: where each is looked up, how it is checked, and what it comes as."""

import difflib
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from helpers import files

_SOURCES = yaml.safe_load(Path(__file__).with_name("sources.yml").read_text(encoding="utf-8"))
_PATCH, _STRIDE, _TEXTURE_SPLIT = 64, 16, 384  # pixels; rows from _TEXTURE_SPLIT on are for testing


@dataclass(frozen=True, repr=False)
class Dataset:
    """Images and labels of one data set, ready for a network, with where they came from.

    Attributes
    ----------
    name : str
    x_train, x_test : float32 arrays (n, height, width, channels) in [0, 1]; `x_train` is empty where a set is
        for testing only.
    y_train, y_test : int64 arrays (n,), indices into `class_names`.
    class_names : tuple of str
    source : "embedded", "mirror", "cache" or "download"
    sha256 : str, of the file or files that the data came from; of the arrays' bytes for embedded data.
    extra : dict, what else the source tells. Arrays whose key ends in `_train` or `_test` hold one entry an image.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    source: str
    sha256: str
    extra: dict = field(default_factory=dict)

    def __repr__(self):
        return (f"Dataset({self.name!r}: {len(self.x_train)} train, {len(self.x_test)} test, "
                f"{'x'.join(map(str, self.x_test.shape[1:]))}, {len(self.class_names)} classes, {self.source})")

    def take(self, n_train: int | None = None, n_test: int | None = None, seed: int = 0) -> "Dataset":
        """Return a smaller data set with the same class proportions, up to rounding, in shuffled order.

        `None` keeps a part as it is. The same `seed` takes the same images.
        Raises ValueError when more images are asked for than there are, or fewer than one.
        """
        changes, extra = {}, dict(self.extra)
        for part, n in (("train", n_train), ("test", n_test)):
            if n is None:
                continue
            y = getattr(self, f"y_{part}")
            if not 1 <= n <= len(y):
                raise ValueError(f"n_{part}: got {n}, expected 1 to {len(y)} (the images that {self.name} has)")
            rows = _stratified(y, n, seed)
            changes |= {key: getattr(self, key)[rows] for key in (f"x_{part}", f"y_{part}")}
            extra |= {key: value[rows] for key, value in extra.items() if key.endswith(f"_{part}")}
        return replace(self, **changes, extra=extra)

    def provenance(self) -> dict:
        """Return what a result record keeps of this data set: source, sha256, n_train, n_test."""
        return {"source": self.source, "sha256": self.sha256,
                "n_train": len(self.x_train), "n_test": len(self.x_test)}


def _stratified(y, n, seed):
    from sklearn.utils import resample

    return resample(np.arange(len(y)), replace=False, n_samples=n, stratify=y, random_state=seed)


def load(name: str) -> Dataset:
    """Return the data set `name`, one of `NAMES`.

    `digits` and `textures` come out of installed packages. The others are looked up in the folder that the
    environment variable HELPERS_DATA names, as `<name>.npz`, and every file is checked against its SHA-256.

    Raises
    ------
    ValueError : unknown name; a file that is not what its checksum says.
    FileNotFoundError : HELPERS_DATA is not a folder, or the data is nowhere to be had.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(NAMES)}{hint}")
    if name in _EMBEDDED:
        arrays = _EMBEDDED[name]()
        digest = hashlib.sha256(b"".join(arrays[key].tobytes() for key in _PARTS)).hexdigest()
        return _dataset(name, arrays, "embedded", digest)
    path = _in_mirror(name)
    if path is not None:
        return _dataset(name, _read(path), "mirror", _SOURCES[name]["sha256"])
    raise FileNotFoundError(
        f"data set {name!r} not found. Set HELPERS_DATA to a folder with {name}.npz, "
        f"or use the profile 'smoke', whose data is embedded.")


def _in_mirror(name):
    """Return the checked file of the mirror, or None where there is no mirror or the mirror lacks it."""
    folder = os.environ.get("HELPERS_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"HELPERS_DATA: {folder!r} is not a folder")
    path = Path(folder) / f"{name}.npz"
    if not path.exists():
        return None
    found, expected = files.sha256(path), _SOURCES[name]["sha256"]
    if found != expected:
        raise ValueError(f"{path} is corrupt or truncated: its SHA-256 is {found}, expected {expected}")
    return path


_PARTS = ("x_train", "y_train", "x_test", "y_test")


def _read(path):
    """Return the arrays of an npz file; pickled objects are refused."""
    with np.load(path, allow_pickle=False) as npz:
        arrays = {key: npz[key] for key in npz.files}
    if "x" in arrays:  # the photos: no training part, names for all 1000 classes and for the 32 photos
        named = {"class_names": arrays.pop("imagenet_names"), "imagenet_wnids": arrays.pop("imagenet_wnids")}
        empty = {"x_train": arrays["x"][:0], "y_train": arrays["y"][:0]}
        arrays = empty | {f"{key}_test": value for key, value in arrays.items()} | named
    missing = [key for key in _PARTS if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(arrays)}")
    return arrays


def _dataset(name, arrays, source, sha256):
    """Return the Dataset of uint8 images (n, h, w[, c]) and their labels."""
    names = arrays.get("class_names", _SOURCES.get(name, {}).get("class_names"))
    images = {key: _as_float(arrays[key]) for key in ("x_train", "x_test")}
    labels = {key: arrays[key].astype(np.int64) for key in ("y_train", "y_test")}
    extra = {key: value for key, value in arrays.items() if key not in (*_PARTS, "class_names")}
    return Dataset(name, **images, **labels, class_names=tuple(map(str, names)), source=source, sha256=sha256,
                   extra=extra)


def _as_float(x):
    x = x[..., None] if x.ndim == 3 else x
    return x.astype(np.float32) / np.float32(255)


def _digits():
    """Return scikit-learn's 1,797 digits (8x8, 17 grey levels), scaled up to 28x28; 500 are for testing."""
    from skimage.transform import resize
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scaled = resize(digits.images / 16, (len(digits.images), 28, 28), order=1)
    x = np.rint(255 * scaled).astype(np.uint8)
    x_train, x_test, y_train, y_test = train_test_split(x, digits.target, test_size=500, stratify=digits.target,
                                                        random_state=0)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test,
            "class_names": digits.target_names}


def _textures():
    """Return overlapping 64x64 patches of scikit-image's brick, grass and gravel (512x512, grey).

    Training patches lie in the rows above `_TEXTURE_SPLIT`, test patches in the rows below: they share no pixel.
    """
    from skimage import data

    arrays = {"class_names": ["brick", "grass", "gravel"]}
    textures = [getattr(data, name)() for name in arrays["class_names"]]
    for part, rows in (("train", slice(0, _TEXTURE_SPLIT)), ("test", slice(_TEXTURE_SPLIT, None))):
        windows = [np.lib.stride_tricks.sliding_window_view(texture[rows], (_PATCH, _PATCH))
                   [::_STRIDE, ::_STRIDE].reshape(-1, _PATCH, _PATCH) for texture in textures]
        arrays[f"x_{part}"] = np.concatenate(windows)
        arrays[f"y_{part}"] = np.repeat(np.arange(len(windows)), [len(w) for w in windows])
    return arrays


_EMBEDDED = {"digits": _digits, "textures": _textures}
NAMES = (*_EMBEDDED, *_SOURCES)
