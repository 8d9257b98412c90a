"""CuPy's arithmetic.

Statistics are exact to float64, whatever x is, and nothing waits for the GPU. Neither the bits nor the error depend on
how CuPy reduces: sums are fixed trees of elementwise additions. Memory beyond that of the output is bounded.
"""

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


def moments(x: cupy.ndarray) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    Sums of d = x - shift and of d², with the first value of each channel for a shift, lose at most a factor N of
    float64's precision however far the shift is from the mean, since the shift is one of the values. That is plenty
    for narrower input. float64 input is summed again around its mean, which also gives the rest of the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    count = x.size // x.shape[1]
    if x.ndim == 2:  # noqa: PLR2004 - (N, C) is (N, C, 1)
        x = x[:, :, None]
    shift = x[0, :, 0].astype(WIDE)
    total, squares = _shifted_sums(x, shift)
    if x.dtype == WIDE:
        shift += total / count
        total, squares = _shifted_sums(x, shift)
    return Moments(count, Pair(shift, total / count), squares - total * total / count)


def normalize(
    x: cupy.ndarray,
    mean: Mean,
    var: cupy.ndarray,
    weight: cupy.ndarray | None,
    bias: cupy.ndarray | None,
    eps: float,
) -> cupy.ndarray:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order.

    Computed as (x - K) * scale + shift with K the mean rounded to x's precision: x - K is exact where x is near the
    mean, and the rest of the mean goes into the shift.
    """
    compute = np.promote_types(x.dtype, np.float32)  # float16 is computed in float32
    spread = var.astype(WIDE) + eps
    scale = 1 / cupy.sqrt(cupy.where(spread == 0, np.inf, spread))
    if weight is not None:
        scale *= weight
    hi, lo = mean if isinstance(mean, Pair) else (mean.astype(WIDE), 0)
    rounded = (hi + lo).astype(compute)
    shift = (rounded - hi - lo) * scale
    if bias is not None:
        shift += bias
    rounded, scale, shift = (_column(v.astype(compute), x.ndim) for v in (rounded, scale, shift))
    y = cupy.empty_like(x, dtype=compute)  # a ufunc's own output would be in C order, whatever that of x is
    cupy.subtract(x, rounded, out=y)
    y *= scale
    y += shift
    return y.astype(x.dtype, copy=False)


def lerp(start: cupy.ndarray, end: Mean, weight: float | cupy.ndarray) -> cupy.ndarray:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start."""
    if isinstance(end, Pair):
        end = end.hi + end.lo
    return ((1 - weight) * start.astype(WIDE) + weight * end).astype(start.dtype)


def _shifted_sums(x: cupy.ndarray, shift: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Return the sums of x - shift and of its squares for each channel of x, (N, C, L), in float64."""
    n, c, length = x.shape
    rows = max(1, BLOCK // (c * length))
    total, squares = cupy.zeros_like(shift), cupy.zeros_like(shift)
    for row in range(0, n, rows):
        d = x[row : row + rows] - shift[:, None]
        squares += _fold(_fold(d * d).T)
        total += _fold(_fold(d).T)
    return total, squares


def _fold(d: cupy.ndarray) -> cupy.ndarray:
    """Return the sum over the first axis by adding the second half to the first until one is left; d is used up."""
    n = d.shape[0]
    while n > 1:
        half = (n + 1) // 2
        cupy.add(d[: n - half], d[half:n], out=d[: n - half])  # `+=` would copy the slice onto itself as well
        n = half
    return d[0]


def _column(vector: cupy.ndarray, ndim: int) -> cupy.ndarray:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)
