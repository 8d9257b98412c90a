"""The rows of docs/accuracy.md that excuse an error of the fuzz, each exactly as the page has it.

Vectors are (C,), in ``longdouble`` where it has more range than float64, so that squares of all float64 numbers fit.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_LARGEST = float(np.finfo(np.float64).max)
_JAX_DIGITS = 1e-288
_GPU_DIGITS = 1e-300
_DWARFING = 0.9
"""The share of one value in a sum of squares from which on it dwarfs all others."""
_FITTED = 2.0


class Sizes(NamedTuple):
    """How large the numbers of each channel are, over the values that count."""

    x: np.ndarray
    dy: np.ndarray
    deviation: np.ndarray
    """The largest |x - mean|."""
    dwarfed: np.ndarray
    """The share of the square of the largest deviation in the sum of all squares."""
    invstd: np.ndarray
    scale: np.ndarray
    """The scale of a normalised value: invstd times the weight."""


def sizes(case: Any) -> Sizes:
    """Return the sizes of a ``fuzz.Case``."""
    axes = (0, *range(2, case.x.ndim))
    weights = np.ones(case.x[:, 0].shape) if case.weights is None else case.weights
    counts = np.broadcast_to(np.expand_dims(weights, 1), case.x.shape).astype(np.longdouble)
    x, dy = (np.where(counts > 0, values, 0).astype(np.longdouble) for values in (case.x, case.dy))
    n = counts.sum(axes, keepdims=True)
    if case.training:
        mean = (counts * x).sum(axes, keepdims=True) / n
        squares = counts * (x - mean) ** 2
        variance = squares.sum(axes) / n.reshape(-1)
    else:
        mean = _column(case.entries["running_mean"].astype(np.longdouble), case)
        squares = counts * (x - mean) ** 2
        variance = case.entries["running_var"].astype(np.longdouble)
    deviation = np.where(counts > 0, abs(x - mean), 0).max(axes)
    invstd = 1 / np.sqrt(variance + case.layer["eps"])
    invstd[np.isinf(invstd)] = 0
    return Sizes(
        abs(x).max(axes),
        abs(dy).max(axes),
        deviation,
        squares.max(axes) / squares.sum(axes),
        invstd,
        abs(case.entries.get("weight", 1) * invstd),
    )


def least_normal(dtype: str) -> float:
    """Return the least normal number of a dtype; for float16 that of float32, in which float16 is computed."""
    return float(ml_dtypes.finfo("float32" if dtype == "float16" else dtype).smallest_normal)


def underflow_error(name: str, case: Any, size: Sizes) -> np.ndarray:
    """Return the error that an output or a statistic may have where numbers below the least normal one become 0.

    Such a number may be the difference from the mean, the last digits of one, or a term of the result.
    """
    if name != "y":
        return np.full(len(size.x), least_normal(case.layer["dtype"]))
    return _column(least_normal(case.layer["dtype"]) * (1 + size.scale), case)


def more_ulp(name: str, case: Any, size: Sizes) -> float:
    """Return the factor by which the error of a statistic may exceed its bound."""
    if case.layer["dtype"] != "float64":
        return 1.0
    if name.startswith("fitted") and (size.dwarfed > _DWARFING).any():
        return 1 + _FITTED / 4
    if name == "running_var" and case.weights is not None:
        n, correction = float(case.weights.sum()), case.layer["correction"]
        return n / (n - correction) if n > correction else 1.0
    return 1.0


def right(name: str, backend: str, case: Any, size: Sizes) -> np.ndarray | np.bool:
    """Return True for channels whose gradient has to be right, in a shape that broadcasts against the gradient."""
    wrong = np.zeros(len(size.x), bool)
    if case.layer["dtype"] != "float64" or name == "dbias":
        return np.True_
    if backend == "jax":
        wrong |= (size.dy < _JAX_DIGITS) | (size.x < _JAX_DIGITS)
        if not case.training and name == "dweight":
            wrong |= (size.deviation * size.invstd > _LARGEST) | (size.deviation * size.dy > _LARGEST)
    if backend == "cupy":
        wrong |= size.dy < _GPU_DIGITS
    return ~wrong if name == "dweight" else _column(~wrong, case)


def _column(vector: np.ndarray, case: Any) -> np.ndarray:
    return vector.reshape(-1, *[1] * (case.x.ndim - 2))
