"""Formulas on the statistics of channels, (C,) vectors in pairs with units, and on sample weights.

Every function can be traced. Its derivatives, in both modes and of any order, are those of the real numbers that the
pairs represent.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbn_jax.kernels.linear_primitives import Shape
from mbn_jax.kernels.pairs import (
    NOTHING,
    Mean,
    Pair,
    Scaled,
    Square,
    Variance,
    add,
    as_pair,
    as_scaled,
    as_square,
    divide,
    in_own_units,
    multiply,
    negative,
    power_of_two,
    subnormal,
    times,
    where,
    wide,
    wider,
    widest_dtype,
)
from mbn_jax.kernels.primitives import WidePrimitive

MODERATE = 2.0**64
"""The largest weight is scaled to lie between the inverse of this number and this number.

Beyond these bounds a correction of 1 is negligible beside the sum of the weights, or far exceeds it, so that scaling
changes no result.
"""


@partial(jax.jit, static_argnames=("shape", "dtype", "axis"))
def combine_weights(
    shape: Shape,
    dtype: str,
    mask: jax.Array | None,
    lengths: jax.Array | None,
    sample_weight: jax.Array | None,
    axis: Any = None,
) -> jax.Array:
    """Return the sample weight (1 if None) of each unmasked cell, 0 for masked ones, and NaN for invalid arguments.

    ``axis`` is the name of the axis, or of several, along which replicas compare their weights.
    """

    def full(values: jax.Array) -> jax.Array:
        return values[:, None] if values.ndim < len(shape) else values

    allowed = jnp.ones(shape, bool)
    if mask is not None:
        allowed &= full(mask)
    if lengths is not None:
        allowed &= jnp.arange(shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
    counted = jnp.ones((), dtype) if sample_weight is None else full(_in_range(sample_weight.astype(dtype), axis))
    weights = jnp.where(allowed, counted, 0)
    if lengths is not None:
        weights = jnp.where(full((lengths >= 0) & (lengths <= shape[1])), weights, jnp.nan)
    if sample_weight is not None:
        weights = jnp.where(full((sample_weight >= 0) & (sample_weight < jnp.inf)), weights, jnp.nan)
    return weights


def _in_range(weights: jax.Array, axis: Any) -> jax.Array:
    """Return weights times a power of two, 1 for ordinary weights, so that their sums are in range and all are normal.

    Results depend on the ratios of weights, and on their sum only where that is near a correction. XLA may flush
    subnormal numbers to 0, so they are read as integers. A weight that would become subnormal becomes the least normal
    number, so that no positive weight turns into 0.
    """
    tiny = float(jnp.finfo(weights.dtype).tiny)
    is_subnormal, part = subnormal(weights)
    largest = jnp.max(jnp.where(jnp.isfinite(weights), weights, 0), initial=0)
    unit = power_of_two(largest if axis is None else lax.pmax(largest, axis), weights.dtype)
    factor = jnp.clip(unit, 1 / MODERATE, MODERATE) / unit
    moved = jnp.where(is_subnormal, part * (tiny * factor), weights * factor)
    return jnp.where((is_subnormal | (weights > 0)) & (moved < tiny), tiny, moved)


def square_in_own_units(square: Pair, unit: jax.Array, dtype: np.dtype) -> list[jax.Array]:
    """Return a square, given in a unit, as the parts of a ``Square`` of ``dtype`` whose unit is about its own size."""
    own = power_of_two(jnp.maximum(jnp.sqrt(square.hi), NOTHING) * unit, dtype)
    ratio = unit / own
    return [*as_pair(times(times(square, ratio), ratio), dtype), own.astype(dtype)]


@jax.jit
def merge(
    count: Pair, mean: Scaled, m2: Square, other_count: Pair, other_mean: Scaled, other_m2: Square
) -> tuple[Pair, Scaled, Square]:
    """Return count, mean and m2 of two batches together, as constants to differentiation.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    equations 2.1.
    """
    batches = (count, mean, m2), (other_count, other_mean, other_m2)
    total, rest, *vectors = _MERGE(*lax.stop_gradient(batches))
    return Pair(total, rest), Scaled(Pair(*vectors[:2]), vectors[2]), Square(Pair(*vectors[3:5]), vectors[5])


def _merge(*batches: tuple[Pair, Scaled, Square]) -> list[jax.Array]:
    dtype = wider(*(mean.unit.dtype for _, mean, _ in batches))
    compute = np.dtype(np.float64)
    counts = [as_pair(count, compute) for count, _, _ in batches]
    total = add(*counts)
    shares = [divide(count, where(total.hi == 0, 1, total)) for count in counts]
    means = [as_scaled(mean, compute) for _, mean, _ in batches]
    unit = jnp.maximum(*(mean.unit for mean in means))
    mean, other_mean = (times(mean.pair, mean.unit / unit) for mean in means)
    apart = add(other_mean, negative(mean))
    merged = in_own_units(Scaled(add(mean, multiply(apart, shares[1])), unit), dtype)
    squares = [as_square(m2, compute) for _, _, m2 in batches]
    size = power_of_two(jnp.maximum(jnp.abs(apart.hi), NOTHING) * unit, compute)
    size = jnp.maximum(jnp.maximum(*(square.unit for square in squares)), size)
    within = [
        multiply(share, times(times(square.pair, square.unit / size), square.unit / size))
        for share, square in zip(shares, squares, strict=True)
    ]
    apart = times(apart, unit / size)
    m2 = add(add(*within), multiply(multiply(apart, apart), multiply(*shares)))
    return [*as_pair(total, dtype), *merged.pair, merged.unit, *square_in_own_units(m2, size, dtype)]


_MERGE = WidePrimitive("merge", _merge)


@partial(jax.jit, static_argnames=("correction",))
def variance(m2: Square, count: Pair, correction: int) -> Square:
    """Return m2 / (count - correction), and 0 if count is at most the correction; the argument is m2 / count."""
    if correction == 0:
        return m2
    n = lax.stop_gradient(as_pair(count, m2.unit.dtype))
    left = _left(n, correction)
    scale = divide(n, where(left.hi <= 0, 1, left))
    return Square(where(left.hi <= 0, 0, multiply(m2.pair, scale)), m2.unit)


@jax.jit
def lerp(start: jax.Array, end: Mean | Variance, weight: Pair | jax.Array) -> jax.Array:
    """Return (1 - weight) * start + weight * end, rounded to the dtype of start."""
    # Stop gradients of the arguments, not of the result: then no tracer of a gradient outside of jit reaches the state.
    return _LERP(*lax.stop_gradient((start, end, weight)))[0]


def _lerp(start: jax.Array, end: Mean | Variance, weight: Pair | jax.Array) -> list[jax.Array]:
    old, step = wide(start), wide(weight)
    new = step * wide(end.pair if isinstance(end, Scaled | Square) else end)
    if isinstance(end, Scaled | Square):
        new *= wide(end.unit)
    if isinstance(end, Square):
        new *= wide(end.unit)
    moved = (1 - step) * old + new
    return [jnp.where(step == 0, old, moved).astype(start.dtype)]  # a step of 0 keeps old, even if the end is NaN


_LERP = WidePrimitive("lerp", _lerp)


@jax.jit
def reciprocal(count: jax.Array) -> jax.Array:
    """Return 1 / count in the widest enabled floating dtype."""
    return 1 / count.astype(widest_dtype())


@partial(jax.jit, static_argnames=("correction",))
def step(weight: Pair | jax.Array, count: Pair, correction: int) -> Pair:
    """Return the weight of a batch in the running statistics, and 0 if the count is at most the correction."""
    return where(_left(count, correction).hi <= 0, 0, as_pair(weight, widest_dtype()))


def divisor(count: Pair) -> Pair:
    """Return the count as a divisor of sums: 1 in place of 0, where the sums are 0 too."""
    return where(count.hi == 0, 1, count)


def plain(value: Scaled) -> jax.Array:
    """Return a scaled pair rounded to one number of its dtype."""
    return value.pair.hi * value.unit


def invstd(var: Variance, eps: Square, dtype: jnp.dtype) -> Scaled:
    """Return 1 / sqrt(var + eps) in numbers of ``dtype``, and 0 where var + eps is 0."""
    return _invstd(as_square(var, dtype), as_square(eps, dtype))


@jax.custom_jvp
def _invstd(var: Square, eps: Square) -> Scaled:
    root, rest, unit = _INVSTD(var, eps)
    return Scaled(Pair(root, rest), unit)


def _inverse_root(var: Square, eps: Square) -> list[jax.Array]:
    terms = [(wide(term.pair), wide(term.unit)) for term in (var, eps)]
    unit = jnp.maximum(*(jnp.where(value == 0, 0, unit) for value, unit in terms))
    unit = jnp.where(unit == 0, 1, unit)
    square = sum(value * (own / unit) * (own / unit) for value, own in terms)
    root = 1 / jnp.sqrt(jnp.where(square == 0, 1, square))
    # A variance without units (a plain vector) may give a root far from 1, which gets a unit of its own here.
    own = jnp.where((root > 2.0**-8) & (root < 2.0**8), 1, power_of_two(root, np.dtype(np.float64)))
    own = jnp.minimum(own, unit * 2.0 ** (jnp.finfo(var.unit.dtype).maxexp - 1))  # keeps the unit below finite
    return [*as_pair(jnp.where(square == 0, 0, root) / own, var.unit.dtype), (own / unit).astype(var.unit.dtype)]


_INVSTD = WidePrimitive("invstd", _inverse_root)


@_invstd.defjvp
def _invstd_jvp(primals: tuple[Square, Square], tangents: tuple[Square, Square]) -> tuple[Scaled, Scaled]:
    result = _invstd(*primals)
    change = sum(
        (tangent.pair.hi + tangent.pair.lo) * (primal.unit * result.unit) * (primal.unit * result.unit)
        for primal, tangent in zip(primals, tangents, strict=True)
    )
    slope = -change / 2 * result.pair.hi**3
    return result, Scaled(Pair(slope, jnp.zeros_like(slope)), jnp.zeros_like(slope))


@jax.custom_jvp
def factors(invstd: Scaled, weight: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return invstd * weight as a product of two factors; for ordinary numbers the first is 1.

    Otherwise the first factor is a power of two such that neither a standard deviation times that factor, nor the
    second factor, is near the ends of the range.
    """
    first, second = _FACTORS(invstd, weight)
    return first, second


