"""Arithmetic in pairs.

It must be as exact where JAX has no 64-bit numbers, which is its default, as where it has. So what counts is carried in
pairs, unevaluated sums of two numbers of the dtype computed in, made by transforms that return their rounding error
too. XLA contracts products and sums into FMAs as it likes, which changes nothing here: every product whose last bit
counts is exact.

Everything can be traced, and differentiates as the real numbers that it stands for: a rounding error is a constant.
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Pair(NamedTuple):
    """The unevaluated sum of two arrays, hi being the sum rounded: twice the precision of one."""

    hi: jax.Array
    lo: jax.Array


class Scaled(NamedTuple):
    """A pair in units of a power of two, so that the low part stays within the range of the dtype: ``pair * unit``."""

    pair: Pair
    unit: jax.Array


class Square(NamedTuple):
    """The same for a variance: ``pair * unit**2``."""

    pair: Pair
    unit: jax.Array


NOTHING = 2.0**-500
"""The size, in the unit that a number was computed in, below which the number is 0.

The quotient of that unit and one of the number's own size then stays within float64, and so does its square.
"""

Mean: TypeAlias = Scaled | jax.Array
Variance: TypeAlias = Square | jax.Array
"""Either may be a plain vector."""


def widest_dtype() -> np.dtype:
    """Return the widest floating dtype there is: float64 where 64-bit numbers are enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def wider(dtype: np.dtype, other: np.dtype) -> np.dtype:
    """Return the wider of two floating dtypes; no promotion, which may be switched off."""
    return max(np.dtype(dtype), np.dtype(other), key=lambda either: either.itemsize)


def number(value: float) -> Pair:
    """Return a Python number as a pair on the host, to be an argument of compiled code: a new one compiles nothing new.

    As a plain number it would be rounded to float32 on its way.
    """
    hi: Any = np.asarray(value, widest_dtype())
    lo: Any = np.asarray(value - float(hi), hi.dtype)
    return Pair(hi, lo)


def squared(value: float) -> Square:
    """Return a Python number, at least 0, in the same way as a square."""
    lowest, highest = limits(widest_dtype())
    power = min(max(math.ldexp(1.0, math.frexp(value)[1] // 2), lowest), highest)
    unit: Any = np.asarray(power, widest_dtype())
    return Square(number(value / power / power), unit)


def limits(dtype: np.dtype) -> tuple[float, float]:
    """Return the least and the largest unit of a dtype, whose inverses it has as well."""
    largest = float(2 ** (jnp.finfo(dtype).maxexp - 2))
    return 1 / largest, largest


def as_scaled(value: Mean, dtype: np.dtype) -> Scaled:
    """Return a mean in units of ``dtype``."""
    if not isinstance(value, Scaled):
        return Scaled(as_pair(value, dtype), jnp.ones_like(value, dtype))
    return Scaled(as_pair(value.pair, dtype), value.unit.astype(dtype))


def in_own_units(value: Scaled, dtype: np.dtype) -> Scaled:
    """Return a number of float64 in units of ``dtype`` of about its own size."""
    own = power_of_two(jnp.maximum(jnp.abs(value.pair.hi), NOTHING) * value.unit, dtype)
    return Scaled(as_pair(times(value.pair, value.unit / own), dtype), own.astype(dtype))


def as_square(value: Variance, dtype: np.dtype) -> Square:
    """Return a variance as a square of ``dtype``."""
    if not isinstance(value, Square):
        is_subnormal, part = subnormal(value)
        unit = jnp.where(is_subnormal, float(jnp.finfo(value.dtype).tiny) ** 0.5, jnp.ones_like(value))
        return as_square(Square(as_pair(jnp.where(is_subnormal, part, value), value.dtype), unit), dtype)
    if value.unit.dtype == dtype:
        return value
    unit = jnp.clip(value.unit, *limits(dtype)) if value.unit.dtype.itemsize > dtype.itemsize else value.unit
    ratio = value.unit.astype(unit.dtype) / unit
    return Square(as_pair(times(times(value.pair, ratio), ratio), dtype), unit.astype(dtype))


def times(a: Pair, power: jax.Array | float) -> Pair:
    """Return a pair times a power of two."""
    return Pair(a.hi * power, a.lo * power)


def subnormal(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where a value of at least 0 is subnormal, and it in units of the least normal number there.

    As integers tell it: XLA may take such numbers for 0.
    """
    info = jnp.finfo(value.dtype)
    bits = lax.bitcast_convert_type(value, f"uint{info.bits}") & ((1 << (info.bits - 1)) - 1)
    # Behind a barrier, or XLA would multiply this factor by the next first.
    part = lax.optimization_barrier(bits.astype(value.dtype) * 2.0**-info.nmant)
    return (bits > 0) & (bits < 1 << info.nmant), part


def power_of_two(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """Return a power of two next to a positive value that has such an inverse in ``dtype``; the least one for 0."""
    rounded = lax.reduce_precision(value, jnp.finfo(value.dtype).nexp, 0)
    return lax.stop_gradient(jnp.clip(rounded, *limits(dtype)))


def as_pair(value: Pair | jax.Array | float, dtype: np.dtype) -> Pair:
    """Return a value as a pair of ``dtype``, keeping of a wider one what two numbers can hold."""
    if isinstance(value, Pair):
        hi, rest = as_pair(value.hi, dtype)
        return two_sum(hi, rest + value.lo.astype(dtype))
    if isinstance(value, float):
        # Behind a barrier it is no constant to XLA, which takes (x + 1) - 1 for x.
        return as_pair(Pair(*lax.optimization_barrier(number(value))), dtype)
    if jnp.issubdtype(value.dtype, jnp.integer):  # a count that a compiled function returned
        hi = value.astype(dtype)
        return Pair(hi, (value - hi.astype(value.dtype)).astype(dtype))
    value = value.astype(wider(value.dtype, dtype))
    if value.dtype == dtype:
        return Pair(value, jnp.zeros_like(value))
    # XLA takes a conversion there and back for nothing, so the rounding has to be asked for.
    hi = lax.reduce_precision(value, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return Pair(hi.astype(dtype), (value - hi).astype(dtype))


def wide(value: Pair | jax.Array) -> jax.Array:
    """Return a value in float64, where that is there; more than it holds of a pair of float32 it never was."""
    if isinstance(value, Pair):
        return wide(value.hi) + wide(value.lo)
    return value.astype(np.float64)


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


def _halves(a: jax.Array) -> Pair:
    """Return a as a sum of two numbers of half as many digits, so that products of them are exact."""
    hi = lax.reduce_precision(a, jnp.finfo(a.dtype).nexp, jnp.finfo(a.dtype).nmant // 2)
    return Pair(hi, a - hi)
