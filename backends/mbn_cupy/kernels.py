"""CuPy's arithmetic.

Statistics are exact to float64, whatever x is, and nothing waits for the GPU. Neither the bits nor the error depend on
how CuPy reduces: sums are fixed trees of elementwise additions. Memory beyond that of the output is bounded.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import cupy
import numpy as np

from mbn.contract import Moments

BLOCK = 1 << 24
"""Values converted to float64 at a time: 128 MiB."""

WIDE = np.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: cupy.ndarray
    lo: cupy.ndarray


Mean: TypeAlias = Pair | cupy.ndarray


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
    if mask is not None:
        result *= _row(mask, len(shape))
    if lengths is not None:
        result *= cupy.arange(shape[1]) < lengths[:, None]
    return result


def moments(x: cupy.ndarray, weights: cupy.ndarray | None = None) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    Sums of d = x - shift and of d², with a value of each channel for a shift, lose at most a factor N of float64's
    precision however far the shift is from the mean, since no value weighs more than this one. That is plenty for
    narrower input. float64 input is summed again around its mean, which also gives the rest of the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    shift = _heaviest(x, weights)
    if weights is None:
        count = divisor = x.size // x.shape[1]
    else:
        count = _fold_rows(weights.ravel().astype(WIDE)).copy()  # what was folded need not stay
        divisor = cupy.where(count == 0, 1, count)  # without any weight the sums are 0 as well
    total, squares = _shifted_sums(x, shift, weights)
    if x.dtype == WIDE:
        shift += total / divisor
        total, squares = _shifted_sums(x, shift, weights)
    return Moments(count, Pair(shift, total / divisor), squares - total * total / divisor)


def merge(first: Moments, second: Moments) -> Moments:
    """Return the statistics of two batches together.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    equations 2.1.
    """
    (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
    total = count + more
    share = more / (total if isinstance(total, int) else cupy.where(total == 0, 1, total))
    difference = (other_hi - hi) + (other_lo - lo)
    change = lo + difference * share
    mean = hi + change
    rest = change - (mean - hi)  # what rounding took off
    return Moments(total, Pair(mean, rest), m2 + (more_m2 + difference * difference * (count * share)))


def variance(moments: Moments, correction: int) -> cupy.ndarray:
    """Return m2 / (count - correction), and 0 where weights add up to no more than the correction."""
    count, _, m2 = moments
    var = m2 / (count - correction)
    return var if isinstance(count, int) else cupy.where(count > correction, var, 0)


def normalize(
    x: cupy.ndarray,
    mean: Mean,
    var: cupy.ndarray,
    weight: cupy.ndarray | None,
    bias: cupy.ndarray | None,
    eps: float,
    weights: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order, and 0 where weights are 0.

    Computed as (x - K) * scale + shift with K the mean rounded to x's precision: x - K is exact where x is near the
    mean, and the rest of the mean goes into the shift.
    """
    compute = np.promote_types(x.dtype, np.float32)  # float16 is computed in float32
    scale = _invstd(var, eps)
    if weight is not None:
        scale *= weight
    hi, lo = _pair(mean)
    rounded = (hi + lo).astype(compute)
    shift = (rounded - hi - lo) * scale
    if bias is not None:
        shift += bias
    rounded, scale, shift = (_column(v.astype(compute), x.ndim) for v in (rounded, scale, shift))
    y = cupy.empty_like(x, dtype=compute)  # a ufunc's own output would be in C order, whatever that of x is
    cupy.subtract(x, rounded, out=y)
    y *= scale
    y += shift
    _clear(y, weights)
    return y.astype(x.dtype, copy=False)


def lerp(start: cupy.ndarray, end: Mean, weight: float | cupy.ndarray) -> cupy.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    if isinstance(end, Pair):
        end = end.hi + end.lo
    moved = ((1 - weight) * start.astype(WIDE) + weight * end).astype(start.dtype)
    if isinstance(weight, cupy.ndarray):
        return cupy.where(weight == 0, start, moved)
    return start.copy() if weight == 0 else moved


