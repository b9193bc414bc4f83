"""Flags: raised by what is wrong, not by one unlucky image, with an interval that holds what it says."""

import numpy as np
import pytest
import scipy.stats

from helpers import flags


def first(k, n):
    return np.arange(n) < k


@pytest.mark.parametrize(("k", "n", "limit", "relation", "passed"), [
    (50, 50, 0.99, ">=", True),
    (49, 50, 0.99, ">=", True),  # one unlucky image
    (45, 50, 0.99, ">=", False),
    (0, 50, 0.9, ">=", False),
    (0, 50, 0.1, "<=", True),
    (8, 50, 0.1, "<=", True),  # sixteen per cent of so few may be ten
    (20, 50, 0.1, "<=", False),
    (999, 1000, 1.0, ">=", False),  # what has to hold for all fails with the first
    (1000, 1000, 1.0, ">=", True),
])
def test_a_share_is_raised_where_its_whole_interval_lies_beyond_the_limit(k, n, limit, relation, passed):
    row = flags.share("x", first(k, n), limit, relation)
    assert row["passed"] is passed and row["n"] == n and row["measured"] == k / n
    found = scipy.stats.beta.ppf([0.005, 0.995], [k or 1, k + 1], [n - k + 1, (n - k) or 1])  # Clopper and Pearson
    assert (row["low"], row["high"]) == pytest.approx((found[0] if k else 0, found[1] if k < n else 1), abs=1e-6)


@pytest.mark.parametrize(("only_a", "only_b", "passed"), [
    (0, 0, True), (0, 1, True), (0, 7, True), (0, 8, False), (10, 10, True), (30, 60, False), (60, 30, True)])
def test_a_difference_is_paired(only_a, only_b, passed):
    """Square beats PGD on 1.2 points of the images and never the other way: an unpaired slack does not see it."""
    n = 660
    both = np.zeros(n, bool)
    both[300:500] = True
    a, b = both | first(only_a, n), both | (first(only_a + only_b, n) & ~first(only_a, n))
    row = flags.difference("x", a, b)
    assert row["passed"] is passed and row["measured"] == pytest.approx((only_a - only_b) / n)
    assert row["low"] <= row["measured"] <= row["high"]
    exact = scipy.stats.binomtest(only_a, only_a + only_b, alternative="less").pvalue if only_a + only_b else 1
    assert passed == (exact >= 0.005)


def test_one_point_two_points_are_seen():
    a = np.zeros(1000, bool)
    assert not flags.difference("x", a, first(12, 1000))["passed"]


def test_a_limit_on_a_difference():
    a, b = first(60, 100), first(50, 100)
    assert not flags.difference("x", a, b, 0.01, "<=")["passed"]
    assert flags.difference("x", a, b, 0.1, "<=")["passed"]
    assert flags.difference("x", b, a, 0.01, "<=")["passed"]


def test_several_seeds_are_averaged_by_image():
    rng = np.random.default_rng(0)
    hard = rng.uniform(size=200)
    a, b = (np.array([hard + rng.normal(0, 0.05, 200) < level for _ in range(5)]) for level in (0.5, 0.6))
    row = flags.difference("x", a, b)
    assert not row["passed"] and row["n"] == 200 and row["measured"] == pytest.approx(a.mean() - b.mean())
    assert flags.difference("x", b, a)["passed"] and flags.difference("x", a, a)["low"] == 0
    # The same seed five times adds nothing: the interval is one over images.
    once, five = (flags.difference("x", np.tile(a[:1], (k, 1)), np.tile(b[:1], (k, 1))) for k in (1, 5))
    assert five == pytest.approx(once)


def test_no_interval_goes_beyond_what_shares_can_differ_by():
    a = np.ones((2, 5), bool)
    b = np.zeros((2, 5), bool)
    b[:, 0] = True
    row = flags.difference("x", a, b)
    assert row["measured"] == pytest.approx(0.8) and row["high"] == 1 and flags.difference("x", b, a)["low"] == -1


def test_a_value_without_an_interval():
    assert flags.flag("x", 0.5, 0.4, ">=", 3)["passed"] and not flags.flag("x", 0.5, 0.4, "<=", 3)["passed"]
    row = flags.flag("x", 0.5, 0.4, "<=", 3, low=0.3, high=0.6)
    assert row["passed"] and (row["low"], row["high"]) == (0.3, 0.6)
    assert flags.raised([row, flags.flag("y", 1, 0, "<=", 1)]) == [flags.flag("y", 1, 0, "<=", 1)]


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: flags.flag("x", 1, 0, "==", 1), ValueError, "relation: unknown '=='"),
    (lambda: flags.flag("x", np.nan, 0, ">=", 1), ValueError, "x: measured nan"),
    (lambda: flags.flag("x", 2, 0, ">=", 1, 0, 1), ValueError, "the value inside its interval"),
    (lambda: flags.share("x", np.array([]), 1), TypeError, "hits is float64"),
    (lambda: flags.share("x", [0, 1], 1), TypeError, "hits is int64"),
    (lambda: flags.difference("x", first(1, 5), first(1, 6)), ValueError, "expected the same images"),
    (lambda: flags.difference("x", [0.1], [0.2]), TypeError, "a is float64"),
])
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
