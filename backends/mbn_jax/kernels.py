"""JAX's arithmetic.

Statistics are pairs, so that they are exact where there are no 64-bit numbers too. Everything can be traced, and
differentiates as the real numbers that it stands for, forwards and backwards and again.

Weights come as (N, 1) or (N, 1, L), to broadcast against x. Where they are 0 nothing may depend on x or on a
derivative: not even as NaN * 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbn_jax.channels import channel_sums, once, rows
from mbn_jax.linear import Shape, channel_sum, spread
from mbn_jax.maps import Map
from mbn_jax.pairs import (
    Pair,
    Statistic,
    add,
    as_pair,
    divide,
    multiply,
    negative,
    rounded,
    two_sum,
    where,
    widest_dtype,
)

FAR = 2.0**10
"""How far from its mean a channel's sum of squares may be taken, in its variance: so many digits are lost, and spare.

They are only where values are narrower than the sums, which are made in float64.
"""


@partial(jax.jit, static_argnames=("shape", "dtype"))
def combine_weights(
    shape: Shape,
    dtype: str,
    mask: jax.Array | None,
    lengths: jax.Array | None,
    sample_weight: jax.Array | None,
) -> jax.Array:
    """Return the sample weight (1 if None) where mask and lengths allow, else 0; and NaN for what makes no sense."""

    def full(values: jax.Array) -> jax.Array:
        return values[:, None] if values.ndim < len(shape) else values

    allowed = jnp.ones(shape, bool)
    if mask is not None:
        allowed &= full(mask)
    if lengths is not None:
        allowed &= jnp.arange(shape[1]) < lengths[:, None]
    weights = jnp.where(allowed, jnp.ones((), dtype) if sample_weight is None else full(sample_weight).astype(dtype), 0)
    if lengths is not None:
        weights = jnp.where(full((lengths >= 0) & (lengths <= shape[1])), weights, jnp.nan)
    if sample_weight is not None:
        weights = jnp.where(full((sample_weight >= 0) & (sample_weight < jnp.inf)), weights, jnp.nan)
    return weights


def against(weights: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Return weights of (N,) or (N, L) as (N, 1) or (N, 1, L), constants to differentiation."""
    return None if weights is None else lax.stop_gradient(weights).reshape(x.shape[0], 1, *x.shape[2:])


def _moments(x: jax.Array, weights: jax.Array | None) -> list[jax.Array]:
    compute = compute_dtype(x)
    n = rounded(divisor(count(x, weights)), np.float64)

    def around(center: jax.Array) -> tuple[Pair, jax.Array, jax.Array]:
        """Return the mean, m2, and what m2 was bigger by around the center, from sums of the differences to that."""
        deviation = unmasked(rows(x).astype(np.float64) - once(center), rows(weights))
        term = deviation if weights is None else deviation * rows(weights)
        total, squares = channel_sums(term, term * deviation)
        excess = total * (total / n)
        return two_sum(center, total / n), jnp.maximum(squares - excess, 0), excess

    mean, m2, excess = around(_first(x, weights).astype(np.float64))
    is_far = jnp.any(excess > (FAR if compute == np.float32 else 0) * m2)
    mean, m2, _ = lax.cond(is_far, lambda: around(mean.hi), lambda: (mean, m2, excess))
    return [*as_pair(mean, compute), *as_pair(m2, compute)]


_MOMENTS = Map("batch_norm_moments", _moments)


@jax.custom_jvp
@jax.jit
def moments(x: jax.Array, weights: jax.Array | None) -> tuple[Pair, Pair, Pair]:
    """Return the sum of the weights, and mean and m2 of each channel of x, (N, C) or (N, C, L).

    They come from the differences to the first value, so that they are exact for a constant channel; and from those to
    the mean where a first value is far from it.
    """
    mean, rest, m2, m2_rest = _MOMENTS(x, weights)
    return count(x, weights), Pair(mean, rest), Pair(m2, m2_rest)


@moments.defjvp
def _moments_jvp(
    primals: tuple[jax.Array, jax.Array | None], tangents: tuple[jax.Array, jax.Array | None]
) -> tuple[tuple[Pair, ...], ...]:
    """Differentiate the definitions, not the sums."""
    (x, weights), (dx, _) = primals, tangents
    total_weight, mean, m2 = moments(x, weights)
    deviation = _deviation(x, mean, weights)
    dx = unmasked(dx.astype(deviation.dtype), weights)
    if weights is not None:
        dx *= weights.astype(dx.dtype)
    dmean = channel_sum(dx) / divisor(total_weight).hi
    dm2 = 2 * channel_sum(deviation * dx)
    zeros = jax.tree.map(jnp.zeros_like, (total_weight, mean, m2))
    return (total_weight, mean, m2), (zeros[0], Pair(dmean, zeros[1].lo), Pair(dm2, zeros[2].lo))