def grad_sums(
    dy: cupy.ndarray,
    x: cupy.ndarray,
    mean: Mean,
    var: cupy.ndarray,
    eps: float,
    weights: cupy.ndarray | None = None,
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return the sums of dy and of dy * (x - mean) / sqrt(var + eps) for each channel, in float64."""
    hi, lo = _pair(mean)
    column = _column(hi, x.ndim)

    def terms(rows: slice) -> tuple[cupy.ndarray, cupy.ndarray]:
        gradient = dy[rows].astype(WIDE)
        product = (x[rows] - column) * gradient
        for values in (gradient, product):
            _clear(values, weights, rows)
        return gradient, product

    sum_dy, products = _sums(x.shape, terms)
    return sum_dy, (products - lo * sum_dy) * _invstd(var, eps)


def grad_input(
    dy: cupy.ndarray,
    x: cupy.ndarray,
    mean: Mean,
    var: cupy.ndarray,
    weight: cupy.ndarray | None,
    eps: float,
    sums: tuple[cupy.ndarray, cupy.ndarray] | None,
    count: int | cupy.ndarray | None,
    weights: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """Return the gradient of x, in its dtype and memory order: scale * (dy - w * (mean_dy + xhat * mean_dy_xhat)).

    Computed in float64, since the difference may be all but nothing: where dy is proportional to y, for one.
    """
    invstd = _invstd(var, eps)
    scale = _column(invstd if weight is None else invstd * weight, x.ndim)
    if sums is not None:
        hi, lo = _pair(mean)
        sum_dy, sum_dy_xhat = sums
        slope = sum_dy_xhat / count * invstd
        average = sum_dy / count - lo * slope
        hi, slope, average = (_column(v, x.ndim) for v in (hi, slope, average))
    dx = cupy.empty_like(x)
    for rows in _blocks(x.shape):
        values = dy[rows].astype(WIDE)
        if sums is not None:
            w = 1 if weights is None else weights[rows, None]
            values -= average * w  # a large mean of dy goes first: what is left keeps its digits
            shared = x[rows] - hi
            shared *= slope * w
            values -= shared
        values *= scale
        _clear(values, weights, rows)
        dx[rows] = values
    return dx


def _heaviest(x: cupy.ndarray, weights: cupy.ndarray | None) -> cupy.ndarray:
    """Return the first of the values that weigh most, one for each channel, in float64; 0 where none has a weight."""
    values = x if x.ndim == 3 else x[:, :, None]  # noqa: PLR2004 - (N, C) is (N, C, 1)
    if weights is None:
        return values[0, :, 0].astype(WIDE)
    weights = weights.ravel()
    place, length = cupy.argmax(weights), values.shape[2]
    # Indices that are arrays stay on the GPU.
    return cupy.where(weights[place] > 0, values[place // length][:, place % length], 0).astype(WIDE)


def _shifted_sums(
    x: cupy.ndarray, shift: cupy.ndarray, weights: cupy.ndarray | None
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return the weighted sums of x - shift and of its squares for each channel, in float64."""
    column = _column(shift, x.ndim)

    def terms(rows: slice) -> tuple[cupy.ndarray, cupy.ndarray]:
        d = x[rows] - column
        if weights is None:
            return d, d * d
        _clear(d, weights, rows)
        weighted = d * weights[rows, None]
        d *= weighted
        return weighted, d

    return _sums(x.shape, terms)


def _sums(
    shape: tuple[int, ...], terms: Callable[[slice], tuple[cupy.ndarray, cupy.ndarray]]
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return the sums of two terms for each channel, in a fixed order; the terms of a block of rows are used up."""
    first, second = cupy.zeros(shape[1]), cupy.zeros(shape[1])
    for rows in _blocks(shape):
        firsts, seconds = terms(rows)
        first += _fold(firsts)
        second += _fold(seconds)
    return first, second


def _fold(d: cupy.ndarray) -> cupy.ndarray:
    """Return the sum of each channel of d, (N, C) or (N, C, L), as a tree of additions; d is used up."""
    channels = _fold_rows(d)
    return channels if channels.ndim == 1 else _fold_rows(channels.T)


def _fold_rows(d: cupy.ndarray) -> cupy.ndarray:
    """Return the sum over the first axis by adding the second half to the first until one is left; d is used up."""
    n = d.shape[0]
    while n > 1:
        half = (n + 1) // 2
        cupy.add(d[: n - half], d[half:n], out=d[: n - half])  # `+=` would copy the slice onto itself as well
        n = half
    return d[0]


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Return slices of rows that cover an array, with BLOCK values or a single row each."""
    height = max(1, BLOCK // math.prod(shape[1:]))
    return (slice(row, row + height) for row in range(0, shape[0], height))


def _clear(values: cupy.ndarray, weights: cupy.ndarray | None, rows: slice = slice(None)) -> None:
    """Set to 0 what has no weight, whatever it is; the values are those of some rows."""
    if weights is not None:
        cupy.copyto(values, 0, where=weights[rows, None] == 0)


def _invstd(var: cupy.ndarray, eps: float) -> cupy.ndarray:
    """Return 1 / sqrt(var + eps) in float64, and 0 where that has no value."""
    spread = var.astype(WIDE) + eps
    return 1 / cupy.sqrt(cupy.where(spread == 0, np.inf, spread))


def _pair(mean: Mean) -> Pair:
    """Return a mean as a pair, whatever it is."""
    return mean if isinstance(mean, Pair) else Pair(mean.astype(WIDE), cupy.zeros_like(mean, WIDE))


def _column(vector: cupy.ndarray, ndim: int) -> cupy.ndarray:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)


def _row(values: cupy.ndarray, ndim: int) -> cupy.ndarray:
    """Return values for each sample in the shape that broadcasts against an array of ndim axes."""
    return values if values.ndim == ndim else values[:, None]