def _factors(invstd: Scaled, weight: jax.Array | None) -> list[jax.Array]:
    dtype = invstd.unit.dtype
    root, unit = wide(invstd.pair), wide(invstd.unit)
    factor = jnp.ones_like(root) if weight is None else wide(weight)
    exponent = jnp.log2(root) + jnp.log2(unit)
    whole = exponent + jnp.where(factor == 0, 0, jnp.log2(jnp.abs(factor)))
    # Some first factor satisfies both bounds, since no exponent of a weight is larger than their sum.
    near, far = (share * float(jnp.finfo(dtype).maxexp) for share in (0.45, 0.8))
    # The first factor is at most the product (or 1), so that it makes no value overflow that the product would not.
    least = jnp.minimum(jnp.maximum(exponent - near, whole - far), jnp.maximum(whole, 0))
    own = jnp.clip(0, least, jnp.minimum(exponent + near, whole + far))
    own = jnp.where(factor == 0, jnp.minimum(own, 0), own)  # infinity times 0 would be NaN
    first = jnp.where(jnp.isfinite(own), power_of_two(jnp.exp2(own), dtype), 1)
    return [first.astype(dtype), (root * (unit / first) * factor).astype(dtype)]


_FACTORS = WidePrimitive("factors", _factors)


@factors.defjvp
def _factors_jvp(
    primals: tuple[Scaled, jax.Array | None], tangents: tuple[Scaled, Any]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    (invstd, weight), (change, dweight) = primals, tangents
    first, second = factors(invstd, weight)
    unit = invstd.unit / lax.stop_gradient(first)
    slope = change.pair.hi * unit
    if weight is not None:
        slope = slope * weight.astype(slope.dtype) + invstd.pair.hi * unit * dweight.astype(slope.dtype)
    return (first, second), (jnp.zeros_like(first), slope)


def _left(count: Pair, correction: int) -> Pair:
    """Return count - correction."""
    return add(count, as_pair(float(-correction), count.hi.dtype))
