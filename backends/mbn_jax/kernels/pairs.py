"""Arithmetic in pairs: unevaluated sums of two numbers, made by transforms that also return the rounding error.

Results must be equally exact whether or not 64-bit numbers are enabled in JAX; by default they are not. So statistics
are pairs of numbers of the dtype of the arithmetic. XLA may contract products and sums into FMAs, which changes no
result here: every product whose last bit matters is exact.

Every function can be traced. Its derivatives are those of the real numbers that the pairs represent: a rounding error
is a constant.
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Pair(NamedTuple):
    """The unevaluated sum of two arrays, of which hi is the sum rounded: twice the precision of one array."""

    hi: jax.Array
    lo: jax.Array


class Scaled(NamedTuple):
    """``pair * unit``, with a power of two as unit, so that the low part stays within the range of the dtype."""

    pair: Pair
    unit: jax.Array


class Square(NamedTuple):
    """``pair * unit**2``: a variance in the square of a unit."""

    pair: Pair
    unit: jax.Array


NOTHING = 2.0**-500
"""The least size, in the unit of its computation, of a number that is converted to a unit of its own size.

Smaller numbers count as 0, so that the quotient of the two units, and its square, stay within float64's range.
"""

Mean: TypeAlias = Scaled | jax.Array
Variance: TypeAlias = Square | jax.Array
"""A mean and a variance may also be plain vectors."""


def widest_dtype() -> np.dtype:
    """Return the widest enabled floating dtype: float64 if 64-bit numbers are enabled, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def wider(dtype: np.dtype, other: np.dtype) -> np.dtype:
    """Return the wider of two floating dtypes, without JAX's promotion, which users may switch off."""
    return max(np.dtype(dtype), np.dtype(other), key=lambda either: either.itemsize)


def number(value: float) -> Pair:
    """Return a Python number as a pair on the host, an argument of compiled code: another number compiles nothing anew.

    As a plain number it might be rounded to float32.
    """
    hi: Any = np.asarray(value, widest_dtype())
    lo: Any = np.asarray(value - float(hi), hi.dtype)
    return Pair(hi, lo)


def squared(value: float) -> Square:
    """Return a Python number, at least 0, as a ``Square`` on the host, an argument of compiled code."""
    lowest, highest = limits(widest_dtype())
    power = min(max(math.ldexp(1.0, math.frexp(value)[1] // 2), lowest), highest)
    unit: Any = np.asarray(power, widest_dtype())
    return Square(number(value / power / power), unit)


def limits(dtype: np.dtype) -> tuple[float, float]:
    """Return the least and the largest unit of a dtype; their inverses are in its range too."""
    largest = float(2 ** (jnp.finfo(dtype).maxexp - 2))
    return 1 / largest, largest


def as_scaled(value: Mean, dtype: np.dtype) -> Scaled:
    """Return a mean as a ``Scaled`` of ``dtype``."""
    if not isinstance(value, Scaled):
        return Scaled(as_pair(value, dtype), jnp.ones_like(value, dtype))
    return Scaled(as_pair(value.pair, dtype), value.unit.astype(dtype))


def in_own_units(value: Scaled, dtype: np.dtype) -> Scaled:
    """Return a float64 number as a ``Scaled`` of ``dtype``, in a unit of about its own size."""
    own = power_of_two(jnp.maximum(jnp.abs(value.pair.hi), NOTHING) * value.unit, dtype)
    return Scaled(as_pair(times(value.pair, value.unit / own), dtype), own.astype(dtype))


def as_square(value: Variance, dtype: np.dtype) -> Square:
    """Return a variance as a ``Square`` of ``dtype``."""
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
    """Return where values, at least 0, are subnormal, and their fractions, in units of the least normal number.

    Both are read from the bits as integers, since XLA may flush subnormal numbers to 0.
    """
    info = jnp.finfo(value.dtype)
    bits = lax.bitcast_convert_type(value, f"uint{info.bits}") & ((1 << (info.bits - 1)) - 1)
    # The barrier keeps XLA from multiplying this factor by the next one first.
    part = lax.optimization_barrier(bits.astype(value.dtype) * 2.0**-info.nmant)
    return (bits > 0) & (bits < 1 << info.nmant), part


def power_of_two(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """Return a power of two next to a positive value, with an inverse in ``dtype`` too; the least such power for 0."""
    rounded = lax.reduce_precision(value, jnp.finfo(value.dtype).nexp, 0)
    return lax.stop_gradient(jnp.clip(rounded, *limits(dtype)))


def as_pair(value: Pair | jax.Array | float, dtype: np.dtype) -> Pair:
    """Return a value as a pair of ``dtype``; a wider value is rounded to two numbers of ``dtype``."""
    if isinstance(value, Pair):
        hi, rest = as_pair(value.hi, dtype)
        return two_sum(hi, rest + value.lo.astype(dtype))
    if isinstance(value, float):
        # The barrier hides the constant from XLA, which would simplify (x + 1) - 1 to x.
        return as_pair(Pair(*lax.optimization_barrier(number(value))), dtype)
    if jnp.issubdtype(value.dtype, jnp.integer):  # a count returned by a compiled function
        hi = value.astype(dtype)
        return Pair(hi, (value - hi.astype(value.dtype)).astype(dtype))
    value = value.astype(wider(value.dtype, dtype))
    if value.dtype == dtype:
        return Pair(value, jnp.zeros_like(value))
    # XLA removes a conversion to a narrower dtype and back, so the rounding must be explicit.
    hi = lax.reduce_precision(value, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return Pair(hi.astype(dtype), (value - hi).astype(dtype))


def wide(value: Pair | jax.Array) -> jax.Array:
    """Return a value in float64 (where 64-bit numbers are enabled), in which a pair of float32 loses no digits."""
    if isinstance(value, Pair):
        return wide(value.hi) + wide(value.lo)
    return value.astype(np.float64)


def two_sum(a: jax.Array, b: jax.Array) -> Pair:
    """Return a + b and its rounding error, exactly (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    b_part = total - a
    return Pair(total, lax.stop_gradient((a - (total - b_part)) + (b - b_part)))


def two_prod(a: jax.Array, b: jax.Array) -> Pair:
    """Return a * b to within a last digit, and its exact error (Dekker, A floating-point technique, 1971: mul12)."""
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
    """Return a * b (Joldes, Muller and Popescu, 2017, algorithm 11)."""
    hi, lo = two_prod(a.hi, b.hi)
    return two_sum(hi, lo + (a.hi * b.lo + a.lo * b.hi))


def divide(a: Pair, b: Pair) -> Pair:
    """Return a / b (Joldes, Muller and Popescu, 2017, algorithm 17)."""
    quotient = a.hi / b.hi
    rest = add(a, multiply(Pair(-quotient, jnp.zeros_like(quotient)), b))
    return two_sum(quotient, rest.hi / b.hi)


def where(condition: jax.Array, a: float, b: Pair) -> Pair:
    """Return a small integer where the condition holds, and b elsewhere."""
    return Pair(jnp.where(condition, a, b.hi), jnp.where(condition, 0, b.lo))


def _halves(a: jax.Array) -> Pair:
    """Return a as the sum of two numbers with half as many digits, so that their products are exact."""
    hi = lax.reduce_precision(a, jnp.finfo(a.dtype).nexp, jnp.finfo(a.dtype).nmant // 2)
    return Pair(hi, a - hi)
