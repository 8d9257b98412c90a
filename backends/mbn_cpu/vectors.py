"""Arithmetic on the statistics of channels, (C,) vectors in float64, and on weights.

What is computed once per channel has to be as exact as float64 can make it, whatever kernels pass over x.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Moments

_LIMIT = np.int64(np.iinfo(np.int64).max)
WIDE = np.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: np.ndarray
    lo: np.ndarray


Mean: TypeAlias = Pair | np.ndarray


class Line(NamedTuple):
    """Normalisation as ``(x - center) * scale + shift`` in the dtype that it is computed in; each (C,).

    ``x - center`` is exact where x is near the mean, of which the center is all that its dtype holds; the rest of the
    mean is in the shift.
    """

    center: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


def line(
    mean: Mean, var: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float, dtype: np.dtype
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
    (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
    total = count + more
    share = more / (total or 1)
    difference = (other_hi - hi) + (other_lo - lo)
    change = lo + difference * share
    mean = hi + change
    rest = change - (mean - hi)  # what rounding took off
    return Moments(total, Pair(mean, rest), m2 + (more_m2 + difference * difference * (count * share)))


def variance(moments: Moments, correction: int) -> np.ndarray:
    """Return m2 / (count - correction), and 0 where weights add up to no more than the correction."""
    count, _, m2 = moments
    return m2 / (count - correction) if count > correction else np.zeros_like(m2)


@np.errstate(all="ignore")
def lerp(start: np.ndarray, end: Mean, weight: float | np.ndarray) -> np.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    if weight == 0:
        return start.copy()
    if isinstance(end, Pair):
        end = end.hi + end.lo
    return ((1 - weight) * start.astype(WIDE) + weight * end).astype(start.dtype)


def counted(num_batches_tracked: np.ndarray) -> np.ndarray:
    """Return the count of batches after one more, as ``mbn.contract.counted`` does for any framework's, but faster."""
    return num_batches_tracked if num_batches_tracked == _LIMIT else num_batches_tracked + 1


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


def invstd(var: np.ndarray, eps: float) -> np.ndarray:
    """Return 1 / sqrt(var + eps) in float64, and 0 where that has no value."""
    spread = var.astype(WIDE) + eps
    result = 1 / np.sqrt(spread)
    result[spread == 0] = 0
    return result


def as_pair(mean: Mean) -> Pair:
    """Return a mean as a pair, whatever form it has."""
    return mean if isinstance(mean, Pair) else Pair(mean.astype(WIDE), np.zeros_like(mean, WIDE))


def _row(values: np.ndarray, ndim: int) -> np.ndarray:
    """Return values for each sample in the shape that broadcasts against an array of ndim axes."""
    return values if values.ndim == ndim else values[:, None]
