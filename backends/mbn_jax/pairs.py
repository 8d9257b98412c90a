"""Arithmetic in pairs, and sums of them over the values of each channel.

It must be as exact where JAX has no 64-bit numbers, which is its default, as where it has. So what counts is carried in
pairs, unevaluated sums of two numbers of the dtype computed in, made by transforms that return their rounding error
too. XLA contracts products and sums into FMAs as it likes, which changes nothing here: every product whose last bit
counts is exact. Sums are made in a fixed order, so the bits do not depend on the run or the number of threads.

Everything can be traced; all but the sums differentiates as the real numbers that it stands for: a rounding error is a
constant.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

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


Statistic: TypeAlias = Pair | jax.Array
Pairs: TypeAlias = Any
"""A tree of pairs."""


def widest_dtype() -> np.dtype:
    """Return the widest floating dtype there is: float64 where 64-bit numbers are enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def number(value: float) -> Pair:
    """Return a Python number as a pair on the host, to be an argument of compiled code: a new one compiles nothing new.

    As a plain number it would be rounded to float32 on its way.
    """
    hi = np.asarray(value, widest_dtype())
    return Pair(hi, np.asarray(value - float(hi), hi.dtype))


def as_pair(value: Statistic | float, dtype: np.dtype) -> Pair:
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


def rounded(value: Pair, dtype: np.dtype) -> jax.Array:
    """Return a pair as one number of ``dtype``, which may be wider than what the pair is made of."""
    return value.hi.astype(dtype) + value.lo.astype(dtype)


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


def negative(a: Pair) -> Pair:
    """Return -a."""
    return Pair(-a.hi, -a.lo)


def multiply(a: Pair, b: Pair) -> Pair:
    """Return a * b (the same, algorithm 11)."""
    hi, lo = two_prod(a.hi, b.hi)
    return two_sum(hi, lo + (a.hi * b.lo + a.lo * b.hi))


def divide(a: Pair, b: Pair) -> Pair:
    """Return a / b (the same, algorithm 17)."""
    quotient = a.hi / b.hi
    rest = add(a, multiply(Pair(-quotient, jnp.zeros_like(quotient)), b))
    return two_sum(quotient, rest.hi / b.hi)


def where(condition: jax.Array, a: float, b: Pair) -> Pair:
    """Return a small whole number where the condition holds, and b elsewhere."""
    return Pair(jnp.where(condition, a, b.hi), jnp.where(condition, 0, b.lo))


def column(vector: jax.Array, ndim: int) -> jax.Array:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)


def difference(center: Pair, values: jax.Array) -> Pair:
    """Return values - center, with one center for each channel."""
    hi, lo = (column(-part, values.ndim) for part in center)
    return add(as_pair(values, hi.dtype), Pair(hi, lo))


def channel_sums(term: Callable[..., Pairs], x: jax.Array, *others: jax.Array | None) -> Pairs:
    """Return the sums of ``term(x, *others)``, pairs in the shape of x, for each channel of x, (N, C) or (N, C, L).

    Of the others, which broadcast against x, all have its first axis, if they are not None.
    """
    total = _sum((x, *others), lambda values: term(*values), axis=0)
    return total if x.ndim == 2 else _sum(total, lambda pairs: pairs, axis=1)  # noqa: PLR2004 - (N, C) or (N, C, L)


def _sum(values: Any, term: Callable[..., Pairs], axis: int) -> Pairs:
    """Return the sums of ``term(values)`` over an axis: of block upon block, and then within the block."""
    first = jax.tree.leaves(values)[0]
    n = first.shape[axis]
    length = min(n, max(1, BLOCK * n // first.size))

    def add_block(i: jax.Array, total: Pairs) -> Pairs:
        start = jnp.minimum(i * length, n - length)
        is_new = jnp.arange(length) >= i * length - start  # the last block may reach back into the one before it
        is_new = is_new.reshape([length if other == axis else 1 for other in range(first.ndim)])
        terms = term(_part(values, start, length, axis))
        return _add(total, jax.tree.map(lambda leaf: jnp.where(is_new, leaf, 0), terms))

    total = term(_part(values, 0, length, axis))
    if length < n:
        total = lax.fori_loop(1, -(-n // length), add_block, total)
    zeros = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), total)
    return lax.reduce(total, zeros, _add, (axis,))


def _add(a: Pairs, b: Pairs) -> Pairs:
    return jax.tree.map(add, a, b, is_leaf=lambda leaf: isinstance(leaf, Pair))


def _part(values: Any, start: jax.Array | int, length: int, axis: int) -> Any:
    return jax.tree.map(partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=axis), values)


def _halves(a: jax.Array) -> Pair:
    """Return a as a sum of two numbers of half as many digits, so that products of them are exact."""
    hi = lax.reduce_precision(a, jnp.finfo(a.dtype).nexp, jnp.finfo(a.dtype).nmant // 2)
    return Pair(hi, a - hi)
