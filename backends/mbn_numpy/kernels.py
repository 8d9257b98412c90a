"""NumPy's arithmetic.

Statistics are exact to float64, whatever x is, and the bits do not depend on the run, the memory order or the number
of threads: sums are fixed trees of elementwise additions. Temporaries stay within the processor's caches.
"""

import math
from collections.abc import Callable, Iterator
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
Tile: TypeAlias = tuple[slice, slice]


@np.errstate(all="ignore")
def weights(
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
def moments(x: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    Sums of d = x - shift and of d², with one value of each channel for a shift, lose at most a factor N of
    float64's precision however far the shift is from the mean, since the shift is one of the values. That is plenty
    for narrower input. float64 input is summed again around its mean, which also gives the rest of the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    shift = _heaviest(x, weights)
    count = x.size // x.shape[1] if weights is None else _fold_rows(weights.flatten().astype(WIDE))
    divisor = count or 1  # without any weight the sums are 0 as well
    total, squares = _shifted_sums(x, shift, weights)
    if x.dtype == WIDE:
        shift += total / divisor
        total, squares = _shifted_sums(x, shift, weights)
    return Moments(count, Pair(shift, total / divisor), squares - total * total / divisor)


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


@np.errstate(all="ignore")
def normalize(
    x: np.ndarray,
    mean: Mean,
    var: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order, and 0 where weights are 0.

    Computed as (x - K) * scale + shift with K the mean rounded to x's precision: x - K is exact where x is near the
    mean, and the rest of the mean goes into the shift.
    """
    compute = np.result_type(x.dtype, np.float32)  # float16 and bfloat16 are computed in float32
    scale = _invstd(var, eps)
    if weight is not None:
        scale *= weight
    hi, lo = _pair(mean)
    rounded = (hi + lo).astype(compute)
    shift = (rounded - hi - lo) * scale
    if bias is not None:
        shift += bias
    rounded, scale, shift = (_column(v.astype(compute), x.ndim) for v in (rounded, scale, shift))
    y = np.empty_like(x)
    for tile in _tiles(x.shape):
        channels = tile[1]
        values = np.subtract(x[tile], rounded[channels], dtype=compute)
        values *= scale[channels]
        values += shift[channels]
        _clear(values, _weights_of(tile, weights))
        y[tile] = values
    return y


@np.errstate(all="ignore")
def lerp(start: np.ndarray, end: Mean, weight: float | np.ndarray) -> np.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    if weight == 0:
        return start.copy()
    if isinstance(end, Pair):
        end = end.hi + end.lo
    return ((1 - weight) * start.astype(WIDE) + weight * end).astype(start.dtype)


@np.errstate(all="ignore")
def grad_sums(
    dy: np.ndarray, x: np.ndarray, mean: Mean, var: np.ndarray, eps: float, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and of dy * (x - mean) / sqrt(var + eps) for each channel, in float64."""
    hi, lo = _pair(mean)
    column = _column(hi, x.ndim)

    def terms(tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        gradient = dy[tile].astype(WIDE)
        product = (x[tile] - column[tile[1]]) * gradient
        for values in (gradient, product):
            _clear(values, _weights_of(tile, weights))
        return gradient, product

    sum_dy, products = _sums(x.shape, terms)
    return sum_dy, (products - lo * sum_dy) * _invstd(var, eps)


@np.errstate(all="ignore")
def grad_input(
    dy: np.ndarray,
    x: np.ndarray,
    mean: Mean,
    var: np.ndarray,
    weight: np.ndarray | None,
    eps: float,
    sums: tuple[np.ndarray, np.ndarray] | None,
    count: float | None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the gradient of x, in its dtype and memory order: scale * (dy - w * (mean_dy + xhat * mean_dy_xhat)).

    Computed in float64 and rounded once: where the gradient is small its terms are not, and all digits of them cancel.
    """
    scale = _invstd(var, eps)
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        hi, lo = _pair(mean)
        slope = scale * sum_dy_xhat / count
        average, center, slope = (_column(v, x.ndim) for v in (sum_dy / count - lo * slope, hi, slope))
    scale = _column(scale if weight is None else scale * weight, x.ndim)
    dx = np.empty_like(x)
    for tile in _tiles(x.shape):
        channels, w = tile[1], _weights_of(tile, weights)
        values = dy[tile].astype(WIDE)
        if sums is not None:
            shared = x[tile] - center[channels]
            shared *= slope[channels]
            shared += average[channels]
            if w is not None:
                shared *= w
            values -= shared
        values *= scale[channels]
        _clear(values, w)
        dx[tile] = values
    return dx


def _heaviest(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the first of the values that weigh most, one for each channel, in float64; 0 where none has a weight.

    Around it, no sum of squares is much larger than m2.
    """
    values = x.reshape(*x.shape[:2], -1)  # copies nothing: (N, C) or (N, C, L)
    if weights is None:
        return values[0, :, 0].astype(WIDE)
    place = np.argmax(weights)
    n, position = divmod(place, values.shape[2])
    return np.where(weights.flat[place] > 0, values[n, :, position], 0).astype(WIDE)


def _shifted_sums(x: np.ndarray, shift: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the weighted sums of x - shift and of its squares for each channel, (2, C) in float64."""
    column = _column(shift, x.ndim)
    is_mask = weights is None or bool(np.all((weights == 0) | (weights == 1)))

    def terms(tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        d = x[tile] - column[tile[1]]
        w = _weights_of(tile, weights)
        _clear(d, w)
        squares = d * d
        if not is_mask:
            squares *= w
            d *= w
        return d, squares

    return _sums(x.shape, terms)


def _sums(shape: tuple[int, ...], terms: Callable[[Tile], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the sums of two terms for each channel, (2, C), in a fixed order; the terms of a tile are used up."""
    rows, channels = _slices(shape)
    sums = np.empty((len(rows), 2, shape[1]))
    for (i, row), channel in product(enumerate(rows), channels):
        for k, values in enumerate(terms((row, channel))):
            sums[i, k, channel] = _fold(values)
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


def _tiles(shape: tuple[int, ...]) -> Iterator[Tile]:
    """Return slices of rows and channels that cover an array."""
    return product(*_slices(shape))


def _slices(shape: tuple[int, ...]) -> tuple[list[slice], list[slice]]:
    """Return slices of rows and of channels whose tiles cover an array, with TILE values or a single channel's row."""
    n, c, length = shape[0], shape[1], math.prod(shape[2:])
    width = min(c, max(1, TILE // length))
    height = max(1, TILE // (width * length))
    return [slice(i, i + height) for i in range(0, n, height)], [slice(i, i + width) for i in range(0, c, width)]


def _weights_of(tile: Tile, weights: np.ndarray | None) -> np.ndarray | None:
    """Return the weights of a tile, in the shape that broadcasts against its channels."""
    return None if weights is None else weights[tile[0], None]


def _clear(values: np.ndarray, w: np.ndarray | None) -> None:
    """Set to 0 what has no weight, whatever it is."""
    if w is not None:
        integers = values.view(f"i{values.itemsize}")
        # All bits or none: a product with 0 would keep NaN, and a masked copy takes several times as long.
        integers &= -(w != 0).astype(integers.dtype)


def _invstd(var: np.ndarray, eps: float) -> np.ndarray:
    """Return 1 / sqrt(var + eps) in float64, and 0 where that has no value."""
    spread = var.astype(WIDE) + eps
    return np.where(spread == 0, 0, 1 / np.sqrt(spread))


def _pair(mean: Mean) -> Pair:
    return mean if isinstance(mean, Pair) else Pair(mean.astype(WIDE), np.zeros_like(mean, WIDE))


def _column(vector: np.ndarray, ndim: int) -> np.ndarray:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)


def _row(values: np.ndarray, ndim: int) -> np.ndarray:
    """Return values for each sample in the shape that broadcasts against an array of ndim axes."""
    return values if values.ndim == ndim else values[:, None]
