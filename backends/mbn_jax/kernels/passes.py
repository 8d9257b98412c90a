"""The passes over x. Every function can be traced.

Statistics are pairs, so that they are equally exact without 64-bit numbers. Derivatives, in both modes and of any
order, are those of the real numbers that the pairs represent.

Weights are (N, 1) or (N, 1, L), to broadcast against x. Where a weight is 0, no result depends on x or on a derivative,
not even by a product NaN * 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbn_jax.channel_stats import divisor, factors, invstd, square_in_own_units
from mbn_jax.kernels import compiled_loops, gpu_sums
from mbn_jax.kernels.channel_sums import CHUNK, column, is_known, once
from mbn_jax.kernels.layouts import CPU, GPU, Layout, Order, is_sharded
from mbn_jax.kernels.linear_primitives import channel_sum, spread
from mbn_jax.kernels.pairs import (
    Mean,
    Pair,
    Scaled,
    Square,
    Variance,
    as_pair,
    as_scaled,
    divide,
    in_own_units,
    multiply,
    power_of_two,
    times,
    two_sum,
    wide,
    wider,
)
from mbn_jax.kernels.primitives import WidePrimitive

FAR = 1 << 20
"""The largest ratio of a channel's mean square around its center to its variance, for values narrower than float64.

The variance loses so much precision to cancellation, which float64 can spare for narrower values.
"""

SMALL = 2.0**-900
"""A sum of squares below this number, or above its inverse, may have lost digits by leaving the range of float64."""


LARGE = 1 << 24
"""For more values than this, chunks are longer: the system allocates memory for the sums of short ones anew each time.

In passes that read two arrays, longer chunks are not faster.
"""


def against(weights: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Return weights of (N,) or (N, L) as (N, 1) or (N, 1, L), as constants to differentiation."""
    return None if weights is None else lax.stop_gradient(weights).reshape(x.shape[0], 1, *x.shape[2:])


def _moments(x: jax.Array, weights: jax.Array | None, order: Order | None) -> list[jax.Array]:
    compute = compute_dtype(x)
    n = _divisor(x, weights, CPU)
    layout = CPU if is_known(x.size) and x.size <= LARGE else CPU._replace(sums=partial(CPU.sums, chunk=2 * CHUNK))
    first = wide(_first(x, weights, layout))
    around = partial(_around, x=x, weights=weights, n=n, layout=layout, order=order)
    mean, m2, squares = around(first)
    unit = jnp.ones_like(m2)
    # The first of n values differs from the mean by at most sqrt(n - 1) standard deviations.
    n_known = x.size // x.shape[1]
    if compute == np.float64 or weights is not None or not is_known(n_known) or n_known > FAR:
        is_far = jnp.any(squares > (1 if compute == np.float64 else FAR) * m2)
        again = partial(around, careful=compute == np.float64)
        mean, m2, _ = lax.cond(is_far, lambda: again(once(mean.hi)), lambda: (mean, m2, squares))
    if compute == np.float64:
        scaled = partial(_scaled, first, x, weights, n, layout)
        mean, m2, unit = lax.cond(
            _leaves_range(squares, first, x, weights, n, layout), scaled, lambda: (mean, m2, unit)
        )
    return _as_moments(mean, m2 / n, unit, compute)


def _moments_on_gpu(x: jax.Array, weights: jax.Array | None, order: Order | None = None) -> list[jax.Array]:
    """Return the same as ``_moments``, without branches on values, for which the host would have to wait.

    If one pass may not suffice, two are always made.
    """
    compute = compute_dtype(x)
    n = _divisor(x, weights, GPU)
    may_be_far = weights is not None or not is_known(x.size)
    center = wide(_first(x, weights, GPU)) if may_be_far else _first_few(x)
    if compute == np.float64:
        mean, m2, unit = _scaled(center, x, weights, n, GPU)
    else:
        mean, m2, _ = _around(center, x, weights, n, GPU)
        if may_be_far:
            mean, m2, _ = _around(once(mean.hi), x, weights, n, GPU)
        unit = jnp.ones_like(m2)
    return _as_moments(mean, m2 / n, unit, compute)


