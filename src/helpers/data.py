"""The data sets of the book: where each is looked up, how it is checked, and what it comes as."""

import gzip
import hashlib
import io
import os
import tarfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pooch
import yaml
from PIL import Image
from scipy import ndimage
from skimage import data as images_of_skimage
from skimage.transform import resize
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.utils import resample

from helpers import files
from helpers.checks import known

_SOURCES = yaml.safe_load(Path(__file__).with_name("sources.yml").read_text(encoding="utf-8"))
_PARTS = ("x_train", "y_train", "x_test", "y_test")
_RAW = {"ct_raw": "ct"}  # sets that are cleaned when they are loaded, as they are without it
NAMES = (*_SOURCES, *_RAW)
pooch.get_logger().setLevel("WARNING")  # its messages would leave the reader's own paths in saved notebooks


@dataclass(frozen=True, repr=False)
class Dataset:
    """Images and labels of one data set, ready for a network, with where they came from.

    x_*, y_* : float32 (n, height, width, channels) in [0, 1], int64 (n,) indices into `class_names`; n may be 0. There
        is a part "val", for validation, after `split`.
    source, sha256 : "embedded", "mirror", "cache" or "download"; of the mirror's file, or else of the arrays' bytes.
    extra : what else the source tells; arrays whose key ends in `_train`, `_val` or `_test` hold one entry an image.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    source: str
    sha256: str
    extra: dict
    x_val: np.ndarray | None = None
    y_val: np.ndarray | None = None

    def __repr__(self):
        return f"<{self.name}: {len(self.x_train)} + {len(self.x_test)} images {self.x_test.shape[1:]}, {self.source}>"

    def take(self, n_train: int | None = None, n_test: int | None = None, seed: int = 0) -> "Dataset":
        """Return fewer images, in the same class proportions up to rounding, shuffled; None keeps a part whole.

        The same `seed` takes the same images. Raises ValueError when there are fewer images than asked for.
        """
        changes, extra = {}, dict(self.extra)
        for part, n in (("train", n_train), ("test", n_test)):
            y = getattr(self, f"y_{part}")
            if n is not None and not 1 <= n <= len(y):
                raise ValueError(f"n_{part}: got {n}, expected 1 to {len(y)}, the images that {self.name} has")
            if n is not None:
                rows = resample(np.arange(len(y)), replace=False, n_samples=n, stratify=y, random_state=seed)
                changes |= {key: getattr(self, key)[rows] for key in (f"x_{part}", f"y_{part}")}
                extra |= {key: value[rows] for key, value in extra.items() if key.endswith(f"_{part}")}
        return replace(self, **changes, extra=extra)

    def split(self, n_val: int | None = None, *, folds: int | None = None, seed: int = 0) -> "Dataset":
        """Return the set with some of its training images set aside for validation, as `x_val` and `y_val`.

        n_val : so many, in the same class proportions up to rounding. folds : instead of it, the first of so many
        stratified folds, in which the images of one group (`extra["group_train"]`) stay together.
        The same `seed` sets the same images aside. Raises ValueError unless both parts have images of every class.
        """
        y, k = self.y_train, len(self.class_names)
        rows = np.arange(len(y))
        if (n_val is None) == (folds is None):
            raise ValueError(f"n_val is {n_val} and folds is {folds}; expected one of the two")
        if folds is not None:
            folds = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            kept, held = next(folds.split(rows, y, self.extra.get("group_train", rows)))
        elif k <= n_val <= len(y) - k:
            kept, held = train_test_split(rows, test_size=n_val, stratify=y, random_state=seed)
        else:
            raise ValueError(f"n_val is {n_val}; expected {k} to {len(y) - k}, since {self.name} has {k} classes")
        if lost := sorted(set(range(k)) - (set(y[kept].tolist()) & set(y[held].tolist()))):
            raise ValueError(f"{self.name}: the classes {lost} are missing in one part; expected more images to split")
        extra = dict(self.extra)
        for name in [name.removesuffix("_train") for name in extra if name.endswith("_train")]:
            extra |= {f"{name}_train": extra[f"{name}_train"][kept], f"{name}_val": self.extra[f"{name}_train"][held]}
        return replace(self, x_train=self.x_train[kept], y_train=y[kept], x_val=self.x_train[held], y_val=y[held],
                       extra=extra)

    def provenance(self) -> dict:
        """Return what a result record keeps of the data."""
        return {"source": self.source, "sha256": self.sha256, "n_train": len(self.x_train), "n_test": len(self.x_test)}


def load(name: str) -> Dataset:
    """Return the data set `name`, one of `NAMES`.

    `ct` comes without its background, whose grey level tells the class; `ct_raw` is the same set with it.
    `digits` and `textures` come out of installed packages, the others from the first that has them: `<name>.npz` in
    the folder that the environment variable HELPERS_DATA names; the user's cache (XDG_CACHE_HOME moves it); the
    public download, which the cache keeps. Every file is checked by its checksum. Raises ValueError for an unknown
    name or a corrupt file of the mirror, OSError when HELPERS_DATA is no folder or none has the data, and says why.
    """
    stored = _RAW.get(known("name", name, NAMES), name)
    about, (arrays, source) = _SOURCES[stored], _find(stored, os.environ.get("HELPERS_DATA"))
    if "y" in arrays:  # the photos, which are for testing only
        common = {"class_names": arrays["imagenet_names"], "x_train": arrays["x"][:0], "y_train": arrays["y"][:0]}
        arrays = common | {f"{key}_test": value for key, value in arrays.items() if "imagenet" not in key}
    parts = [arrays.pop(key) for key in _PARTS]
    digest = _digest(parts)
    if digest != about["arrays"]:
        warnings.warn(f"{name}: these are not the very images of the book's own runs", stacklevel=2)
    x_train, x_test = ((x if x.ndim == 4 else x[..., None]).astype(np.float32) / 255 for x in parts[::2])
    y_train, y_test = (y.astype(np.int64) for y in parts[1::2])
    names = tuple(map(str, arrays.pop("class_names", about.get("class_names"))))
    sha256 = about["sha256"] if source == "mirror" else digest
    if name in _RAW.values():
        x_train, x_test = (np.stack([_body(image[..., 0]) for image in part])[..., None] for part in (x_train, x_test))
        sha256 = _digest([x_train, x_test])  # what units are keyed by
    return Dataset(name, x_train, y_train, x_test, y_test, names, source, sha256, arrays)


def checksums(name: str) -> tuple[str, ...]:
    """Return the SHA-256 of the file and of the arrays of a data set of `NAMES`, as far as the book knows them."""
    about = _SOURCES.get(name, {})
    return tuple(about[key] for key in ("sha256", "arrays") if key in about)


def _digest(parts):
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def _body(image):
    """A CT slice (h, w) with its body alone: 0 around it, and its grey levels from 0 to 1.

    The body is the largest part that is not as grey as the border. Its levels are stretched between their 2nd and 98th
    percentile, as a radiologist sets a window, since every class of this set has a window of its own.
    """
    levels = np.rint(255 * image).astype(int)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    parts, n = ndimage.label(abs(levels - np.sort(border)[border.size // 2]) > 3, np.ones((3, 3)))
    if not n:
        return np.zeros_like(image)
    body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    body = ndimage.binary_fill_holes(ndimage.binary_closing(body, iterations=3))
    inside = np.sort(levels[body])
    low, high = (int(inside[int(share * (inside.size - 1))]) for share in (0.02, 0.98))
    stretched = np.clip((levels - low) * 255 // max(1, high - low), 0, 255)  # whole numbers: the same everywhere
    return np.where(body, stretched, 0).astype(np.float32) / 255


def _find(name, mirror):
    """Return the arrays of uint8 images, (n, h, w) or (n, h, w, c), and their labels, and where they were found."""
    if name in _EMBEDDED:
        return _EMBEDDED[name](), "embedded"
    if mirror and not Path(mirror).is_dir():
        raise FileNotFoundError(f"HELPERS_DATA: got {mirror!r}, expected an existing folder")
    path, expected = Path(mirror or "", f"{name}.npz"), _SOURCES[name]["sha256"]
    if mirror and path.exists():
        files.check(path, expected)
        return files.read_npz(path), "mirror"
    cache, fetched = pooch.os_cache("adversarial-defences-book") / name, []

    def download(url, output_file, caller):
        fetched.append(url)
        pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16)(url, output_file, caller)

    try:
        paths = [Path(pooch.retrieve(url, checksum, Path(url).name, cache, downloader=download))
                 for url, checksum in _SOURCES[name]["files"]]
    except (OSError, ValueError) as error:  # no network, no permission, full disk; or a wrong checksum
        raise OSError(f"data set {name!r}: HELPERS_DATA names no folder with {name}.npz, and the download to {cache} "
                      f"failed ({error}). Set it, load again, or use the profile 'smoke' (embedded data).") from error
    return _READERS.get(name, _read_images)(name, paths), "download" if fetched else "cache"


def _read_idx(name, paths):
    """Return the arrays of gzipped idx files: number of axes in byte 3, big-endian sizes, then the bytes."""
    raw = [gzip.decompress(path.read_bytes()) for path in paths]
    return {key: np.frombuffer(r, np.uint8, offset=4 + 4 * r[3]).reshape(np.frombuffer(r, ">u4", r[3], offset=4))
            for key, r in zip(_PARTS, raw, strict=True)}


def _read_images(name, paths):
    """Return the arrays of a set whose images lie in one archive, or in one file each (the photos)."""
    selections = files.read_npz(Path(__file__).with_name("selections.npz"))
    arrays = {key.split("/")[1]: value for key, value in selections.items() if key.startswith(f"{name}/")}
    if name == "imagenet_photos":
        return arrays | {"x": _squares(map(Path.read_bytes, paths), 299, "RGB")}
    wanted = [*arrays["files_train"], *arrays["files_test"]]
    found, depth = dict.fromkeys(wanted, b""), 1 + wanted[0].count("/")
    with tarfile.open(paths[0]) as archive:
        for member in archive:
            if (file := "/".join(member.name.split("/")[-depth:])) in found:
                found[file] = archive.extractfile(member).read()
    digest = hashlib.sha256(b"".join(found.values())).hexdigest()
    if not all(found.values()) or digest != _SOURCES[name].get("members", digest):
        raise OSError(f"{paths[0]} lacks images or holds other ones: remove it and load {name!r} again")
    x = _squares(found.values(), 64, "L" if name == "ct" else "RGB")
    return arrays | dict(zip(("x_train", "x_test"), np.split(x, [len(arrays["y_train"])]), strict=True))


def _squares(contents, size, mode):
    """Return the central squares of encoded images, scaled to `size` x `size` pixels, as one uint8 array."""
    squares = []
    for content in contents:
        image = Image.open(io.BytesIO(content)).convert(mode)
        left, top = ((length - min(image.size)) // 2 for length in image.size)
        square = image.crop((left, top, left + min(image.size), top + min(image.size)))
        squares.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(squares)


def _digits():
    """Return scikit-learn's 1,797 digits (8x8 pixels, 17 grey levels), scaled up to 28x28; 500 are for testing."""
    x, y = load_digits(return_X_y=True)
    x = np.rint(255 * resize(x.reshape(-1, 8, 8) / 16, (len(x), 28, 28), order=1)).astype(np.uint8)
    split = train_test_split(x, y, test_size=500, stratify=y, random_state=0)
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), split, strict=True))


def _textures():
    """Return overlapping 64x64 patches of three grey 512x512 images: rows 0-383 to train on, 384-511 to test on."""
    arrays, images = {}, [getattr(images_of_skimage, name)() for name in _SOURCES["textures"]["class_names"]]
    for part, top, bottom in (("train", 0, 384), ("test", 384, 512)):
        corners = [(row, column) for row in range(top, bottom - 63, 16) for column in range(0, 449, 16)]
        arrays[f"x_{part}"] = np.stack([image[r:r + 64, c:c + 64] for image in images for r, c in corners])
        arrays[f"y_{part}"] = np.repeat(np.arange(len(images)), len(corners))
        arrays[f"corner_{part}"] = np.tile(corners, (len(images), 1))
    return arrays


_EMBEDDED = {"digits": _digits, "textures": _textures}
_READERS = {"mnist": lambda name, paths: files.read_npz(paths[0]), "fashion_mnist": _read_idx}
