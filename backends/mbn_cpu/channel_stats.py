"""Arithmetic on the statistics of channels, (C,) vectors in float64, and on weights.

Computations on vectors have to be as exact as float64 allows, for every implementation of the passes over x.
"""

from typing import Any, NamedTuple

import numpy as np

from mbn.contract import Moments, Stats
from mbn_common.channel_stats import Formulas, Mean, Pair, Scaled, Variance

_LIMIT = np.iinfo(np.int64).max
WIDE = np.dtype(np.float64)


LEAST, MOST = 2.0**-900, 2.0**1000
"""Sums of squares between these are exact: terms that underflow are too small to change them."""
FAR_SQUARE = 64.0
"""The largest ratio of a channel's mean square around a shift to its variance; beyond it the shift is too far away.

Outliers alone are that far from the mean. Then a second pass takes deviations from the mean.
"""


class Line(NamedTuple):
    """Normalisation as ``(x - center) * scale + shift`` in the dtype of the computation; each vector is (C,).

    The center is the mean, rounded to that dtype: so ``x - center`` is exact where x is near the mean. The shift
    contains the rounding error of the center.
    """

    center: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


def line(
    mean: Mean, var: Variance, weight: np.ndarray | None, bias: np.ndarray | None, eps: float, dtype: np.dtype
) -> Line:
    """Return the line that normalises in ``dtype``."""
    scale = invstd(var, eps)
    if weight is not None:
        scale *= weight
    hi, lo = as_pair(mean)
    center = (hi + lo).astype(dtype)
    shift = (center - hi - lo) * scale
    if bias is not None:
        shift += bias
    return Line(center, scale.astype(dtype), shift.astype(dtype))


class HostFormulas(Formulas):
    """The formulas on the host, where a branch may depend on values."""

    def merge(self, first: Moments, second: Moments) -> Moments:
        """Return the statistics of two batches together, scaled if they would leave the range of float64."""
        if not isinstance(first.m2, Scaled) and not isinstance(second.m2, Scaled):
            merged = self.merge_plain(first, second)
            if merged.m2.size and np.minimum.reduce(merged.m2) >= LEAST and np.maximum.reduce(merged.m2) < MOST:
                return merged  # nearly always
            if np.all(in_range(merged.m2) | ((merged.m2 == 0) & _are_equal(first, second))):
                return merged
        return self.merge_scaled(first, second)

    def from_vectors(self, count: Any, vectors: tuple[np.ndarray, ...]) -> Moments:
        """Return the statistics that ``to_vectors`` had, not scaled where no channel is."""
        if len(vectors) > 3 and vectors[3].any():
            return super().from_vectors(count, vectors)
        return Moments(count, Pair(vectors[0], vectors[1]), vectors[2])


def _are_equal(first: Moments, second: Moments) -> np.ndarray:
    """Return a mask of the channels in which two batches have equal means."""
    (hi, lo), (other_hi, other_lo) = first.mean, second.mean
    are_equal: np.ndarray = (other_hi - hi) + (other_lo - lo) == 0
    return are_equal


FORMULAS = HostFormulas(np, np.ndarray)
step, lerp = FORMULAS.step, FORMULAS.lerp


def counted(num_batches_tracked: np.ndarray) -> np.ndarray:
    """Return the count of batches plus 1, as ``mbn.contract.counted``, but faster."""
    return num_batches_tracked if int(num_batches_tracked) == _LIMIT else num_batches_tracked + 1


