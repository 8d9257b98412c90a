"""Arithmetic on the statistics of channels, (C,) vectors in float64, and on weights: what no pass over x has to do.

Nothing waits for the GPU.
"""

from typing import NamedTuple, TypeAlias

import cupy
import numpy as np

from mbn.contract import Moments

WIDE = np.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: cupy.ndarray
    lo: cupy.ndarray


class Scaled(NamedTuple):
    """Statistics whose range is beyond that of float64: ``values * 2**exponent``, each channel in units of its own."""

    values: "Pair | cupy.ndarray"
    """A mean as a pair, or a variance."""
    exponent: cupy.ndarray
    """Integers; nearly always 0."""


Mean: TypeAlias = Pair | Scaled | cupy.ndarray
Variance: TypeAlias = Scaled | cupy.ndarray

_FAR = 400
"""Exponents from which on squares may leave the range of float64: as in ``values.cuh``."""
_FARTHEST = 1000
_FAR_WEIGHT = 128
"""The exponent of weights that are large, or negative that of small ones, beside which a correction is nothing."""
_TINY = float(np.finfo(WIDE).smallest_subnormal)


def weights(
    shape: tuple[int, ...],
    dtype: str,
    mask: cupy.ndarray | None,
    lengths: cupy.ndarray | None,
    sample_weight: cupy.ndarray | None,
) -> cupy.ndarray:
    """Return the sample weight (1 if None) where mask and lengths allow, else 0."""
    result = cupy.ones(shape, dtype)
    if sample_weight is not None:
        result *= _row(sample_weight, len(shape))
        if dtype == "float64":
            result = _summable(result)
    if mask is not None:
        result *= _row(mask, len(shape))
    if lengths is not None:
        result *= cupy.arange(shape[1]) < lengths[:, None]
    return result


def merge(first: Moments, second: Moments) -> Moments:
    """Return the statistics of two batches together.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    equations 2.1.
    """
    if isinstance(first.m2, Scaled) or isinstance(second.m2, Scaled):
        return _merge_scaled(first, second)
    (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
    total = count + more
    share = more / (total if isinstance(total, int) else cupy.where(total == 0, 1, total))
    difference = (other_hi - hi) + (other_lo - lo)
    change = lo + difference * share
    mean = hi + change
    rest = change - (mean - hi)  # what rounding took off
    return Moments(total, Pair(mean, rest), m2 + (more_m2 + difference * difference * (count * share)))


def _merge_scaled(first: Moments, second: Moments) -> Moments:
    """Do what ``merge`` does in units in which no value is large or all are small."""
    sizes, parts = [], []
    for count, mean, m2 in (first, second):
        pair, exponent = mean if isinstance(mean, Scaled) else (mean, cupy.zeros(mean.hi.shape, np.int32))
        squares, _ = m2 if isinstance(m2, Scaled) else (m2, exponent)
        size = cupy.maximum(abs(pair.hi), cupy.sqrt(squares / count))
        sizes.append(cupy.where(size > 0, cupy.frexp(size)[1] + exponent, -_FARTHEST))
        parts.append((count, pair, squares, exponent))
    unit = cupy.maximum(*sizes)
    unit = cupy.where(abs(unit) > _FAR, cupy.minimum(unit, _FARTHEST), 0)
    total, mean, m2 = merge(
        *(
            Moments(
                count,
                Pair(*(cupy.ldexp(part, exponent - unit) for part in pair)),
                cupy.ldexp(squares, 2 * (exponent - unit)),
            )
            for count, pair, squares, exponent in parts
        )
    )
    return Moments(total, Scaled(mean, unit), Scaled(m2, 2 * unit))


def variance(moments: Moments, correction: int) -> Variance:
    """Return m2 / (count - correction), and 0 where weights add up to no more than the correction."""
    count, _, m2 = moments
    if isinstance(m2, Scaled):
        return Scaled(variance(moments._replace(m2=m2.values), correction), m2.exponent)
    var = m2 / (count - correction)
    return var if isinstance(count, int) else cupy.where(count > correction, var, 0)


def lerp(start: cupy.ndarray, end: Mean | Variance, weight: float | cupy.ndarray) -> cupy.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    end, exponent = end if isinstance(end, Scaled) else (end, None)
    if isinstance(end, Pair):
        end = end.hi + end.lo
    share = weight * end
    if exponent is not None:
        share = cupy.ldexp(share, exponent)
    moved = ((1 - weight) * start.astype(WIDE) + share).astype(start.dtype)
    if isinstance(weight, cupy.ndarray):
        return cupy.where(weight == 0, start, moved)
    return start.copy() if weight == 0 else moved


def step(
    momentum: float | None, num_batches_tracked: cupy.ndarray | None, count: int | cupy.ndarray, correction: int
) -> float | cupy.ndarray:
    """Return momentum or 1 / num_batches_tracked, and 0 where weights add up to ``correction`` or less."""
    weight = 1 / num_batches_tracked if momentum is None else momentum
    return weight if isinstance(count, int) else weight * (count > correction).astype(WIDE)


def _summable(weights: cupy.ndarray) -> cupy.ndarray:
    """Return weights times a power of two, if they need one for their sums to be in range; what has one keeps one.

    Means depend on nothing but their ratios, and so does a variance, corrected by 1 or not, while their sum stays far
    above 1, or below it.
    """
    exponent = cupy.frexp(weights.max())[1]
    near = cupy.ldexp(weights, cupy.maximum(cupy.minimum(exponent, _FAR_WEIGHT), -_FAR_WEIGHT) - exponent)
    return cupy.where((weights > 0) & (near == 0), _TINY, near)


def _row(values: cupy.ndarray, ndim: int) -> cupy.ndarray:
    """Return values for each sample in the shape that broadcasts against an array of ndim axes."""
    return values if values.ndim == ndim else values[:, None]
