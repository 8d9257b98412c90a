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

from mbn_jax import runs
from mbn_jax.channels import RUN, column, is_known, once
from mbn_jax.forms import GPU, HOST, Form, is_spread
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
    power_of_two,
    subnormal,
    two_sum,
    where,
    wide,
    wider,
    widest_dtype,
)

FAR = 1 << 20
"""How many times its variance a channel's mean square may be, around what deviations are taken from.

So much precision is lost, and float64 has it to spare for values that are narrower.
"""

MODERATE = 2.0**64
"""What the largest weight is made no larger than, and no smaller than its inverse: a correction is next to nothing, or
all, beside a sum of such weights.
"""

LARGE = 1 << 24
"""Values from which on the memory for sums of short runs comes fresh from the system each time: longer ones need less.

It does not pay where two arrays are read.
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
        allowed &= jnp.arange(shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
    counted = jnp.ones((), dtype) if sample_weight is None else full(_in_range(sample_weight.astype(dtype)))
    weights = jnp.where(allowed, counted, 0)
    if lengths is not None:
        weights = jnp.where(full((lengths >= 0) & (lengths <= shape[1])), weights, jnp.nan)
    if sample_weight is not None:
        weights = jnp.where(full((sample_weight >= 0) & (sample_weight < jnp.inf)), weights, jnp.nan)
    return weights


def _in_range(weights: jax.Array) -> jax.Array:
    """Return weights times a power of two, 1 for ordinary ones, so that sums of them are in range and all are normal.

    What comes of weights goes by their ratios, and by their sum only where it is near a correction. XLA may take
    subnormal numbers for 0, so they are read as integers; what is left of them beside the largest weight is a weight.
    """
    tiny = float(jnp.finfo(weights.dtype).tiny)
    is_subnormal, part = subnormal(weights)
    unit = power_of_two(jnp.max(jnp.where(jnp.isfinite(weights), weights, 0), initial=0), weights.dtype)
    factor = jnp.clip(unit, 1 / MODERATE, MODERATE) / unit
    moved = jnp.where(is_subnormal, part * (tiny * factor), weights * factor)
    return jnp.where((is_subnormal | (weights > 0)) & (moved < tiny), tiny, moved)


def against(weights: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Return weights of (N,) or (N, L) as (N, 1) or (N, 1, L), constants to differentiation."""
    return None if weights is None else lax.stop_gradient(weights).reshape(x.shape[0], 1, *x.shape[2:])


def _moments(x: jax.Array, weights: jax.Array | None) -> list[jax.Array]:
    compute = compute_dtype(x)
    n = _divisor(x, weights, HOST)
    form = HOST if is_known(x.size) and x.size <= LARGE else HOST._replace(sums=partial(HOST.sums, run=2 * RUN))
    mean, m2, squares = _around(wide(_first(x, weights, form)), x, weights, n, form)
    # The first of n values is far from the mean by no more than the square root of n - 1 standard deviations.
    n_known = x.size // x.shape[1]
    if compute == np.float64 or weights is not None or not is_known(n_known) or n_known > FAR:
        is_far = jnp.any(squares > (1 if compute == np.float64 else FAR) * m2)
        again = partial(_around, x=x, weights=weights, n=n, form=form)
        mean, m2, _ = lax.cond(is_far, lambda: again(once(mean.hi)), lambda: (mean, m2, squares))
    return [*as_pair(mean, compute), *as_pair(m2, compute)]


def _moments_on_gpu(x: jax.Array, weights: jax.Array | None) -> list[jax.Array]:
    """Do the same without a question, which the host would have to answer: take twice what one time may not do for."""
    compute = compute_dtype(x)
    n = _divisor(x, weights, GPU)
    may_be_far = weights is not None or not is_known(x.size)
    center = wide(_first(x, weights, GPU)) if may_be_far else _first_few(x)
    mean, m2, _ = _around(center, x, weights, n, GPU)
    if compute == np.float64 or may_be_far:
        mean, m2, _ = _around(once(mean.hi), x, weights, n, GPU)
    return [*as_pair(mean, compute), *as_pair(m2, compute)]