def _as_moments(mean: Pair, var: jax.Array, unit: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    """Return a mean and a variance as pairs of ``dtype``, each followed by its unit, which is about its own size."""
    mean, scale = in_own_units(Scaled(mean, jnp.ones_like(mean.hi)), dtype)
    return [*mean, scale, *square_in_own_units(Pair(var, jnp.zeros_like(var)), unit, dtype)]


def _leaves_range(
    squares: jax.Array, first: jax.Array, x: jax.Array, weights: jax.Array | None, n: int | jax.Array, layout: Layout
) -> jax.Array:
    """Tell whether squares of float64 have left its range; sums of squares near 0 are compared with the deviations."""
    are_small = squares < SMALL
    is_small = lax.cond(
        jnp.any(are_small),
        lambda: jnp.any(are_small & (_located(first, x, weights, n, layout)[1] > 0)),
        lambda: jnp.any(are_small),
    )
    return is_small | ~jnp.all(squares < 1 / SMALL)


def _scaled(
    center: jax.Array, x: jax.Array, weights: jax.Array | None, n: int | jax.Array, layout: Layout
) -> tuple[Pair, jax.Array, jax.Array]:
    """Return the mean, m2 in the square of a unit of about the mean absolute deviation, and the unit."""
    mean, size = _located(center, x, weights, n, layout)
    unit = power_of_two(size, np.dtype(np.float64))
    mean, m2, _ = _around(once(mean.hi), x, weights, n, layout, once(unit), careful=True)
    return mean, m2, unit


def _located(
    center: jax.Array, x: jax.Array, weights: jax.Array | None, n: int | jax.Array, layout: Layout
) -> tuple[Pair, jax.Array]:
    """Return the mean, and the approximate mean absolute deviation from a center, by sums that cannot overflow."""
    weights = layout.view(weights)
    number = x.size // x.shape[1]
    share = 0.25 * 0.5 ** (number.bit_length() if is_known(number) else 64)
    part = unmasked(wide(layout.view(x)) * share - layout.broadcast(center * share, x.ndim), weights)
    total, size = layout.sums(part if weights is None else part * (weights / n), jnp.abs(part))
    if weights is None:
        total /= n
    return times(two_sum(center * share, total), 1 / share), size


def _first_few(x: jax.Array) -> jax.Array:
    """Return the mean of the first ceil(n / FAR) of each channel's n values, in float64.

    The mean of m of n values differs from the mean of all by at most sqrt(n / m) standard deviations.
    """
    first = wide(_first(x, None, GPU))
    few = -(-x.size // (x.shape[1] * FAR))
    if few == 1:
        return first
    rows = min(few, x.shape[0])
    values = wide(x[:rows] if x.ndim == 2 else x[:rows, :, : -(-few // rows)])
    (total,) = gpu_sums.channel_sums(values - column(first, x.ndim))  # 0 for a constant channel
    return first + total / (values.size // x.shape[1])


def _around(
    center: jax.Array,
    x: jax.Array,
    weights: jax.Array | None,
    n: int | jax.Array,
    layout: Layout,
    unit: jax.Array | None = None,
    *,
    careful: bool = False,
    order: Order | None = None,
) -> tuple[Pair, jax.Array, jax.Array]:
    """Return the mean, m2, and the sum of squared deviations from a center.

    The last two are in units of ``unit**2``, a power of two per channel. A ``careful`` m2 is right to float64's last
    digits, if the center is the mean.
    """
    loops = None if careful else compiled_loops.of(compiled_loops.MOMENTS, x, weights, order)
    if loops is not None:
        total, squares = loops.moments(loops.in_order(x), center, weights)
    else:
        weights, center_of_each = layout.view(weights), layout.broadcast(center, x.ndim)
        deviation = wide(layout.view(x)) - center_of_each
        if unit is not None:
            deviation = difference(wide(layout.view(x)), center_of_each, layout.broadcast(1 / unit, x.ndim))
        deviation = unmasked(deviation, weights)
        term = deviation if weights is None else deviation * weights
        total, squares = layout.sums(term, term * deviation, careful=careful)
    step = total / n
    mean = two_sum(center, step if unit is None else step * unit)
    return mean, jnp.maximum(squares - total * step, 0), squares


def _divisor(x: jax.Array, weights: jax.Array | None, layout: Layout) -> int | jax.Array:
    """Return the sum of the weights of a channel as a divisor of sums: 1 in place of 0, where the sums are 0 too."""
    if weights is None:
        return x.size // x.shape[1]
    (n,) = layout.sums(wide(layout.view(weights)), careful=weights.dtype == np.float64)
    return jnp.where(n == 0, 1, n)


_MOMENTS = WidePrimitive("batch_norm_moments", _moments, _moments_on_gpu)


@jax.custom_jvp
@jax.jit
def moments(x: jax.Array, weights: jax.Array | None, order: Order | None = None) -> tuple[Pair, Scaled, Square]:
    """Return the sum of the weights, and the mean and m2 of each channel of x, (N, C) or (N, C, L).

    m2 is divided by the sum of the weights.

    The deviations are from the first value, so that the results are exact for a constant channel. If a first value is
    far from the mean, they are computed again, from the mean.
    """
    mean, rest, unit, m2, m2_rest, m2_unit = _MOMENTS(x, weights, order)
    return count(x, weights), Scaled(Pair(mean, rest), unit), Square(Pair(m2, m2_rest), m2_unit)


@moments.defjvp
def _moments_jvp(
    primals: tuple[jax.Array, jax.Array | None, Order | None], tangents: tuple[jax.Array, jax.Array | None, Any]
) -> tuple[Any, Any]:
    """Differentiate the definitions of mean and m2, not the arithmetic in pairs."""
    (x, weights, _), (dx, *_) = primals, tangents
    total_weight, mean, m2 = moments(*primals)
    deviation = _deviation(x, mean, weights)
    dx = unmasked(dx.astype(deviation.dtype), weights)
    if weights is not None:
        dx *= weights.astype(dx.dtype)
    n = divisor(total_weight).hi
    dmean = channel_sum(dx) / n
    dm2 = 2 * channel_sum(deviation / spread(m2.unit, x.shape) * dx) / n / m2.unit
    zeros = jax.tree.map(jnp.zeros_like, (total_weight, mean, m2))
    moved = Pair(dmean / mean.unit, zeros[1].pair.lo)
    changes = zeros[0], zeros[1]._replace(pair=moved), zeros[2]._replace(pair=Pair(dm2, zeros[2].pair.lo))
    return (total_weight, mean, m2), changes


@jax.jit
def normalize(
    x: jax.Array,
    mean: Mean,
    var: Variance,
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: Square,
    weights: jax.Array | None,
    order: Order | None = None,
) -> jax.Array:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype."""
    compute = compute_dtype(x, mean)
    given = as_scaled(mean, compute), invstd(var, eps, compute)
    return affine(x, *given, weight, bias, weights, order).astype(x.dtype)


def affine(
    x: jax.Array,
    mean: Scaled,
    invstd: Scaled,
    weight: jax.Array | None,
    bias: jax.Array | None,
    weights: jax.Array | None,
    order: Order | None = None,
) -> jax.Array:
    """Return (x - mean) * invstd * weight + bias in the dtype of the arithmetic, with 0 where the weight is 0.

    Computed as (x - K) * scale + shift with K the mean rounded to that dtype: x - K is exact where x is near the mean,
    and the shift contains the rest of the mean, its rounding error.
    """
    first, second = factors(invstd, weight)
    center, rest = _center(mean)
    # The rest is as small as a last digit of the mean, so multiply it by the factors in an order in which no product
    # overflows. A rest of 0 gives a shift of 0, however large mean and weight are.
    digit = float(jnp.finfo(center.dtype).eps)
    large = jnp.where(rest == 0, 0, mean.unit) * first
    early = jnp.where(large > 1, digit, 1)
    shift = -(rest / digit) * (large * early) * (second * (digit / early))
    if bias is not None:
        shift += bias.astype(center.dtype)
    return _affine(x, *(once(vector) for vector in (center, first, second, shift)), weights, order)


def _center(mean: Scaled) -> tuple[jax.Array, jax.Array]:
    """Return the center (the mean as one number, or 0 if XLA flushes it to 0) and the rest of the mean in its units."""
    center = mean.pair.hi * mean.unit
    return center, (mean.pair.hi - center / mean.unit) + mean.pair.lo


@jax.custom_jvp
def _affine(*operands: Any) -> jax.Array:
    """Return (x - center) * first * second + shift, with 0 where the weight is 0."""
    return _AFFINE(*operands)[0]


def _affinely(
    x: jax.Array,
    center: jax.Array,
    first: jax.Array,
    second: jax.Array,
    shift: jax.Array,
    weights: jax.Array | None,
    order: Order | None,
) -> list[jax.Array]:
    vectors, is_narrow = (center, first, second, shift), center.dtype == x.dtype
    loops = compiled_loops.of(compiled_loops.NORMALIZE, x, weights, order) if is_narrow else None
    # XLA would compute in the order (N, C, L), and copy the result to another order.
    is_swapped = order is not None and order.has_channels_last and x.ndim == 3
    by_cell = weights
    if is_swapped:
        x, by_cell = x.swapaxes(1, 2), None if weights is None else weights.swapaxes(1, 2)
    by_xla = partial(
        _affinely_by_xla, x, *vectors, by_cell, broadcast=partial(column, ndim=2 if is_swapped else x.ndim)
    )
    if loops is None:
        y = by_xla()
    else:
        ordinary = partial(loops.normalize, x, center, second, shift, weights)
        y = lax.cond(_are_ordinary(first, weights), ordinary, by_xla)
    return [y.swapaxes(1, 2) if is_swapped else y]


def _are_ordinary(first: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Tell whether (x - center) * second + shift is the output of ``_affine``: no range is left, no weight invalid."""
    is_in_range = jnp.all(first == 1)
    return is_in_range if weights is None else is_in_range & ~jnp.any(jnp.isnan(weights))


def _affinely_by_xla(
    x: jax.Array,
    center: jax.Array,
    first: jax.Array,
    second: jax.Array,
    shift: jax.Array,
    weights: jax.Array | None,
    broadcast: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    before, after = map(once, _before_and_after(center, first))
    start = once(center * before)
    deviation = (_filled(x, broadcast(center), weights) * broadcast(before) - broadcast(start)) * broadcast(after)
    return unmasked(deviation * broadcast(second) + broadcast(shift), weights)


_AFFINE = WidePrimitive("affine", _affinely)


@_affine.defjvp
def _affine_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    x, center, first, second, _, weights, _ = primals
    dx, dcenter, _, dsecond, dshift, *_ = tangents
    first, second, dcenter, dsecond, dshift = (
        spread(vector, x.shape) for vector in (first, second, dcenter, dsecond, dshift)
    )
    difference = _filled(x, spread(center, x.shape), weights) - spread(center, x.shape)
    change = (dx.astype(second.dtype) - dcenter) * first * second + difference * first * dsecond + dshift
    return _affine(*primals), unmasked(change, weights)


@jax.jit
def grad_input(
    dy: jax.Array,
    x: jax.Array,
    mean: Mean,
    var: Variance,
    weight: jax.Array | None,
    eps: Square,
    sums: tuple[jax.Array, jax.Array] | None,
    count: Pair | None,
    weights: jax.Array | None,
) -> jax.Array:
    """Return the gradient of x in its dtype."""
    compute = compute_dtype(x, mean)
    mean, scale = as_scaled(mean, compute), invstd(var, eps, compute)
    change = unmasked(dy.astype(compute), weights)
    if sums is not None and count is not None:
        average, slope = (divide(as_pair(total, compute), divisor(as_pair(count, compute))) for total in sums)
        change = residual(change, affine(x, mean, scale, None, None, weights), average, slope, weights)
    first, second = (spread(once(factor), x.shape) for factor in factors(scale, weight))
    return unmasked(_multiplied(change, first, second), weights).astype(x.dtype)


def _multiplied(values: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return values * first * second; a small value is multiplied by the larger factor first, lest it underflow."""
    is_small = (jnp.abs(values) < 1) == (jnp.abs(first) < jnp.abs(second))
    return values * jnp.where(is_small, second, first) * jnp.where(is_small, first, second)


def residual(v: jax.Array, xhat: jax.Array, mean: Pair, slope: Pair, weights: jax.Array | None) -> jax.Array:
    """Return v - w * mean - w * xhat * slope: v without its projections on a constant and on xhat.

    Like x - K in ``affine``, v - mean.hi is exact where v is near the mean; mean.lo is subtracted with the small terms.
    """
    center = Pair(*(spread(once(part), v.shape) for part in mean))
    xhat *= spread(once(slope.hi), v.shape)
    if weights is not None:
        weights = weights.astype(v.dtype)
        center = multiply(center, as_pair(weights, v.dtype))
        xhat *= weights
    return (v - center.hi) - (center.lo + xhat)


def unmasked(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return values, with 0 where the weight is 0 and NaN where it is NaN."""
    return values if weights is None else jnp.where(weights > 0, values, weights.astype(values.dtype))


def difference(x: jax.Array, center: jax.Array, factor: jax.Array) -> jax.Array:
    """Return (x - center) * factor, for powers of two as factors, without overflow or underflow of a partial result."""
    before, after = _before_and_after(center, factor)
    return (x * before - center * before) * after


def _before_and_after(center: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a factor as a product of two: one to apply before the subtraction of a center, and one after it."""
    is_small = jnp.abs(center) < 1
    return jnp.where(is_small, factor, jnp.minimum(factor, 1)), jnp.where(is_small, 1, jnp.maximum(factor, 1))


def compute_dtype(x: jax.Array, mean: Mean | None = None) -> jnp.dtype:
    """Return the dtype of the arithmetic: the wider of x's and the mean's, at least float32."""
    compute = wider(x.dtype, jnp.float32)
    if mean is None:
        return compute
    return wider(compute, (mean.unit if isinstance(mean, Scaled) else mean).dtype)


def count(x: jax.Array, weights: jax.Array | None) -> Pair:
    """Return the sum of the weights of a channel."""
    if weights is None:
        n = x.size // x.shape[1]
        return as_pair(float(n), compute_dtype(x)) if is_known(n) else Pair(*_SIZE(lax.stop_gradient(x)))
    return Pair(*_TOTAL_WEIGHT(weights))


def _size(x: jax.Array) -> list[jax.Array]:
    return [*as_pair(jnp.asarray(x.size // x.shape[1]).astype(np.float64), compute_dtype(x))]


_SIZE = WidePrimitive("size", _size)


def _total_weight(layout: Layout, weights: jax.Array) -> list[jax.Array]:
    (total,) = layout.sums(wide(layout.view(weights)), careful=weights.dtype == np.float64)
    return list(as_pair(total[0], weights.dtype))


_TOTAL_WEIGHT = WidePrimitive("total_weight", partial(_total_weight, CPU), partial(_total_weight, GPU))


def _first(x: jax.Array, weights: jax.Array | None, layout: Layout) -> jax.Array:
    """Return the first value of each channel whose weight is not 0, or 0 if all weights are 0."""
    if weights is None:
        return x[(0, slice(None), *(0,) * (x.ndim - 2))]
    indices = jnp.arange(weights.size).reshape(weights.shape)
    counted = jnp.min(jnp.where(weights == 0, weights.size, indices))  # the index of the first counted cell
    if is_sharded() or not is_known(x.size):  # a sum, for which each device reads its own values only
        return jnp.sum(jnp.where(indices == counted, x, 0), axis=(0, *range(2, x.ndim)))
    x = layout.view(x)
    index = jnp.unravel_index(jnp.minimum(counted, weights.size - 1), layout.view(weights).shape)
    first = lax.dynamic_slice(x, index, (1, x.shape[1], *(1,) * (x.ndim - 2))).reshape(-1)
    return jnp.where(counted < weights.size, first, 0)


def _filled(x: jax.Array, filler: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return x in the dtype of ``filler``, which replaces the values of weight 0."""
    x = x.astype(filler.dtype)
    return x if weights is None else jnp.where(weights == 0, lax.stop_gradient(filler), x)


def _deviation(x: jax.Array, mean: Scaled, weights: jax.Array | None) -> jax.Array:
    """Return x - mean, rounded once, with 0 where the weight is 0."""
    center, rest = _center(mean)
    rounded, rest = (spread(part, x.shape) for part in (center, rest * mean.unit))
    return unmasked((_filled(x, rounded, weights) - rounded) - rest, weights)
