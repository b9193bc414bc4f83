"""Checks of arguments. An error names the argument, what came and what was expected."""

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import SupportsIndex

import numpy as np

_WHOLE = {"steps", "restarts", "targets", "queries", "searches", "max_iterations", "epochs", "batch_size"}


def known(argument: str, name: str, names: Iterable[str]) -> str:
    """Return `name`. Raises ValueError, which names the nearest of `names`, when it is none of them."""
    if name not in (names := list(names)):
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise ValueError(f"{argument}: unknown {name!r}, {hint}")
    return name


def check_images(x, name="x", bounds=(0.0, 1.0)):
    """Raise unless `x` is a finite float32 array (n, h, w, c), n >= 1, within `bounds`."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 4:
        came = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{name} is {came}; expected a float32 NumPy array of shape (n, height, width, channels)")
    if not len(x):
        raise ValueError(f"{name} is empty; expected at least one image")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinite pixels; expected finite values")
    if x.min() < bounds[0] or x.max() > bounds[1]:
        beyond = max(float(bounds[0]) - float(x.min()), float(x.max()) - float(bounds[1]))
        raise ValueError(f"{name} lies in [{x.min():.4g}, {x.max():.4g}]; expected pixels in {list(bounds)}, which it "
                         f"leaves by {beyond:.2g}")


def check_labels(y, n, classes, name="y"):
    """Return `y` as int64; raise unless it holds `n` integer labels in 0 ... `classes` - 1."""
    y = np.asarray(y)
    if y.shape != (n,) or not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"{name} is {y.dtype} {y.shape}; expected {n} integer labels, shape ({n},)")
    if not n:
        raise ValueError(f"{name} is empty; expected at least one label")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name} lies in {y.min()}...{y.max()}; expected labels in 0...{classes - 1}")
    return y.astype("int64")


def check_positive(**numbers):
    """Raise ValueError unless each number is finite and > 0; those of `_WHOLE` must be whole, others may be None."""
    for name, number in numbers.items():
        kind = "whole" if name in _WHOLE else "finite"
        if number is None and kind == "finite":
            continue
        if not isinstance(number, SupportsIndex if kind == "whole" else Real) or not 0 < number < np.inf:
            raise ValueError(f"{name} is {number}; expected a {kind} number > 0")


def check_seed(seed):
    """Raise ValueError unless `seed` is a whole number from 0 to 2^31 - 1."""
    if not isinstance(seed, Integral) or not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed!r:.80}; expected a whole number >= 0, below 2^31")


def check_grid(grid, relation=">="):
    """Raise ValueError unless `grid` is a sequence of rising, finite numbers, all `relation` 0."""
    eps = np.asarray(grid)
    if not (eps.ndim == 1 and eps.size and eps.dtype.kind in "iuf" and np.isfinite(eps).all() and
            (eps[0] >= 0 if relation == ">=" else eps[0] > 0) and (np.diff(eps) > 0).all()):
        raise ValueError(f"grid is {grid!r:.80}; expected rising eps values {relation} 0")
