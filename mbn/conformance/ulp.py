"""The measure of error for the suite, the command line and the benchmarks.

An error is given in units in the last place (ulp) of the size of a result's terms. For an output, that size is
``max(|normalised|, 1) * |weight| + |bias|``; for a running statistic, it is the old part plus the mean absolute value
(or mean square) in the new part. Cancellation between terms is a property of the data, not of a backend.

The error of a derivative is relative to the largest derivative: by any value of the same channel, or by any parameter.
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
"""The largest relative error allowed in a gradient, by its dtype; for 16 bits, little more than its rounding."""
CANCELLATION = 1e-14
"""The error allowed in a gradient whose terms cancel, relative to the size of its terms."""
THIRD_DERIVATIVE_BOUNDS = {"float32": 1e-6, "float64": 1e-12}
"""The largest relative error allowed in derivatives up to the third, where a framework computes them."""


class Exact(NamedTuple):
    """A result with more digits than float64, ``hi + lo``, and the size of its terms."""

    hi: np.ndarray
    lo: np.ndarray
    magnitude: np.ndarray


def spacing(magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """Return the distance between neighbouring numbers of a dtype around ``magnitude``."""
    precision, least = _PRECISION[dtype]
    _, exponent = np.frexp(magnitude)  # the exponent of 0 is 0
    step: np.ndarray = np.ldexp(1.0, np.where(magnitude == 0, least, np.maximum(exponent - precision, least)))
    return step


def error(actual: np.ndarray, exact: Exact, dtype: str) -> float:
    """Return the largest error of an array, in ulp of ``dtype``; inf if it contains NaN, 0 if it is empty.

    If an exact value is too large for the dtype, infinity is no error.
    """
    with np.errstate(all="ignore"):
        difference = (actual.astype(np.float64) - exact.hi) - exact.lo
        is_beyond = np.isinf(actual) & (actual == exact.hi.astype(actual.dtype))
        return _largest(np.where(is_beyond, 0, difference), exact.magnitude, dtype)


def distance(a: np.ndarray, b: np.ndarray, magnitude: np.ndarray, dtype: str) -> float:
    """Return the largest difference between two arrays, measured as :func:`error` measures it."""
    return _largest(a.astype(np.float64) - b.astype(np.float64), magnitude, dtype)


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error of a derivative, relative to the largest derivative of its group; inf if it is NaN.

    The group of a derivative by x, (N, C) or (N, C, L), is its channel; that of one by a parameter, (C,), is all of
    them.
    """
    axes = tuple(axis for axis in range(exact.ndim) if axis != 1)
    difference = np.abs(actual.astype(np.float64) - exact).max(axis=axes, initial=0.0)
    sizes = np.abs(exact).max(axis=axes, initial=0.0)
    # If all exact derivatives of a group are 0, any other result is an infinite error.
    relative = np.divide(difference, sizes, where=sizes > 0, out=np.where(difference > 0, np.inf, difference))
    return float(np.max(np.where(np.isnan(relative), np.inf, relative), initial=0.0))


def _largest(difference: np.ndarray, magnitude: np.ndarray, dtype: str) -> float:
    ulps = np.abs(difference) / spacing(magnitude, dtype)
    return float(np.max(np.where(np.isnan(ulps), np.inf, ulps), initial=0.0))
