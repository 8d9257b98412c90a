"""JAX's arithmetic.

It must be as exact where JAX has no 64-bit numbers, which is its default, as where it has. So statistics are pairs,
unevaluated sums of two numbers of the dtype computed in, made by transforms that return their rounding error too. XLA
contracts products and sums into FMAs as it likes, which changes nothing here: every product whose last bit counts is
exact. Sums are made in a fixed order, so the bits do not depend on the run or the number of threads.

Everything can be traced, and differentiates as the real numbers that it stands for: a rounding error is a constant.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 1 << 16
"""Values taken at a time: few enough that the running sums stay in cache, enough for all cores to have a share."""


class Pair(NamedTuple):
    """The unevaluated sum of two arrays, hi being the sum rounded: twice the precision of one."""

    hi: jax.Array
    lo: jax.Array

    def __truediv__(self, divisor: float) -> "Pair":
        """Return a sum divided by the number of its terms."""
        return divide(self, as_pair(divisor, self.hi.dtype))


Statistic: TypeAlias = Pair | jax.Array
Tree = TypeVar("Tree", jax.Array, Pair)


@jax.custom_jvp
@jax.jit
def moments(x: jax.Array) -> tuple[Pair, Pair]:
    """Return mean and m2 of each channel of x, (N, C) or (N, C, L).

    The mean comes from the differences to the first value, so that it is exact for a constant channel; m2 from the
    differences to the mean.
    """
    compute = _compute_dtype(x)
    first = as_pair(x[0].reshape(x.shape[1], -1)[:, 0], compute)
    mean = add(first, _channel_sums(x, partial(_difference, first)) / float(x.size // x.shape[1]))
    return mean, _channel_sums(x, lambda values: _square(_difference(mean, values)))


@moments.defjvp
def _moments_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[tuple[Pair, Pair], ...]:
    """Differentiate the definitions, not the sums: backwards, that broadcasts and has nothing to add up."""
    (x,), (dx,) = primals, tangents
    mean, m2 = moments(x)
    deviation = _difference(mean, x).hi
    axes = (0, *range(2, x.ndim))
    dmean = jnp.mean(dx, axes, mean.hi.dtype)
    dm2 = 2 * jnp.sum(deviation * dx, axes, m2.hi.dtype)
    return (mean, m2), (Pair(dmean, jnp.zeros_like(dmean)), Pair(dm2, jnp.zeros_like(dm2)))


@jax.jit
def normalize(
    x: jax.Array,
    mean: Statistic,
    var: Statistic,
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: Pair,
) -> jax.Array:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype.

    Computed as (x - K) * scale + shift with K the mean rounded to the precision computed in: x - K is exact where x is
    near the mean, and the rest of the mean goes into the shift.
    """
    compute = _compute_dtype(x)
    scale = _invstd(add(as_pair(var, compute), as_pair(eps, compute)))
    if weight is not None:
        scale = multiply(scale, as_pair(weight, compute))
    rounded, rest = as_pair(mean, compute)
    shift = -rest * scale.hi
    if bias is not None:
        shift += bias.astype(compute)
    rounded, factor, shift = (_column(vector, x.ndim) for vector in (rounded, scale.hi, shift))
    return ((x.astype(compute) - rounded) * factor + shift).astype(x.dtype)


@jax.jit
def lerp(start: jax.Array, end: Statistic, weight: Pair | jax.Array) -> jax.Array:
    """Return (1 - weight) * start + weight * end, computed in pairs and rounded once to the dtype of start."""
    one, old, new, step = (as_pair(value, start.dtype) for value in (1.0, start, end, weight))
    kept = add(one, Pair(-step.hi, -step.lo))
    return add(multiply(kept, old), multiply(step, new)).hi


