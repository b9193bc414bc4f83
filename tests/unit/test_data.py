"""The data sets: what they are, where they are looked up, and every way in which that can fail."""

import errno
import gzip
import hashlib
import io
import os
import re
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from helpers import data, files

MIRROR = os.environ.get("HELPERS_DATA")
NOT_EMBEDDED = [name for name in data.NAMES if name not in ("digits", "textures", "ct_raw")]
PARTS = ("x_train", "y_train", "x_test", "y_test")
needs_mirror = pytest.mark.skipif(not MIRROR, reason="HELPERS_DATA is not set")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No mirror, an empty cache, no network."""
    monkeypatch.delenv("HELPERS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def unreachable(self, url, output_file, caller, check_only=False):
        raise OSError(errno.ENETUNREACH, f"{os.strerror(errno.ENETUNREACH)}: {url}")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", unreachable)


def cached_files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def small_set():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (30, 28, 28), np.uint8),
        "y_train": np.arange(30, dtype=np.uint8) % 10,
        "x_test": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "y_test": np.arange(20, dtype=np.uint8) % 10,
    }


def digest_of(arrays):
    return hashlib.sha256(b"".join(arrays[key].tobytes() for key in PARTS)).hexdigest()


def npz_bytes(arrays, **kwargs):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **kwargs)
    return buffer.getvalue()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror whose mnist.npz is small; the table knows its checksums."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "mnist.npz").write_bytes(npz_bytes(small_set()))
    known = {"sha256": files.sha256(folder / "mnist.npz"), "arrays": digest_of(small_set())}
    monkeypatch.setitem(data._SOURCES, "mnist", data._SOURCES["mnist"] | known)
    monkeypatch.setenv("HELPERS_DATA", str(folder))
    return folder


# ── the embedded sets ──


@pytest.mark.parametrize("name, shape, n_classes", [("digits", (28, 28, 1), 10), ("textures", (64, 64, 1), 3)])
def test_embedded_sets_need_no_download(name, shape, n_classes):
    dataset = data.load(name)
    for part in ("train", "test"):
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        assert x.shape == (len(y), *shape)
        assert x.dtype == np.float32
        assert y.dtype == np.int64
        assert 0 <= x.min() < 0.1
        assert 0.9 < x.max() <= 1
        assert set(y) == set(range(n_classes))
    assert len(dataset.class_names) == n_classes
    assert dataset.source == "embedded"


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_embedded_sets_are_the_same_every_time_and_everywhere(name, recwarn):
    first, second = data.load(name), data.load(name)
    np.testing.assert_array_equal(first.x_train, second.x_train)
    assert first.sha256 == second.sha256 == data._SOURCES[name]["arrays"]
    assert not recwarn  # the checksum in sources.yml is that of the book's own runs


def test_digits_are_those_of_scikit_learn_only_larger():
    dataset, (x, y) = data.load("digits"), load_digits(return_X_y=True)
    assert (len(dataset.x_train), len(dataset.x_test)) == (1297, 500)
    both = np.concatenate([dataset.x_train, dataset.x_test])[..., 0]
    labels = np.concatenate([dataset.y_train, dataset.y_test])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(y))
    np.testing.assert_allclose(np.sort(both.mean(axis=(1, 2))), np.sort(x.mean(axis=1)) / 16, atol=0.02)
    # Each scaled digit lies nearest to itself: take every 3.5th pixel and look it up among the originals.
    rows = np.round(np.arange(8) * 3.5 + 1.25).astype(int)
    coarse = both[:100][:, rows][:, :, rows].reshape(100, 64)
    nearest = np.square(coarse[:, None] - x[None] / 16).sum(axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(y[nearest], labels[:100])


def test_the_split_of_digits_is_stratified():
    dataset = data.load("digits")
    train, test = np.bincount(dataset.y_train) / 1297, np.bincount(dataset.y_test) / 500
    np.testing.assert_allclose(train, test, atol=0.002)


def test_textures_are_patches_of_the_images_at_their_corners():
    from skimage import data as skimage_data

    dataset = data.load("textures")
    for part in ("train", "test"):
        x, y, corners = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}"), dataset.extra[f"corner_{part}"]
        for i in range(0, len(x), 37):
            image, (row, column) = getattr(skimage_data, dataset.class_names[y[i]])(), corners[i]
            patch = image[row : row + 64, column : column + 64]
            np.testing.assert_array_equal(np.rint(255 * x[i, :, :, 0]), patch)


def test_textures_share_no_pixel_between_train_and_test():
    dataset = data.load("textures")
    for label in range(3):
        covered = {}
        for part in ("train", "test"):
            mask = np.zeros((512, 512), bool)
            for row, column in dataset.extra[f"corner_{part}"][getattr(dataset, f"y_{part}") == label]:
                assert 0 <= row <= 448
                assert 0 <= column <= 448
                mask[row : row + 64, column : column + 64] = True
            covered[part] = mask
        assert not (covered["train"] & covered["test"]).any()
        assert (covered["train"] | covered["test"]).all()  # and none is left unused


# ── Dataset ──


def test_take_keeps_the_class_proportions_up_to_rounding():
    dataset = data.load("digits")
    taken = dataset.take(n_train=200, n_test=77)
    assert (len(taken.x_train), len(taken.y_train), len(taken.x_test), len(taken.y_test)) == (200, 200, 77, 77)
    for n, before, after in ((200, dataset.y_train, taken.y_train), (77, dataset.y_test, taken.y_test)):
        expected = n * np.bincount(before) / len(before)
        assert np.abs(np.bincount(after, minlength=10) - expected).max() < 1


def test_take_takes_each_image_once_with_its_label_and_its_extras():
    dataset = data.load("textures")
    taken = dataset.take(n_train=300)
    where = {(label, *corner): i for i, (label, corner) in enumerate(
        zip(dataset.y_train.tolist(), dataset.extra["corner_train"].tolist(), strict=True))}
    rows = [where[label, *corner] for label, corner in
            zip(taken.y_train.tolist(), taken.extra["corner_train"].tolist(), strict=True)]
    assert len(set(rows)) == 300
    assert rows != sorted(rows)  # shuffled: a batch holds all classes
    np.testing.assert_array_equal(taken.x_train, dataset.x_train[rows])


def test_take_is_deterministic_by_seed_and_leaves_the_rest_alone():
    dataset = data.load("digits")
    first, same, other = (dataset.take(n_train=100, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.x_train, same.x_train)
    assert not np.array_equal(first.x_train, other.x_train)
    assert first.x_test is dataset.x_test
    assert len(dataset.x_train) == 1297


def test_take_of_fewer_images_than_classes_and_of_all():
    dataset = data.load("digits")
    assert len(set(dataset.take(n_test=3).y_test)) == 3
    everything = dataset.take(n_test=500)
    np.testing.assert_array_equal(np.sort(everything.x_test.sum(axis=(1, 2, 3))),
                                  np.sort(dataset.x_test.sum(axis=(1, 2, 3))))


@pytest.mark.parametrize("n", [0, -1, 1298])
def test_take_refuses_what_there_is_not(n):
    with pytest.raises(ValueError, match=f"n_train: got {n}, expected 1 to 1297.*digits"):
        data.load("digits").take(n_train=n)


# What the chapters wrote before there was `split`.
BY_HAND = {
    "n_val": lambda d: train_test_split(np.arange(len(d.y_train)), test_size=70, stratify=d.y_train, random_state=0),
    "folds": lambda d: next(StratifiedGroupKFold(7, shuffle=True, random_state=0).split(
        d.x_train, d.y_train, d.extra.get("group_train", np.arange(len(d.y_train))))),
}


@pytest.mark.parametrize("how", [{"n_val": 70}, {"folds": 7}], ids=BY_HAND)
@pytest.mark.parametrize("groups", [None, np.arange(300) // 4], ids=["single", "groups"])
def test_split_sets_images_aside_as_the_chapters_did(how, groups):
    dataset = data.load("textures").take(n_train=300)
    dataset = dataset if groups is None else replace(dataset, extra=dataset.extra | {"group_train": groups})
    kept, held = BY_HAND[next(iter(how))](dataset)
    split = dataset.split(**how)
    for key in ("x", "y"):
        np.testing.assert_array_equal(getattr(split, f"{key}_train"), getattr(dataset, f"{key}_train")[kept])
        np.testing.assert_array_equal(getattr(split, f"{key}_val"), getattr(dataset, f"{key}_train")[held])
    np.testing.assert_array_equal(split.extra["corner_train"], dataset.extra["corner_train"][kept])
    np.testing.assert_array_equal(split.extra["corner_val"], dataset.extra["corner_train"][held])
    assert split.x_test is dataset.x_test and dataset.x_val is None
    assert not np.array_equal(dataset.split(**how, seed=1).x_val, split.x_val)
    if groups is not None and "folds" in how:
        assert not set(split.extra["group_train"]) & set(split.extra["group_val"])


@pytest.mark.parametrize("how, message", [
    ({}, "n_val is None and folds is None; expected one of the two"),
    ({"n_val": 30, "folds": 7}, "n_val is 30 and folds is 7"),
    ({"n_val": 2}, "n_val is 2; expected 3 to 57, since textures has 3 classes"),
    ({"n_val": 58}, "n_val is 58; expected 3 to 57"),
])
def test_a_split_that_cannot_be_is_named(how, message):
    with pytest.raises(ValueError, match=message):
        data.load("textures").take(n_train=60).split(**how)


def test_a_split_that_loses_a_class_is_named():
    dataset = data.load("textures").take(n_train=60)
    dataset = replace(dataset, extra={"group_train": dataset.y_train})  # a class is one tile
    with pytest.raises(ValueError, match=r"textures: the classes \[0, 1, 2\] are missing in one part"):
        dataset.split(folds=3)


def test_provenance_counts_the_images_in_use():
    dataset = data.load("digits")
    assert dataset.take(n_train=50).provenance() == {
        "source": "embedded", "sha256": dataset.sha256, "n_train": 50, "n_test": 500}


def test_repr_is_short():
    assert repr(data.load("digits")) == "<digits: 1297 + 500 images (28, 28, 1), embedded>"


# ── the mirror ──


def test_an_unknown_name_comes_with_a_suggestion_or_the_known():
    with pytest.raises(ValueError, match="name: unknown 'minst', did you mean 'mnist'?"):
        data.load("minst")
    with pytest.raises(ValueError, match="name: unknown 'x', expected one of digits, textures, mnist"):
        data.load("x")


def test_the_mirror_comes_first(mirror):
    dataset, arrays = data.load("mnist"), small_set()
    assert dataset.source == "mirror"
    assert dataset.sha256 == files.sha256(mirror / "mnist.npz")
    assert dataset.x_train.shape == (30, 28, 28, 1)
    assert dataset.x_train.dtype == np.float32
    np.testing.assert_array_equal(np.rint(dataset.x_train[..., 0] * 255), arrays["x_train"])
    np.testing.assert_array_equal(dataset.y_test, arrays["y_test"])
    assert dataset.class_names == tuple("0123456789")


def test_a_mirror_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HELPERS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=f"HELPERS_DATA: got '{tmp_path}/nowhere', expected an existing folder"):
        data.load("mnist")


def truncated(content):
    return content[:-100]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def with_other_keys(content):
    return npz_bytes({"images": np.zeros((3, 28, 28), np.uint8)})


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, with_other_keys, emptied])
def test_a_damaged_file_of_the_mirror_is_named(mirror, damage):
    path = mirror / "mnist.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is corrupt, truncated or another file.*SHA-256") as caught:
        data.load("mnist")
    assert files.sha256(path) in str(caught.value)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_a_pickle_is_never_loaded_even_if_its_checksum_is_right(mirror, tmp_path, monkeypatch):
    path = mirror / "mnist.npz"
    arrays = small_set() | {"x_train": np.array([Payload(tmp_path / "owned")], dtype=object)}
    path.write_bytes(npz_bytes(arrays, allow_pickle=True))
    monkeypatch.setitem(data._SOURCES["mnist"], "sha256", files.sha256(path))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load("mnist")
    assert not (tmp_path / "owned").exists()
    assert zipfile.is_zipfile(path)


def test_a_file_that_the_mirror_lacks_is_looked_for_elsewhere(mirror):
    with pytest.raises(OSError, match="download"):
        data.load("fashion_mnist")


# ── the cache and the download ──


@pytest.mark.parametrize("name", NOT_EMBEDDED)
def test_without_data_and_network_the_error_says_what_to_do(name, tmp_path):
    with pytest.raises(OSError, match="data set") as caught:
        data.load(name)
    for word in (repr(name), "HELPERS_DATA", f"{name}.npz", "download", "unreachable", "'smoke'", str(tmp_path)):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", NOT_EMBEDDED)
def test_every_public_file_has_an_https_address_and_a_checksum(name):
    known = data._SOURCES[name]
    for url, checksum in known["files"]:
        assert url.startswith("https://")
        assert checksum is None or re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", checksum)
        assert checksum or re.fullmatch("[0-9a-f]{64}", known["members"])
    basenames = [Path(url).name for url, _ in known["files"]]
    assert len(set(basenames)) == len(basenames)  # they share a folder of the cache


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.contents[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def server(alone, monkeypatch):
    """A server on this machine: `publish` puts files on it and into the table; `cut` breaks transfers off."""
    monkeypatch.undo()
    monkeypatch.delenv("HELPERS_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.contents, server.requests, server.cut = {}, [], False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def publish(name, contents, checksum=True, **known):
            server.contents.update({f"/{key}": value for key, value in contents.items()})
            entries = [[f"http://127.0.0.1:{server.server_port}/{key}",
                        f"sha256:{hashlib.sha256(value).hexdigest()}" if checksum else None]
                       for key, value in contents.items()]
            monkeypatch.setitem(data._SOURCES, name, data._SOURCES[name] | {"files": entries} | known)

        server.publish = publish
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small_mnist(server, cache):
    server.publish("mnist", {"mnist.npz": npz_bytes(small_set())}, arrays=digest_of(small_set()))


def test_a_download_is_kept_in_the_cache(server, small_mnist, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(pooch.get_logger(), "handlers", [caplog.handler])
    first = data.load("mnist")
    assert "100%" in capsys.readouterr().err  # a progress bar
    assert not caplog.records  # and no path of this machine, which a saved notebook would keep
    second = data.load("mnist")
    assert (first.source, second.source) == ("download", "cache")
    assert first.sha256 == second.sha256 == digest_of(small_set())
    np.testing.assert_array_equal(first.x_train, second.x_train)
    assert server.requests == ["/mnist.npz"]
    assert cached_files(tmp_path) == ["mnist.npz"]


def test_the_mirror_is_preferred_to_the_download(server, cache, mirror):
    server.publish("mnist", {"mnist.npz": b"not asked for"})
    assert data.load("mnist").source == "mirror"
    assert server.requests == []


def test_an_interrupted_download_leaves_nothing_and_starts_anew(server, small_mnist, tmp_path):
    server.cut = True
    with pytest.raises(OSError, match="download to .* failed"):
        data.load("mnist")
    assert cached_files(tmp_path) == []
    server.cut = False
    assert data.load("mnist").source == "download"
    assert cached_files(tmp_path) == ["mnist.npz"]


def test_a_download_that_the_user_stops_leaves_nothing(server, small_mnist, tmp_path, monkeypatch):
    whole = pooch.HTTPDownloader.__call__

    def stopped(self, url, output_file, caller):
        Path(output_file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist")
    assert cached_files(tmp_path) == []
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", whole)
    assert data.load("mnist").source == "download"


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_file_of_the_cache_is_downloaded_anew(server, small_mnist, tmp_path, damage):
    data.load("mnist")
    path, = (tmp_path / "cache").rglob("mnist.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert data.load("mnist").source == "download"
    assert data.load("mnist").source == "cache"


def test_a_download_with_another_checksum_is_refused(server, small_mnist, tmp_path):
    server.contents["/mnist.npz"] = flipped(server.contents["/mnist.npz"])
    with pytest.raises(OSError, match="mnist.npz.*does not match"):
        data.load("mnist")
    assert cached_files(tmp_path) == []


def test_other_images_than_the_books_are_warned_about(server, cache):
    server.publish("mnist", {"mnist.npz": npz_bytes(small_set())}, arrays="0" * 64)
    with pytest.warns(UserWarning, match="mnist: these are not the very images") as caught:
        assert data.load("mnist").sha256 == digest_of(small_set())
    assert caught[0].filename == __file__


def test_a_cache_that_cannot_be_written(server, small_mnist, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=f"download to {tmp_path}/file.* failed .*directory"):
        data.load("mnist")


def test_a_cache_on_a_full_disk(server, small_mnist, tmp_path, monkeypatch):
    def full(self, url, output_file, caller):
        Path(output_file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(OSError, match="download to .* failed .*No space left on device"):
        data.load("mnist")
    assert cached_files(tmp_path) == []


def test_fashion_mnist_is_read_from_idx_files(server, cache):
    def idx(array):
        return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())

    arrays = small_set()
    server.publish("fashion_mnist", {f"{key}.gz": idx(arrays[key]) for key in PARTS}, arrays=digest_of(arrays))
    dataset = data.load("fashion_mnist")
    np.testing.assert_array_equal(np.rint(dataset.x_test[..., 0] * 255), arrays["x_test"])
    np.testing.assert_array_equal(dataset.y_train, arrays["y_train"])
    assert dataset.class_names[9] == "Ankle boot"


def picture(i, size=(64, 64)):
    """Return a PNG of one colour that tells `i` apart from the others."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (i % 251, i // 251, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def archive_of(names, skip=0):
    """Return a .tar.gz in which the i-th name holds the i-th picture, stored in another order and with other files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for i in reversed(range(skip, len(names))):
            for name, content in ((f"top/{names[i]}", picture(i)), (f"top/other/{i}.txt", b"")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def selection(name):
    with np.load(Path(data.__file__).with_name("selections.npz"), allow_pickle=False) as npz:
        return {key.split("/")[1]: npz[key] for key in npz.files if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name, n_train, n_test, n_classes",
                         [("histology", 2359, 450, 3), ("imagenet10", 5000, 1000, 10)])
@pytest.mark.filterwarnings("ignore:.*not the very images")
def test_an_archive_gives_the_chosen_images_in_their_order(server, cache, name, n_train, n_test, n_classes):
    chosen = selection(name)
    names = [*chosen["files_train"], *chosen["files_test"]]
    members = hashlib.sha256(b"".join(map(picture, range(len(names))))).hexdigest()
    server.publish(name, {"archive.tar.gz": archive_of(names)}, members=members)
    dataset = data.load(name)
    assert dataset.x_train.shape == (n_train, 64, 64, 3)
    assert dataset.x_test.shape == (n_test, 64, 64, 3)
    both = np.rint(255 * np.concatenate([dataset.x_train, dataset.x_test])[:, 10, 20]).astype(int)
    np.testing.assert_array_equal(both[:, 0] + 251 * both[:, 1], np.arange(n_train + n_test))
    np.testing.assert_array_equal(dataset.y_test, chosen["y_test"])
    np.testing.assert_array_equal(dataset.extra["files_train"], chosen["files_train"])
    assert len(dataset.class_names) == n_classes


@pytest.mark.filterwarnings("ignore:.*not the very images")
def test_ct_is_grey(server, cache):
    chosen = selection("ct")
    server.publish("ct", {"archive.tar.gz": archive_of([*chosen["files_train"], *chosen["files_test"]])})
    dataset = data.load("ct")
    assert dataset.x_train.shape == (1351, 64, 64, 1)
    assert dataset.class_names == ("AbdomenCT", "ChestCT", "HeadCT")


def test_an_archive_that_lacks_images_is_named(server, cache, tmp_path):
    chosen = selection("ct")
    names = [*chosen["files_train"], *chosen["files_test"]]
    server.publish("ct", {"archive.tar.gz": archive_of(names, skip=1)})
    with pytest.raises(OSError, match=f"{tmp_path}.*archive.tar.gz lacks images or holds other ones"):
        data.load("ct")


def test_an_archive_without_a_checksum_is_checked_by_its_images(server, cache, tmp_path):
    chosen = selection("histology")
    names = [*chosen["files_train"], *chosen["files_test"]]
    server.publish("histology", {"archive.tar.gz": archive_of(names)}, checksum=False)  # members: the real images'
    with pytest.raises(OSError, match=f"{tmp_path}.*archive.tar.gz lacks images or holds other ones"):
        data.load("histology")


@pytest.mark.parametrize("box", [(50, 0, 349, 299), (0, 50, 299, 349)], ids=["wide", "tall"])
@pytest.mark.filterwarnings("ignore:.*not the very images")
def test_photos_are_cut_to_their_central_square(server, cache, box):
    pictures = {f"{i}.png": picture(i, (299, 299)) for i in range(31)}
    framed = Image.new("RGB", (box[0] + box[2], box[1] + box[3]))
    inner = np.random.default_rng(0).integers(0, 256, (299, 299, 3), np.uint8)
    framed.paste(Image.fromarray(inner), box)
    buffer = io.BytesIO()
    framed.save(buffer, "PNG")
    server.publish("imagenet_photos", pictures | {"31.png": buffer.getvalue()})
    dataset = data.load("imagenet_photos")
    assert dataset.x_train.shape == (0, 299, 299, 3)
    assert dataset.x_test.shape == (32, 299, 299, 3)
    np.testing.assert_array_equal(np.rint(255 * dataset.x_test[:31, 0, 0, 0]), np.arange(31))
    np.testing.assert_array_equal(np.rint(255 * dataset.x_test[31]), inner)
    check_photos(dataset)


def check_photos(dataset):
    assert dataset.y_test[1] == 2
    assert dataset.class_names[2] == "great white shark"
    assert len(dataset.class_names) == 1000
    assert dataset.extra["author_test"][1] == "Singa Hitam"
    assert dataset.extra["license_test"][1] == "CC BY 2.0"
    assert {len(value) for value in dataset.extra.values()} == {32}
    few = dataset.take(n_test=5)
    for label, name in zip(few.y_test, few.extra["class_names_test"], strict=True):
        assert dataset.class_names[label] == name
    with pytest.raises(ValueError, match="n_train: got 1, expected 1 to 0"):
        dataset.take(n_train=1)


# ── the real data ──

REAL = {"mnist": (60000, 10000, (28, 28, 1), 10), "fashion_mnist": (60000, 10000, (28, 28, 1), 10),
        "ct": (1351, 450, (64, 64, 1), 3), "histology": (2359, 450, (64, 64, 3), 3),
        "imagenet10": (5000, 1000, (64, 64, 3), 10), "imagenet_photos": (0, 32, (299, 299, 3), 1000)}


@needs_mirror
@pytest.mark.parametrize("name", NOT_EMBEDDED)
def test_the_real_set(name, monkeypatch, recwarn):
    monkeypatch.setenv("HELPERS_DATA", MIRROR)
    dataset = data.load(name)
    n_train, n_test, shape, n_classes = REAL[name]
    assert dataset.x_train.shape == (n_train, *shape)
    assert dataset.x_test.shape == (n_test, *shape)
    assert len(dataset.class_names) == n_classes
    assert dataset.x_test.min() == 0
    assert dataset.x_test.max() == 1
    for y in (dataset.y_train, dataset.y_test):
        assert y.dtype == np.int64
        assert ((y >= 0) & (y < n_classes)).all()
    assert not recwarn  # the arrays are those of sources.yml
    assert dataset.source == "mirror"


@needs_mirror
def test_a_slice_without_its_background_is_the_same_slice(monkeypatch):
    monkeypatch.setenv("HELPERS_DATA", MIRROR)
    raw, body = data.load("ct_raw"), data.load("ct")
    np.testing.assert_array_equal(raw.y_test, body.y_test)
    assert raw.sha256 != body.sha256 and raw.extra.keys() == body.extra.keys()
    inside = body.x_test > 0
    assert 0.1 < inside.mean() < 0.5 and not inside[:, [0, -1], [0, -1]].any()
    for shown, image in zip(body.x_test[:50], raw.x_test[:50], strict=True):  # levels keep their order
        levels, found = image[shown > 0], shown[shown > 0]
        assert (np.diff(found[np.argsort(levels)]) >= 0).all()


def test_a_slice_of_one_grey_has_no_body():
    assert not data._body(np.full((64, 64), 0.4, np.float32)).any()


@needs_mirror
def test_no_tile_of_histology_is_in_both_parts(monkeypatch):
    monkeypatch.setenv("HELPERS_DATA", MIRROR)
    dataset = data.load("histology").take(n_train=1000, n_test=200)
    assert len(dataset.extra["group_train"]) == 1000
    assert not set(dataset.extra["group_train"]) & set(dataset.extra["group_test"])


@needs_mirror
def test_the_photos_of_the_mirror(monkeypatch):
    monkeypatch.setenv("HELPERS_DATA", MIRROR)
    check_photos(data.load("imagenet_photos"))


@needs_mirror
@pytest.mark.parametrize("name", ["ct", "histology", "imagenet10", "imagenet_photos"])
def test_the_selections_are_those_of_the_mirror(name):
    with np.load(Path(MIRROR) / f"{name}.npz", allow_pickle=False) as npz:
        mirrored = {key: npz[key] for key in npz.files if key not in ("x", "x_train", "x_test")}
    chosen = selection(name)
    assert set(chosen) == set(mirrored)
    for key, value in mirrored.items():
        np.testing.assert_array_equal(chosen[key], value)