def _first_few(x: jax.Array) -> jax.Array:
    """Return the mean of the first values of each channel, in float64: of one for each ``FAR`` that there are, begun.

    The mean of m of n values is far from that of all by no more than the square root of n / m standard deviations.
    """
    first = wide(_first(x, None, GPU))
    few = -(-x.size // (x.shape[1] * FAR))
    if few == 1:
        return first
    rows = min(few, x.shape[0])
    values = wide(x[:rows] if x.ndim == 2 else x[:rows, :, : -(-few // rows)])  # noqa: PLR2004 - (N, C)
    (total,) = runs.channel_sums(values - column(first, x.ndim))  # 0 for a constant channel
    return first + total / (values.size // x.shape[1])


def _around(
    center: jax.Array, x: jax.Array, weights: jax.Array | None, n: int | jax.Array, form: Form
) -> tuple[Pair, jax.Array, jax.Array]:
    """Return the mean, m2 and the sum of squares that m2 is left of, from the deviations from a center."""
    weights = form.view(weights)
    deviation = unmasked(wide(form.view(x)) - form.place(center, x.ndim), weights)
    term = deviation if weights is None else deviation * weights
    total, squares = form.sums(term, term * deviation)
    step = total / n
    return two_sum(center, step), jnp.maximum(squares - total * step, 0), squares


def _divisor(x: jax.Array, weights: jax.Array | None, form: Form) -> int | jax.Array:
    """Return the sum of the weights of a channel as a divisor of sums, which are 0 where it is."""
    if weights is None:
        return x.size // x.shape[1]
    (n,) = form.sums(wide(form.view(weights)))
    return jnp.where(n == 0, 1, n)


_MOMENTS = Map("batch_norm_moments", _moments, _moments_on_gpu)


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
    dtype = wider(mean.hi.dtype, other_mean.hi.dtype)
    count, mean, m2 = (as_pair(pair, dtype) for pair in (count, mean, m2))
    other_count, other_mean, other_m2 = (as_pair(pair, dtype) for pair in (other_count, other_mean, other_m2))
    total = add(count, other_count)
    difference = add(other_mean, negative(mean))
    step = multiply(difference, divide(other_count, divisor(total)))
    cross = multiply(multiply(difference, step), count)
    return total, add(mean, step), add(add(m2, other_m2), cross)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
@partial(jax.jit, static_argnames=("correction",))
def variance(m2: Pair, count: Pair, correction: int) -> Pair:
    """Return m2 / (count - correction), and 0 where count is no more than correction."""
    return Pair(*_VARIANCE(m2, count, correction=correction))


@variance.defjvp
def _variance_jvp(correction: int, primals: tuple[Pair, Pair], tangents: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
    """Differentiate by m2: a count is a constant."""
    (m2, count), (change, _) = primals, tangents
    left = lax.stop_gradient(_left(as_pair(count, m2.hi.dtype), correction).hi)
    slope = jnp.where(left <= 0, 0, change.hi / jnp.where(left <= 0, 1, left))
    return variance(m2, count, correction), Pair(slope, jnp.zeros_like(slope))


def _variance(m2: Pair, count: Pair, correction: int) -> list[jax.Array]:
    left = wide(count) - correction
    return [*as_pair(jnp.where(left <= 0, 0, wide(m2) / jnp.where(left <= 0, 1, left)), m2.hi.dtype)]


_VARIANCE = Map("variance", _variance)


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
    factor = once(scale.hi)
    shift = -mean.lo * factor
    if bias is not None:
        shift += bias.astype(compute)
    rounded, factor, shift = (spread(vector, x.shape) for vector in (once(mean.hi), factor, once(shift)))
    return unmasked((_filled(x, rounded, weights) - rounded) * factor + shift, weights)


@jax.jit
def lerp(start: jax.Array, end: Statistic, weight: Pair | jax.Array) -> jax.Array:
    """Return (1 - weight) * start + weight * end, rounded to the dtype of start."""
    # Constants before anything is computed: then even a gradient that is taken step by step leaves no tracer behind.
    return _LERP(*lax.stop_gradient((start, end, weight)))[0]


def _lerp(start: jax.Array, end: Statistic, weight: Pair | jax.Array) -> list[jax.Array]:
    old, new, step = (wide(value) for value in (start, end, weight))
    moved = (1 - step) * old + step * new
    return [jnp.where(step == 0, old, moved).astype(start.dtype)]  # whatever the end is, NaN included


_LERP = Map("lerp", _lerp)


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
    return unmasked(change * spread(once(scale.hi), x.shape), weights).astype(x.dtype)


def residual(v: jax.Array, xhat: jax.Array, mean: Pair, slope: Pair, weights: jax.Array | None) -> jax.Array:
    """Return v - w * mean - w * xhat * slope: what a constant and xhat do not explain, if those are their shares of v.

    Like x - K in ``affine``, v - mean is exact where v is near the mean, and the rest of the mean is taken off with the
    small terms.
    """
    center = Pair(*(spread(once(part), v.shape) for part in mean))
    xhat *= spread(once(slope.hi), v.shape)
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
    return wider(x.dtype, jnp.float32)


def divisor(count: Pair) -> Pair:
    """Return count as a divisor of sums, which are 0 where it is."""
    return where(count.hi == 0, 1, count)


def invstd(var: Statistic, eps: Pair, dtype: jnp.dtype) -> Pair:
    """Return 1 / sqrt(var + eps), and 0 where that is 0, as a pair of ``dtype``."""
    return _invstd(add(as_pair(var, dtype), as_pair(eps, dtype)))


@jax.custom_jvp
def _invstd(spread: Pair) -> Pair:
    return Pair(*_INVSTD(spread))


def _inverse_root(spread: Pair) -> list[jax.Array]:
    square = wide(spread)
    root = 1 / jnp.sqrt(jnp.where(square == 0, 1, square))
    return [*as_pair(jnp.where(square == 0, 0, root), spread.hi.dtype)]


_INVSTD = Map("invstd", _inverse_root)


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
        n = x.size // x.shape[1]
        return as_pair(float(n), compute) if is_known(n) else Pair(*_SIZE(lax.stop_gradient(x)))
    return as_pair(Pair(*_TOTAL_WEIGHT(weights)), compute)


def _size(x: jax.Array) -> list[jax.Array]:
    return [*as_pair(jnp.asarray(x.size // x.shape[1]).astype(np.float64), compute_dtype(x))]


_SIZE = Map("size", _size)


def _total_weight(form: Form, weights: jax.Array) -> list[jax.Array]:
    (total,) = form.sums(wide(form.view(weights)))
    return [*as_pair(total[0], weights.dtype)]


_TOTAL_WEIGHT = Map("total_weight", partial(_total_weight, HOST), partial(_total_weight, GPU))


def _left(count: Pair, correction: int) -> Pair:
    return add(count, as_pair(float(-correction), count.hi.dtype))


def _first(x: jax.Array, weights: jax.Array | None, form: Form) -> jax.Array:
    """Return the first value of each channel that has a weight, or 0 where none has."""
    if weights is None:
        return x[(0, slice(None), *(0,) * (x.ndim - 2))]
    places = jnp.arange(weights.size).reshape(weights.shape)
    place = jnp.min(jnp.where(weights == 0, weights.size, places))
    if is_spread() or not is_known(x.size):  # each device looks among its own
        return jnp.sum(jnp.where(places == place, x, 0), axis=(0, *range(2, x.ndim)))
    x = form.view(x)
    index = jnp.unravel_index(jnp.minimum(place, weights.size - 1), form.view(weights).shape)
    first = lax.dynamic_slice(x, index, (1, x.shape[1], *(1,) * (x.ndim - 2))).reshape(-1)
    return jnp.where(place < weights.size, first, 0)


def _filled(x: jax.Array, filler: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return x in the dtype of a filler that takes the place of values of weight 0."""
    x = x.astype(filler.dtype)
    return x if weights is None else jnp.where(weights == 0, lax.stop_gradient(filler), x)


def _deviation(x: jax.Array, mean: Pair, weights: jax.Array | None) -> jax.Array:
    """Return x - mean, rounded once, and 0 where the weight of x is."""
    rounded, rest = (spread(part, x.shape) for part in mean)
    return unmasked((_filled(x, rounded, weights) - rounded) - rest, weights)
