"""Flags: what an evaluation's soundness hangs on and another seed could turn, measured with its uncertainty.

A flag is a row: what was checked, the value with its interval, the limit, and n, the images (or seeds) behind it. It is
raised, `passed` False, only where the whole interval lies beyond the limit: no flag is raised by one unlucky image.
What holds by construction is no flag; it is asserted.
"""

import numpy as np
import scipy.stats

from helpers.checks import known

CONFIDENCE = 0.99  # a chapter has tens of flags: at 95 % one of them would be raised by chance in most runs
RELATIONS = (">=", "<=")


def flag(check, measured, limit, relation, n, low=None, high=None):
    """A row of (check, measured, low, high, limit, relation, n, passed); without an interval the value has none.

    relation : ">=" asks `high` to reach the limit, "<=" asks `low` to stay within it.
    Raises ValueError for another relation, a number that is not finite, or an interval that lacks the value.
    """
    known("relation", relation, RELATIONS)
    low, high = (float(measured if end is None else end) for end in (low, high))
    if not np.isfinite([measured, low, high, limit]).all() or not low <= measured <= high:
        raise ValueError(f"{check}: measured {measured} in [{low}, {high}], limit {limit}; expected finite numbers, "
                         "the value inside its interval")
    passed = high >= limit if relation == ">=" else low <= limit
    return {"check": check, "measured": float(measured), "low": low, "high": high, "limit": float(limit),
            "relation": relation, "n": int(n), "passed": bool(passed)}


def share(check, hits, limit, relation=">="):
    """Share of `hits`, (n,) bool, against a limit in [0, 1], with its exact interval (Clopper and Pearson 1934)."""
    hits = _answers("hits", hits)
    found = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE)
    return flag(check, hits.mean(), limit, relation, len(hits), found.low, found.high)


def difference(check, a, b, limit=0.0, relation=">="):
    """Share of `a` less share of `b`, both (n,) bool on the same images, against a limit in [-1, 1].

    Only the images on which they differ tell them apart; given their number, the interval of the share of them that `a`
    has is exact (McNemar 1947). Several seeds, (seeds, n) each, are averaged by image before a t-interval over images.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"a and b have shapes {a.shape} and {b.shape}; expected the same images")
    if a.ndim == 2:
        return _mean_difference(check, a, b, limit, relation)
    a, b = _answers("a", a), _answers("b", b)
    only_a, apart, n = int((a & ~b).sum()), int((a != b).sum()), len(a)
    found = scipy.stats.binomtest(only_a, apart).proportion_ci(CONFIDENCE) if apart else None
    low, high = ((2 * end - 1) * apart / n for end in (found.low, found.high)) if apart else (0.0, 0.0)
    return flag(check, (2 * only_a - apart) / n, limit, relation, n, low, high)


def _mean_difference(check, a, b, limit, relation):
    each = (a.astype(float) - b).mean(axis=0)
    reach = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, max(1, len(each) - 1)) * each.std(ddof=1) / len(each) ** 0.5
    low, high = max(-1.0, each.mean() - reach), min(1.0, each.mean() + reach)  # differences of shares go no further
    return flag(check, each.mean(), limit, relation, each.size, low, high)


def _answers(name, values):
    values = np.asarray(values)
    if values.dtype != bool or values.ndim != 1 or not len(values):
        raise TypeError(f"{name} is {values.dtype} {values.shape}; expected one truth value an image, (n,) with n >= 1")
    return values


def raised(rows):
    """Those of `rows` that did not pass."""
    return [row for row in rows if not row["passed"]]