def widest_dtype() -> np.dtype:
    """Return the widest floating dtype there is: float64 where 64-bit numbers are enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64)


@jax.jit
def reciprocal(count: jax.Array) -> jax.Array:
    """Return 1 / count in the widest dtype there is."""
    return 1 / count.astype(widest_dtype())


def number(value: float) -> Pair:
    """Return a Python number as a pair on the host, to be an argument of compiled code: a new one compiles nothing new.

    As a plain number it would be rounded to float32 on its way.
    """
    hi = np.asarray(value, widest_dtype())
    return Pair(hi, np.asarray(value - float(hi), hi.dtype))


def as_pair(value: Pair | jax.Array | float, dtype: np.dtype) -> Pair:
    """Return a value as a pair of ``dtype``, keeping of a wider one what two numbers can hold."""
    if isinstance(value, Pair):
        hi, rest = as_pair(value.hi, dtype)
        return two_sum(hi, rest + value.lo.astype(dtype))
    if isinstance(value, float):
        # Behind a barrier it is no constant to XLA, which takes (x + 1) - 1 for x.
        return as_pair(Pair(*lax.optimization_barrier(number(value))), dtype)
    value = value.astype(jnp.promote_types(value.dtype, dtype))
    if value.dtype == dtype:
        return Pair(value, jnp.zeros_like(value))
    # XLA takes a conversion there and back for nothing, so the rounding has to be asked for.
    hi = lax.reduce_precision(value, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return Pair(hi.astype(dtype), (value - hi).astype(dtype))


def two_sum(a: jax.Array, b: jax.Array) -> Pair:
    """Return a + b and its rounding error, exactly (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    b_part = total - a
    return Pair(total, lax.stop_gradient((a - (total - b_part)) + (b - b_part)))


def two_prod(a: jax.Array, b: jax.Array) -> Pair:
    """Return a * b, rounded or next to it, and the exact rest (Dekker, A floating-point technique, 1971: mul12)."""
    (a_hi, a_lo), (b_hi, b_lo) = _halves(a), _halves(b)
    product, middle = a_hi * b_hi, a_hi * b_lo + a_lo * b_hi
    total = product + middle
    return Pair(total, lax.stop_gradient(((product - total) + middle) + a_lo * b_lo))


def add(a: Pair, b: Pair) -> Pair:
    """Return a + b (Joldes, Muller and Popescu, Tight and rigorous error bounds, 2017, algorithm 5)."""
    hi, lo = two_sum(a.hi, b.hi)
    return two_sum(hi, lo + (a.lo + b.lo))


def multiply(a: Pair, b: Pair) -> Pair:
    """Return a * b (the same, algorithm 11)."""
    hi, lo = two_prod(a.hi, b.hi)
    return two_sum(hi, lo + (a.hi * b.lo + a.lo * b.hi))


def divide(a: Pair, b: Pair) -> Pair:
    """Return a / b (the same, algorithm 17)."""
    quotient = a.hi / b.hi
    rest = add(a, multiply(Pair(-quotient, jnp.zeros_like(quotient)), b))
    return two_sum(quotient, rest.hi / b.hi)


def _halves(a: jax.Array) -> Pair:
    """Return a as a sum of two numbers of half as many digits, so that products of them are exact."""
    hi = lax.reduce_precision(a, jnp.finfo(a.dtype).nexp, jnp.finfo(a.dtype).nmant // 2)
    return Pair(hi, a - hi)


def _square(a: Pair) -> Pair:
    return multiply(a, a)


def _invstd(spread: Pair) -> Pair:
    """Return 1 / sqrt(spread), and 0 where spread is 0: the rounded result and a Newton step from it."""
    is_zero = spread.hi == 0
    rounded = as_pair(1 / jnp.sqrt(jnp.where(is_zero, 1, spread.hi)), spread.hi.dtype)
    excess = add(multiply(multiply(spread, rounded), rounded), as_pair(-1.0, spread.hi.dtype))
    step = -rounded.hi * excess.hi / 2
    return Pair(*(jnp.where(is_zero, 0, part) for part in two_sum(rounded.hi, step)))


def _difference(center: Pair, values: jax.Array) -> Pair:
    """Return values - center, with one center for each channel."""
    hi, lo = (_column(-part, values.ndim) for part in center)
    return add(as_pair(values, hi.dtype), Pair(hi, lo))


def _channel_sums(x: jax.Array, term: Callable[[jax.Array], Pair]) -> Pair:
    """Return the sum of ``term(x)`` for each channel of x, (N, C) or (N, C, L)."""
    total = _sum(x, term, axis=0)
    return total if x.ndim == 2 else _sum(total, lambda values: values, axis=1)  # noqa: PLR2004 - (N, C) or (N, C, L)


def _sum(values: Tree, term: Callable[[Tree], Pair], axis: int) -> Pair:
    """Return the sum of ``term(values)`` over an axis: of block upon block, and then within the block."""
    first = jax.tree.leaves(values)[0]
    n = first.shape[axis]
    length = min(n, max(1, BLOCK * n // first.size))

    def add_block(i: jax.Array, total: Pair) -> Pair:
        start = jnp.minimum(i * length, n - length)
        is_new = jnp.arange(length) >= i * length - start  # the last block may reach back into the one before it
        is_new = is_new.reshape([length if other == axis else 1 for other in range(first.ndim)])
        terms = term(_part(values, start, length, axis))
        return add(total, jax.tree.map(lambda leaf: jnp.where(is_new, leaf, 0), terms))

    total = lax.fori_loop(1, -(-n // length), add_block, term(_part(values, 0, length, axis)))
    zero = np.zeros((), total.hi.dtype)
    return Pair(*lax.reduce(tuple(total), (zero, zero), lambda a, b: tuple(add(Pair(*a), Pair(*b))), (axis,)))


def _part(values: Tree, start: jax.Array | int, length: int, axis: int) -> Tree:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, length, axis), values)


def _compute_dtype(x: jax.Array) -> np.dtype:
    """Return the dtype to compute in: float16 and bfloat16 are computed in float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _column(vector: jax.Array, ndim: int) -> jax.Array:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)
