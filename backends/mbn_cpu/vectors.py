"""Arithmetic on the statistics of channels, (C,) vectors in float64, and on weights.

What is computed once per channel has to be as exact as float64 can make it, whatever kernels pass over x.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Moments

_LIMIT = np.iinfo(np.int64).max
WIDE = np.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: np.ndarray
    lo: np.ndarray


class Scaled(NamedTuple):
    """Statistics beyond the range of float64, or that lose digits there: ``values * 2**exponent``."""

    values: "Pair | np.ndarray"
    """A mean as a pair, or a variance."""
    exponent: np.ndarray
    """The exponent of each channel, an integer; 0 where values are not scaled."""


Mean: TypeAlias = Pair | Scaled | np.ndarray
Variance: TypeAlias = Scaled | np.ndarray

_LEAST, _MOST = 2.0**-900, 2.0**1000
"""Sums of squares between these have lost nothing: what is too small for float64 is nothing beside them."""
FAR = 128
"""The exponent of weights that are large, or negative that of small ones, beside which a correction is nothing."""
FAR_SQUARE = 64.0
"""How many times its variance a channel's mean square may be around what deviations are taken from.

An outlier is that far, hardly any other value; and then a second pass takes deviations from the mean.
"""
TINY = float(np.finfo(WIDE).smallest_subnormal)
_NOWHERE = np.iinfo(np.int16).min
"""The exponent of 0: less than any other."""


class Line(NamedTuple):
    """Normalisation as ``(x - center) * scale + shift`` in the dtype that it is computed in; each (C,).

    ``x - center`` is exact where x is near the mean, of which the center is all that its dtype holds; the rest of the
    mean is in the shift.
    """

    center: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


def line(
    mean: Mean, var: Variance, weight: np.ndarray | None, bias: np.ndarray | None, eps: float, dtype: np.dtype
) -> Line:
    """Return how to normalise in ``dtype``."""
    scale = invstd(var, eps)
    if weight is not None:
        scale *= weight
    hi, lo = as_pair(mean)
    center = (hi + lo).astype(dtype)
    shift = (center - hi - lo) * scale
    if bias is not None:
        shift += bias
    return Line(center, scale.astype(dtype), shift.astype(dtype))


@np.errstate(all="ignore")
def combine_weights(
    shape: tuple[int, ...],
    dtype: str,
    mask: np.ndarray | None,
    lengths: np.ndarray | None,
    sample_weight: np.ndarray | None,
) -> np.ndarray:
    """Return the sample weight (1 if None) where mask and lengths allow, else 0."""
    result = np.ones(shape, dtype)
    if sample_weight is not None:
        result *= _row(sample_weight, len(shape))
        if dtype == "float64":
            result = _summable(result)
    if mask is not None:
        result *= _row(mask, len(shape))
    if lengths is not None:
        result *= np.arange(shape[1]) < lengths[:, None]
    return result


@np.errstate(all="ignore")
def merge(first: Moments, second: Moments) -> Moments:
    """Return the statistics of two batches together.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    equations 2.1.
    """
    if not isinstance(first.m2, Scaled) and not isinstance(second.m2, Scaled):
        merged, difference = _merged(first, second)
        if np.all(in_range(merged.m2) | ((merged.m2 == 0) & (difference == 0))):
            return merged
    return _merge_scaled(first, second)


def _merged(first: Moments, second: Moments) -> tuple[Moments, np.ndarray]:
    """Return the statistics of two batches together, and the difference of their means."""
    (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
    total = count + more
    share = more / (total or 1)
    difference = (other_hi - hi) + (other_lo - lo)
    change = lo + difference * share
    m2 = m2 + (more_m2 + difference * difference * (count * share))
    return Moments(total, added(hi, change), m2), difference


def _merge_scaled(first: Moments, second: Moments) -> Moments:
    """Do what ``merge`` does in units in which no mean or standard deviation is much larger than 1."""
    sizes, parts = [], []
    for count, mean, m2 in (first, second):
        pair, exponent = mean if isinstance(mean, Scaled) else (mean, np.zeros_like(mean.hi, np.intc))
        squares, _ = m2 if isinstance(m2, Scaled) else (m2, exponent)
        size = np.maximum(abs(pair.hi), np.sqrt(squares / (count or 1)))
        sizes.append(np.where(size > 0, exponent_of(size) + exponent, _NOWHERE))
        parts.append((count, pair, squares, exponent))
    unit = np.maximum(*sizes).astype(np.intc)
    unit[unit == _NOWHERE] = 0
    (total, mean, m2), _ = _merged(
        *(
            Moments(count, scaled(pair, exponent - unit), np.ldexp(squares, 2 * (exponent - unit)))
            for count, pair, squares, exponent in parts
        )
    )
    return Moments(total, Scaled(mean, unit), Scaled(m2, 2 * unit))


def variance(moments: Moments, correction: int) -> Variance:
    """Return m2 / (count - correction), and 0 where weights add up to no more than the correction."""
    count, _, m2 = moments
    if isinstance(m2, Scaled):
        return Scaled(variance(moments._replace(m2=m2.values), correction), m2.exponent)
    return m2 / (count - correction) if count > correction else np.zeros_like(m2)


def lerp(start: np.ndarray, end: Mean | Variance, weight: float | np.ndarray) -> np.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    if weight == 0:
        return start.copy()
    end, exponent = end if isinstance(end, Scaled) else (end, None)
    if isinstance(end, Pair):
        end = end.hi + end.lo
    share = weight * end
    if exponent is not None:
        share = np.ldexp(share, exponent)
    return ((1 - weight) * start.astype(WIDE) + share).astype(start.dtype)


def counted(num_batches_tracked: np.ndarray) -> np.ndarray:
    """Return the count of batches after one more, as ``mbn.contract.counted`` does for any framework's, but faster."""
    return num_batches_tracked if int(num_batches_tracked) == _LIMIT else num_batches_tracked + 1


