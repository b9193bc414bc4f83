"""What gives a label away is found where it was planted, and the book's data sets are looked through."""

import os

import numpy as np
import pytest

from helpers import data, leaks
from helpers.data import Dataset

MIRROR = os.environ.get("HELPERS_DATA")
needs_mirror = pytest.mark.skipif(not MIRROR, reason="HELPERS_DATA names no folder")


def noise(n=120, classes=3, **extra):
    """Images without any signal, a hundred levels of grey, in both parts."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(50, 150, (2 * n, 8, 8, 1)) / 255).astype("float32"), np.arange(2 * n) % classes
    return Dataset("noise", x[:n], y[:n], x[n:], y[n:], tuple("abc"), "embedded", "", extra)


def planted(**changes):
    """The same with a mark in the images of each class, made by a function of (x, y)."""
    dataset = noise()
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        for change in changes.values():
            change(x, y)
    return leaks.rules(dataset)


def corner(x, y):
    x[:, 0, 0, 0] = y / 10


def framed(x, y):
    x[:, -1, 3, 0] = 0.9 - y / 10


def dark(x, y):
    x[np.arange(len(x)), 4, np.arange(len(x)) % 8, 0] = y / 50


def repeats(x, y):
    x[:, 2:5] = 0.25 + y[:, None, None, None] / 10


def test_noise_has_no_rule():
    assert max(planted().values()) < 0.5


@pytest.mark.parametrize(("change", "rule"), [(corner, "corners"), (framed, "border"), (dark, "minimum"),
                                              (repeats, "mode")])
def test_a_planted_rule_is_found(change, rule):
    assert planted(change=change)[rule] == 1


def test_another_look_has_a_rule_of_its_own():
    marked = leaks.planted(data.load("digits").take(300, 60), 0.0, 0.1)
    assert leaks.rules(marked, lambda x: {"one pixel": x[:, 0, 0]}) == {"one pixel": leaks.rules(marked)["corners"]}


def test_a_test_image_that_was_trained_on_is_found_after_a_little_noise():
    dataset = noise()
    assert not leaks.repeated(dataset).any()
    dataset.x_test[7] = np.clip(dataset.x_train[3] + 1e-4, 0, 1)
    assert leaks.repeated(dataset).nonzero()[0].tolist() == [7]


def test_a_group_in_both_parts_is_named():
    groups = {"group_train": np.arange(120) // 3, "group_test": 40 + np.arange(120) // 3}
    assert leaks.split_groups(noise()) is None and leaks.split_groups(noise(**groups)) == []
    groups["group_test"][5] = 2
    assert leaks.split_groups(noise(**groups)) == [2]


# The best of the rules on each set. Where it is far above chance, the page of the chapter says so.
KNOWN = {"digits": 0.6, "textures": 0.95, "mnist": 0.15, "fashion_mnist": 0.5, "ct": 0.5, "histology": 0.72,
         "imagenet10": 0.25}


@needs_mirror
@pytest.mark.parametrize("name", KNOWN)
def test_no_rule_of_one_pixel_solves_a_data_set_of_the_book(name):
    dataset = data.load(name)
    dataset = dataset.take(min(5000, len(dataset.x_train)), min(2000, len(dataset.x_test)))
    assert max(leaks.rules(dataset).values()) <= KNOWN[name]
    assert leaks.repeated(dataset).mean() < 0.01 and not leaks.split_groups(dataset)


@needs_mirror
def test_the_raw_slices_are_solved_by_their_corners_and_the_bodies_alone_are_not():
    raw, body = (leaks.rules(data.load(name)) for name in ("ct_raw", "ct"))
    assert raw["corners"] == raw["median"] == 1
    assert body["corners"] == body["border"] == body["mode"] == pytest.approx(1 / 3)


def test_a_shortcut_is_planted_in_a_copy():
    clean = noise()
    marked = leaks.planted(clean)
    assert leaks.rules(marked)["corners"] == 1 and leaks.rules(clean)["corners"] < 0.5
    assert (marked.x_test[:, 1:] == clean.x_test[:, 1:]).all()
    with pytest.raises(ValueError, match="first is 0.9 and step 0.2; expected greys in"):
        leaks.planted(clean, first=0.9)
