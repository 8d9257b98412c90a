"""NumPy's arithmetic.

Statistics are exact to float64, whatever x is, and the bits do not depend on the run, the memory order or the number
of threads: sums are fixed trees of elementwise additions. Temporaries stay within the processor's caches.
"""

import math
from itertools import product
from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Moments

TILE = 1 << 16
"""Values converted to float64 at a time: 512 KiB, which a core's second-level cache holds."""

WIDE = np.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: np.ndarray
    lo: np.ndarray


Mean: TypeAlias = Pair | np.ndarray


@np.errstate(all="ignore")
def moments(x: np.ndarray) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    Sums of d = x - shift and of d², with the first value of each channel for a shift, lose at most a factor N of
    float64's precision however far the shift is from the mean, since the shift is one of the values. That is plenty
    for narrower input. float64 input is summed again around its mean, which also gives the rest of the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    count = x.size // x.shape[1]
    shift = x[0].reshape(x.shape[1], -1)[:, 0].astype(WIDE)
    total, squares = _shifted_sums(x, shift)
    if x.dtype == WIDE:
        shift += total / count
        total, squares = _shifted_sums(x, shift)
    return Moments(count, Pair(shift, total / count), squares - total * total / count)


@np.errstate(all="ignore")
def normalize(
    x: np.ndarray,
    mean: Mean,
    var: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
) -> np.ndarray:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order.

    Computed as (x - K) * scale + shift with K the mean rounded to x's precision: x - K is exact where x is near the
    mean, and the rest of the mean goes into the shift.
    """
    compute = np.result_type(x.dtype, np.float32)  # float16 and bfloat16 are computed in float32
    spread = var.astype(WIDE) + eps
    scale = np.where(spread == 0, 0, 1 / np.sqrt(spread))
    if weight is not None:
        scale *= weight
    hi, lo = mean if isinstance(mean, Pair) else (mean.astype(WIDE), 0)
    rounded = (hi + lo).astype(compute)
    shift = (rounded - hi - lo) * scale
    if bias is not None:
        shift += bias
    rounded, scale, shift = (_column(v.astype(compute), x.ndim) for v in (rounded, scale, shift))
    y = np.empty_like(x)
    for rows, channels in product(*_tiles(x.shape)):
        tile = np.subtract(x[rows, channels], rounded[channels], dtype=compute)
        tile *= scale[channels]
        tile += shift[channels]
        y[rows, channels] = tile
    return y


@np.errstate(all="ignore")
def lerp(start: np.ndarray, end: Mean, weight: float | np.ndarray) -> np.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    if isinstance(end, Pair):
        end = end.hi + end.lo
    return ((1 - weight) * start.astype(WIDE) + weight * end).astype(start.dtype)


def _shifted_sums(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return the sums of x - shift and of its squares for each channel, (2, C) in float64."""
    shift = _column(shift, x.ndim)
    rows, channels = _tiles(x.shape)
    sums = np.empty((len(rows), 2, x.shape[1]))
    for (i, row), channel in product(enumerate(rows), channels):
        d = x[row, channel] - shift[channel]
        sums[i, 1, channel] = _fold(d * d)
        sums[i, 0, channel] = _fold(d)
    return _fold_rows(sums)


def _fold(d: np.ndarray) -> np.ndarray:
    """Return the sum of each channel of d, (N, C) or (N, C, L), as a tree of additions; d is used up."""
    channels = _fold_rows(d)
    return channels if channels.ndim == 1 else _fold_rows(channels.T)


def _fold_rows(d: np.ndarray) -> np.ndarray:
    """Return the sum over the first axis by adding the second half to the first until one is left; d is used up."""
    n = len(d)
    while n > 1:
        half = (n + 1) // 2
        d[: n - half] += d[half:n]
        n = half
    return d[0]


def _tiles(shape: tuple[int, ...]) -> tuple[list[slice], list[slice]]:
    """Return slices of rows and of channels whose tiles cover an array, with TILE values or a single channel's row."""
    n, c, length = shape[0], shape[1], math.prod(shape[2:])
    width = min(c, max(1, TILE // length))
    height = max(1, TILE // (width * length))
    return [slice(i, i + height) for i in range(0, n, height)], [slice(i, i + width) for i in range(0, c, width)]


def _column(vector: np.ndarray, ndim: int) -> np.ndarray:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)