@jax.jit
def merge(
    count: Pair, mean: Pair, m2: Pair, other_count: Pair, other_mean: Pair, other_m2: Pair
) -> tuple[Pair, Pair, Pair]:
    """Return count, mean and m2 of two batches together.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    equations 2.1.
    """
    dtype = jnp.promote_types(mean.hi.dtype, other_mean.hi.dtype)
    count, mean, m2 = (as_pair(pair, dtype) for pair in (count, mean, m2))
    other_count, other_mean, other_m2 = (as_pair(pair, dtype) for pair in (other_count, other_mean, other_m2))
    total = add(count, other_count)
    difference = add(other_mean, negative(mean))
    step = multiply(difference, divide(other_count, divisor(total)))
    cross = multiply(multiply(difference, step), count)
    return total, add(mean, step), add(add(m2, other_m2), cross)


@partial(jax.jit, static_argnames=("correction",))
def variance(m2: Pair, count: Pair, correction: int) -> Pair:
    """Return m2 / (count - correction), and 0 where count is no more than correction."""
    left = _left(as_pair(count, m2.hi.dtype), correction)
    return where(left.hi <= 0, 0, divide(m2, where(left.hi <= 0, 1, left)))


@jax.jit
def normalize(
    x: jax.Array,
    mean: Statistic,
    var: Statistic,
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: Pair,
    weights: jax.Array | None,
) -> jax.Array:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype."""
    compute = compute_dtype(x)
    return affine(x, as_pair(mean, compute), invstd(var, eps, compute), weight, bias, weights).astype(x.dtype)


def affine(
    x: jax.Array,
    mean: Pair,
    invstd: Pair,
    weight: jax.Array | None,
    bias: jax.Array | None,
    weights: jax.Array | None,
) -> jax.Array:
    """Return (x - mean) * invstd * weight + bias in the dtype computed in, and 0 where the weight of a value is.

    Computed as (x - K) * scale + shift with K the mean rounded to the precision computed in: x - K is exact where x is
    near the mean, and the rest of the mean goes into the shift.
    """
    compute = mean.hi.dtype
    scale = invstd if weight is None else multiply(invstd, as_pair(weight, compute))
    shift = -mean.lo * scale.hi
    if bias is not None:
        shift += bias.astype(compute)
    rounded, factor, shift = (spread(vector, x.shape) for vector in (mean.hi, scale.hi, shift))
    return unmasked((_filled(x, rounded, weights) - rounded) * factor + shift, weights)


@jax.jit
def lerp(start: jax.Array, end: Statistic, weight: Pair | jax.Array) -> jax.Array:
    """Return (1 - weight) * start + weight * end, computed in pairs and rounded once to the dtype of start."""
    # Constants before anything is computed: then even a gradient that is taken step by step leaves no tracer behind.
    start, end, weight = lax.stop_gradient((start, end, weight))
    one, old, new, step = (as_pair(value, start.dtype) for value in (1.0, start, end, weight))
    moved = add(multiply(add(one, negative(step)), old), multiply(step, new)).hi
    return jnp.where(step.hi == 0, start, moved)  # whatever the end is, NaN included


@jax.jit
def reciprocal(count: jax.Array) -> jax.Array:
    """Return 1 / count in the widest dtype there is."""
    return 1 / count.astype(widest_dtype())


@partial(jax.jit, static_argnames=("correction",))
def step(weight: Pair | jax.Array, count: Pair, correction: int) -> Pair:
    """Return the weight of a batch in the running statistics, and 0 where count is no more than correction."""
    return where(_left(count, correction).hi <= 0, 0, as_pair(weight, widest_dtype()))


@jax.jit
def grad_sums(
    dy: jax.Array, x: jax.Array, mean: Statistic, var: Statistic, eps: Pair, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of dy and dy * xhat for each channel."""
    compute = compute_dtype(x)
    xhat = affine(x, as_pair(mean, compute), invstd(var, eps, compute), None, None, weights)
    dy = unmasked(dy.astype(compute), weights)
    return channel_sum(dy), channel_sum(dy * xhat)