def heaviest(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the value of the largest weight, the first of several, for each channel in float64; 0 without a weight.

    It is a shift around which sums of squares are not much larger than m2.
    """
    values = x if x.ndim == 3 else x[:, :, None]
    if weights is None:
        return values[0, :, 0].astype(WIDE)
    index = np.argmax(weights)
    n, position = divmod(index, values.shape[2])
    return np.where(weights.flat[index] > 0, values[n, :, position], 0).astype(WIDE)


def fold_rows(d: np.ndarray) -> np.ndarray:
    """Return the sum over the first axis as a tree: the second half is added to the first, in d, until one is left."""
    n = len(d)
    while n > 1:
        half = (n + 1) // 2
        d[: n - half] += d[half:n]
        n = half
    total: np.ndarray = d[0]
    return total


def units(sums: np.ndarray, count: float | np.ndarray) -> np.ndarray:
    """Return powers of two that split the terms of two sums: those of x - mean and of its squares, (2, C).

    Adding a unit to a term, or to a sum of a few, and subtracting it again rounds the term to a multiple of the unit's
    last digit. No sum of such multiples is as large as the unit, so they add up without rounding. ``sums`` are (2, C)
    around any of the values. Where they are 0 or not finite, no term has to be split.

    Source: Rump, Ogita and Oishi, Accurate Floating-Point Summation Part I, 2008, section 3.
    """
    total, squares = sums
    m2 = squares - total * (total / count)
    powers: np.ndarray = np.ldexp(1.0, exponent_of(np.array((np.sqrt(count) * np.sqrt(m2), m2))) + 2)
    return powers


def is_far(squares: np.ndarray, m2: np.ndarray) -> bool:
    """Tell whether sums of squares are around a shift so far from the mean that digits of the mean are lost."""
    return bool(np.count_nonzero(squares > FAR_SQUARE * m2))  # twice as fast as any()


def invstd(var: Variance, eps: float) -> np.ndarray:
    """Return 1 / sqrt(var + eps) in float64, and 0 where var + eps is 0."""
    if isinstance(var, Scaled):
        var = np.ldexp(*var)
    spread = np.add(var, eps, dtype=WIDE)
    result: np.ndarray = 1 / np.sqrt(spread)
    if eps == 0:
        result[spread == 0] = 0
    return result


class Projection(NamedTuple):
    """The gradient of x as ``scale * (dy - w * ((x - center) * slope + average))``, in float64; each (C,)."""

    scale: np.ndarray
    center: np.ndarray
    slope: np.ndarray
    average: np.ndarray


def projection(
    stats: Stats, weight: np.ndarray | None, eps: float, sums: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, Projection | None]:
    """Return the scale of a gradient, and its projection, or None without ``sums``."""
    mean, var, count = stats
    spread = invstd(var, eps)
    scale = spread if weight is None else spread * weight
    if sums is None:
        return scale, None
    sum_dy, sum_dy_xhat = sums
    center, rest = as_pair(mean)
    slope = spread * sum_dy_xhat / count
    return scale, Projection(scale, center, slope, sum_dy / count - rest * slope)


def added(hi: np.ndarray, lo: np.ndarray) -> Pair:
    """Return hi + lo, rounded to float64, and the rounding error.

    With the rounded mean as the center, the terms of a gradient are small; around a value far from the mean they would
    be large and cancel.
    """
    total = hi + lo
    return Pair(total, lo - (total - hi))


def as_pair(mean: Mean) -> Pair:
    """Return any mean as a pair; a scaled one in float64, where it may overflow or underflow."""
    if isinstance(mean, Scaled):
        return scaled(*mean)
    return mean if isinstance(mean, Pair) else Pair(mean.astype(WIDE), np.zeros_like(mean, WIDE))


def compute_dtype(x: np.ndarray) -> np.dtype:
    """Return the dtype to compute in, in this machine's byte order: float32 for float16 and bfloat16."""
    return np.result_type(x.dtype, np.float32)


def is_wide(x: np.ndarray) -> bool:
    """Tell whether an array is in float64, of either byte order."""
    return x.dtype.char == "d"


def in_range(m2: np.ndarray) -> np.ndarray:
    """Return a mask of the sums of squares that have lost no digits to the range of float64."""
    return (m2 >= LEAST) & (m2 < MOST)


def exponent_of(values: np.ndarray) -> np.ndarray:
    """Return the least e of each value with ``abs(value) < 2**e``; 0 for 0."""
    exponent: np.ndarray = np.frexp(values)[1]
    return exponent


def scaled(pair: Pair, exponent: np.ndarray) -> Pair:
    """Return a pair times ``2**exponent``."""
    return Pair(np.ldexp(pair.hi, exponent), np.ldexp(pair.lo, exponent))
