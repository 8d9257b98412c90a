"""One measure of error for the suite, the command line and the benchmarks.

An error is counted in units in the last place, of the terms that a result is added from: for an output,
``max(|normalised|, 1) * |weight| + |bias|``; for a running statistic, its old part and the mean size of the values (or
squares) in its new one. Cancellation between terms is a property of the data, not of a backend.

That of a derivative is relative to the largest derivative: of any input in the same channel, or of any parameter.
"""

from typing import NamedTuple

import numpy as np

_PRECISION = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149), "float64": (53, -1074)}
"""By dtype: bits of the significand, and the exponent of the least positive number."""

OUTPUT_BOUNDS = {"float16": 1.0, "bfloat16": 1.0, "float32": 4.0, "float64": 4.0}
"""The largest error allowed in an output, in ulp, by x's dtype."""
STATISTICS_BOUNDS = {"float32": 2.0, "float64": 4.0}
"""The largest error allowed in a running statistic, in ulp, by its dtype."""
GRADIENT_BOUNDS = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 3e-6, "float64": 1e-12}
"""The largest relative error allowed in a gradient, by its dtype; of a half, little more than its rounding."""
CANCELLATION = 1e-14
"""The error allowed in a gradient whose terms cancel, relative to the size of its terms."""
THIRD_DERIVATIVE_BOUNDS = {"float32": 1e-6, "float64": 1e-12}
"""The largest relative error allowed in derivatives up to the third, where a framework computes them."""


class Exact(NamedTuple):
    """A result known beyond float64: ``hi + lo``, and the size of the terms it is added from."""

    hi: np.ndarray
    lo: np.ndarray
    magnitude: np.ndarray


def spacing(magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """Return the distance between neighbouring numbers of a dtype around ``magnitude``."""
    precision, least = _PRECISION[dtype]
    _, exponent = np.frexp(magnitude)  # which is 0 for 0
    step: np.ndarray = np.ldexp(1.0, np.where(magnitude == 0, least, np.maximum(exponent - precision, least)))
    return step


def error(actual: np.ndarray, exact: Exact, dtype: str) -> float:
    """Return the largest error of an array against the truth, in ulp of ``dtype``; inf where it is NaN; 0 if empty.

    What is too large for the dtype is infinite, and no error.
    """
    with np.errstate(all="ignore"):
        difference = (actual.astype(np.float64) - exact.hi) - exact.lo
        is_beyond = np.isinf(actual) & (actual == exact.hi.astype(actual.dtype))
        return _largest(np.where(is_beyond, 0, difference), exact.magnitude, dtype)


def distance(a: np.ndarray, b: np.ndarray, magnitude: np.ndarray, dtype: str) -> float:
    """Return the largest difference between two arrays, measured as :func:`error` measures it."""
    return _largest(a.astype(np.float64) - b.astype(np.float64), magnitude, dtype)


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error of a derivative, relative to the largest of those beside it; inf where it is NaN.

    Beside a derivative by x, (N, C) or (N, C, L), are those of its channel; beside one by a parameter, (C,), are all.
    """
    axes = tuple(axis for axis in range(exact.ndim) if axis != 1)
    difference = np.abs(actual.astype(np.float64) - exact).max(axis=axes, initial=0.0)
    sizes = np.abs(exact).max(axis=axes, initial=0.0)
    # Where the truth is 0 so must be the rest.
    relative = np.divide(difference, sizes, where=sizes > 0, out=np.where(difference > 0, np.inf, difference))
    return float(np.max(np.where(np.isnan(relative), np.inf, relative), initial=0.0))


def _largest(difference: np.ndarray, magnitude: np.ndarray, dtype: str) -> float:
    ulps = np.abs(difference) / spacing(magnitude, dtype)
    return float(np.max(np.where(np.isnan(ulps), np.inf, ulps), initial=0.0))