@jax.jit
def grad_input(
    dy: jax.Array,
    x: jax.Array,
    mean: Statistic,
    var: Statistic,
    weight: jax.Array | None,
    eps: Pair,
    sums: tuple[Statistic, Statistic] | None,
    count: Pair | None,
    weights: jax.Array | None,
) -> jax.Array:
    """Return the gradient of x in its dtype."""
    compute = compute_dtype(x)
    mean, scale = as_pair(mean, compute), invstd(var, eps, compute)
    change = unmasked(dy.astype(compute), weights)
    if sums is not None:
        means = [divide(as_pair(total, compute), divisor(as_pair(count, compute))) for total in sums]
        change = residual(change, affine(x, mean, scale, None, None, weights), *means, weights)
    if weight is not None:
        scale = multiply(scale, as_pair(weight, compute))
    return unmasked(change * spread(scale.hi, x.shape), weights).astype(x.dtype)


def residual(v: jax.Array, xhat: jax.Array, mean: Pair, slope: Pair, weights: jax.Array | None) -> jax.Array:
    """Return v - w * mean - w * xhat * slope: what a constant and xhat do not explain, if those are their shares of v.

    Like x - K in ``affine``, v - mean is exact where v is near the mean, and the rest of the mean is taken off with the
    small terms.
    """
    center = Pair(*(spread(part, v.shape) for part in mean))
    xhat *= spread(slope.hi, v.shape)
    if weights is not None:
        weights = weights.astype(v.dtype)
        center = multiply(center, as_pair(weights, v.dtype))
        xhat *= weights
    return (v - center.hi) - (center.lo + xhat)


def unmasked(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return values with 0 in place of those of weight 0, and NaN where the weight is."""
    return values if weights is None else jnp.where(weights > 0, values, weights.astype(values.dtype))


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """Return the dtype to compute in: float16 and bfloat16 are computed in float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def divisor(count: Pair) -> Pair:
    """Return count as a divisor of sums, which are 0 where it is."""
    return where(count.hi == 0, 1, count)


def invstd(var: Statistic, eps: Pair, dtype: jnp.dtype) -> Pair:
    """Return 1 / sqrt(var + eps), and 0 where that is 0, as a pair of ``dtype``."""
    return _invstd(add(as_pair(var, dtype), as_pair(eps, dtype)))


@jax.custom_jvp
def _invstd(spread: Pair) -> Pair:
    """Return the rounded result and a Newton step from it."""
    is_zero = spread.hi == 0
    rounded = as_pair(1 / jnp.sqrt(jnp.where(is_zero, 1, spread.hi)), spread.hi.dtype)
    excess = add(multiply(multiply(spread, rounded), rounded), as_pair(-1.0, spread.hi.dtype))
    step = -rounded.hi * excess.hi / 2
    return where(is_zero, 0, two_sum(rounded.hi, step))


@_invstd.defjvp
def _invstd_jvp(primals: tuple[Pair], tangents: tuple[Pair]) -> tuple[Pair, Pair]:
    result = _invstd(*primals)
    (change,) = tangents
    slope = -(change.hi + change.lo) / 2 * result.hi**3
    return result, Pair(slope, jnp.zeros_like(slope))


def count(x: jax.Array, weights: jax.Array | None) -> Pair:
    """Return the sum of the weights of a channel."""
    compute = compute_dtype(x)
    if weights is None:
        return as_pair(float(x.size // x.shape[1]), compute)
    return as_pair(Pair(*_TOTAL(weights)), compute)


def _total(weights: jax.Array) -> list[jax.Array]:
    (total,) = channel_sums(rows(weights).astype(np.float64))
    return [*as_pair(total[0], weights.dtype)]


_TOTAL = Map("total_weight", _total)


def _left(count: Pair, correction: int) -> Pair:
    return add(count, as_pair(float(-correction), count.hi.dtype))


def _first(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return the first value of each channel that has a weight, or 0 where none has."""
    channels = x.reshape(*x.shape[:2], -1)
    if weights is None:
        return channels[0, :, 0]
    places = jnp.arange(weights.size).reshape(weights.shape)
    place = jnp.min(jnp.where(weights == 0, weights.size, places))
    row, column = jnp.divmod(jnp.minimum(place, weights.size - 1), channels.shape[2])
    return jnp.where(place < weights.size, channels[row, :, column], 0)


def _filled(x: jax.Array, filler: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return x in the dtype of a filler that takes the place of values of weight 0."""
    x = x.astype(filler.dtype)
    return x if weights is None else jnp.where(weights == 0, lax.stop_gradient(filler), x)


def _deviation(x: jax.Array, mean: Pair, weights: jax.Array | None) -> jax.Array:
    """Return x - mean, rounded once, and 0 where the weight of x is."""
    rounded, rest = (spread(part, x.shape) for part in mean)
    return unmasked((_filled(x, rounded, weights) - rounded) - rest, weights)
