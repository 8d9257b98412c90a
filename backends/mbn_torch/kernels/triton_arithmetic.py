"""Numbers in Triton that have an exponent beside them, since they may be out of the range of their dtype."""

import triton
import triton.language as tl

FARTHEST = tl.constexpr(1000)
"""Of exponents whose powers of two have an inverse."""
FAR = tl.constexpr(400)
"""Squares of numbers whose exponents are not beyond it are well within the range of float64."""
_NARROW_FAR = tl.constexpr(100)
"""The same of float32, where products are."""
_MOST = tl.constexpr(3.4028234663852886e38)
"""The largest number of float32."""


@triton.jit
def float64(bits):
    """Return the number that has these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def as_dtype(values, DTYPE: tl.constexpr):
    """Return values of float64 in another dtype; there is no way to halves but through float32."""
    if tl.float64 != DTYPE:
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def exponent_of(number):
    """Return the exponent of a number of float64, or the least that has an inverse."""
    exponent = ((number.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    return tl.minimum(tl.maximum(exponent, -FARTHEST), 1023)


@triton.jit
def _ordinary_power(exponent):
    biased = tl.minimum(tl.maximum(exponent, -1022), 1023) + 1023
    return (biased.to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def power(exponent):
    """Return a power of two in float64, subnormal ones included."""
    half = exponent >> 1
    return _ordinary_power(half) * _ordinary_power(exponent - half)


@triton.jit
def scaled(number, exponent):
    """Return a number of float64 times a power of two, which may be out of range."""
    half = exponent >> 1
    return number * _ordinary_power(half) * _ordinary_power(exponent - half)


@triton.jit
def is_far(deviation):
    """Tell whether squares of deviations up to this may leave the range of float64."""
    exponent = exponent_of(deviation)
    return (deviation != 0) & ((exponent > FAR) | (exponent < -FAR))


@triton.jit
def limited(number, DTYPE: tl.constexpr):
    """Return a number of float64 in a dtype; one that is beyond it is its largest, so that 0 times it is 0."""
    if tl.float64 == DTYPE:
        infinite = number - number != number - number
        most = float64(tl.full((), 0x7FEFFFFFFFFFFFFF, tl.int64))
        number = tl.where(infinite & (number > 0), most, tl.where(infinite & (number < 0), -most, number))
    else:
        number = tl.where(number > _MOST, _MOST, tl.where(number < -_MOST, -_MOST, number)).to(DTYPE)
    return number


@triton.jit
def exponent_before(number, exponent, center, unit, DTYPE: tl.constexpr):
    """Return the exponent of the power of two by which values, and a center in units, are multiplied at first.

    It is 0 unless the difference of the two, or its product with the scale, ``number * 2**exponent``, might leave the
    range of the dtype. Of float64 it is that of the scale, so that no product of a difference with a gradient leaves
    the range either.
    """
    WIDE: tl.constexpr = tl.float64 == DTYPE
    TOP: tl.constexpr = 1024 if WIDE else 128
    LEAST: tl.constexpr = -1022 if WIDE else -149
    size = exponent + exponent_of(number)
    far = exponent_of(center) + unit
    before = tl.minimum(tl.maximum(tl.minimum(size, TOP - 8 - far), LEAST), TOP - 1)
    if not WIDE:
        is_near = (unit == 0) & (far < _NARROW_FAR) & (size <= _NARROW_FAR) & (size >= -_NARROW_FAR)
        before = tl.where(is_near, 0, before)
    return before