def step(momentum: float | None, num_batches_tracked: np.ndarray | None, count: float, correction: int) -> float:
    """Return momentum or 1 / num_batches_tracked, and 0 where weights add up to ``correction`` or less."""
    if count <= correction:
        return 0.0
    return 1 / num_batches_tracked if momentum is None else momentum


def heaviest(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the first of the values that weigh most, one for each channel, in float64; 0 where none has a weight.

    Around it, no sum of squares is much larger than m2.
    """
    values = x if x.ndim == 3 else x[:, :, None]  # noqa: PLR2004 - (N, C) or (N, C, L)
    if weights is None:
        return values[0, :, 0].astype(WIDE)
    place = np.argmax(weights)
    n, position = divmod(place, values.shape[2])
    return np.where(weights.flat[place] > 0, values[n, :, position], 0).astype(WIDE)


def fold_rows(d: np.ndarray) -> np.ndarray:
    """Return the sum over the first axis by adding the second half to the first until one is left; d is used up."""
    n = len(d)
    while n > 1:
        half = (n + 1) // 2
        d[: n - half] += d[half:n]
        n = half
    return d[0]


def units(sums: np.ndarray, count: float | np.ndarray) -> np.ndarray:
    """Return powers of two that take the terms of two sums apart: those of x - mean and of its squares, (2, C).

    What is left of a term, or of a sum of them, after a unit has been added to it and taken off is a multiple of the
    unit's last digit; and no sum of such multiples is as large as the unit, so they add up without a rounding. ``sums``
    are those around any of the values. Where they are 0 or not finite, nothing has to be taken apart.

    Source: Rump, Ogita and Oishi, Accurate Floating-Point Summation Part I, 2008, section 3.
    """
    total, squares = sums
    m2 = squares - total * (total / count)
    return np.ldexp(1.0, exponent_of(np.array((np.sqrt(count) * np.sqrt(m2), m2))) + 2)


def is_far(squares: np.ndarray, m2: np.ndarray) -> bool:
    """Tell whether a sum of squares was made around a value so far from a mean that digits of the mean are lost."""
    return bool(np.count_nonzero(squares > FAR_SQUARE * m2))  # twice as fast as any()


def invstd(var: Variance, eps: float) -> np.ndarray:
    """Return 1 / sqrt(var + eps) in float64, and 0 where that has no value."""
    if isinstance(var, Scaled):
        var = np.ldexp(*var)
    spread = np.add(var, eps, dtype=WIDE)
    result = 1 / np.sqrt(spread)
    if eps == 0:
        result[spread == 0] = 0
    return result


def added(hi: np.ndarray, lo: np.ndarray) -> Pair:
    """Return hi + lo, rounded to float64, and what rounding took off.

    Around a mean so rounded, no terms of a gradient are larger than they have to be; those around a value that is far
    from the mean would cancel.
    """
    total = hi + lo
    return Pair(total, lo - (total - hi))


def as_pair(mean: Mean) -> Pair:
    """Return a mean as a pair, whatever form it has; of one that is scaled, what float64 can hold."""
    if isinstance(mean, Scaled):
        return scaled(*mean)
    return mean if isinstance(mean, Pair) else Pair(mean.astype(WIDE), np.zeros_like(mean, WIDE))


def compute_dtype(x: np.ndarray) -> np.dtype:
    """Return the dtype to compute in, in the order of bytes of this machine: halves are brought to float32."""
    return np.result_type(x.dtype, np.float32)


def is_wide(x: np.ndarray) -> bool:
    """Tell whether an array has the numbers of float64, in whatever order of bytes."""
    return x.dtype.char == "d"


def in_range(m2: np.ndarray) -> np.ndarray:
    """Return which sums of squares have lost nothing to the range of float64."""
    return (m2 >= _LEAST) & (m2 < _MOST)


def exponent_of(values: np.ndarray) -> np.ndarray:
    """Return the least e of each value that makes ``abs(value) < 2**e``; 0 for 0."""
    return np.frexp(values)[1]


def scaled(pair: Pair, exponent: np.ndarray) -> Pair:
    """Return a pair times ``2**exponent``."""
    return Pair(np.ldexp(pair.hi, exponent), np.ldexp(pair.lo, exponent))


def _summable(weights: np.ndarray) -> np.ndarray:
    """Return weights in float64 times a power of two, if they need one for their sums to be in its range.

    Means depend on nothing but their ratios, and so does a variance, corrected by 1 or not, while their sum stays far
    above 1, or below it. One that would be lost beside the others stays a weight.
    """
    largest = int(exponent_of(weights.max(initial=0.0)))
    if abs(largest) <= FAR:
        return weights
    near = np.ldexp(weights, (FAR if largest > 0 else -FAR) - largest)
    return np.where(weights > 0, np.maximum(near, TINY), weights)


def _row(values: np.ndarray, ndim: int) -> np.ndarray:
    """Return values for each sample in the shape that broadcasts against an array of ndim axes."""
    return values if values.ndim == ndim else values[:, None]
