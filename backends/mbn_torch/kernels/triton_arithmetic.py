"""Numbers with an extra exponent, in Triton, for products that may leave the range of their dtype.

Such a number is ``number * 2**exponent``, of a float64 and an int32. The helpers read and make powers of two by the
bits of float64: 1 bit of sign, 11 of the exponent plus 1023, and 52 of the fraction.
"""

import triton
import triton.language as tl

FARTHEST = tl.constexpr(1000)
"""Up to this absolute exponent, a power of two and its inverse are normal numbers of float64."""
FAR = tl.constexpr(400)
"""Up to this absolute exponent, squares of numbers, and sums of squares, stay within float64's range."""
_NARROW_FAR = tl.constexpr(100)
"""The same for products in float32; squares are never summed in float32."""
_MOST = tl.constexpr(3.4028234663852886e38)
"""The largest number of float32."""


@triton.jit
def float64(bits):
    """Return the float64 with the bits of an integer: Triton would round a Python float to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def as_dtype(values, DTYPE: tl.constexpr):
    """Return values of float64 in another dtype, by way of float32: Triton cannot convert float64 to 16 bits."""
    if tl.float64 != DTYPE:
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def exponent_of(number):
    """Return the exponent of a float64 as int32 (that of 1.5 * 2**e is e), at least -FARTHEST, which 0 has."""
    exponent = ((number.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    return tl.minimum(tl.maximum(exponent, -FARTHEST), 1023)


@triton.jit
def _ordinary_power(exponent):
    """Return 2**exponent by its bits, with the exponent clamped to those of normal numbers."""
    biased = tl.minimum(tl.maximum(exponent, -1022), 1023) + 1023
    return (biased.to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def power(exponent):
    """Return 2**exponent in float64, subnormal numbers included, as a product of two normal powers."""
    half = exponent >> 1
    return _ordinary_power(half) * _ordinary_power(exponent - half)


@triton.jit
def scaled(number, exponent):
    """Return a float64 times 2**exponent, in two factors since 2**exponent itself may be out of range."""
    half = exponent >> 1
    return number * _ordinary_power(half) * _ordinary_power(exponent - half)


@triton.jit
def is_far(deviation):
    """Tell whether the square of a deviation, or a sum of such squares, may leave the range of float64."""
    exponent = exponent_of(deviation)
    return (deviation != 0) & ((exponent > FAR) | (exponent < -FAR))


@triton.jit
def limited(number, DTYPE: tl.constexpr):
    """Return a float64 in a dtype; a larger one becomes the dtype's largest, since 0 times infinity would be NaN."""
    if tl.float64 == DTYPE:
        infinite = number - number != number - number  # inf - inf is NaN, which is not equal to itself
        most = float64(tl.full((), 0x7FEFFFFFFFFFFFFF, tl.int64))
        number = tl.where(infinite & (number > 0), most, tl.where(infinite & (number < 0), -most, number))
    else:
        number = tl.where(number > _MOST, _MOST, tl.where(number < -_MOST, -_MOST, number)).to(DTYPE)
    return number


@triton.jit
def exponent_before(number, exponent, center, unit, DTYPE: tl.constexpr):
    """Return the exponent of the power of two by which values and their center are multiplied before the subtraction.

    The center is ``center * 2**unit``; the difference is multiplied by the scale, ``number * 2**exponent``, afterwards.

    For a ``DTYPE`` of float32 the result is 0 unless the difference, or its product with the scale, might leave the
    range. For float64 it is always about the exponent of the scale: differences are then near 1, so that products of
    differences and gradients stay in range too.
    """
    WIDE: tl.constexpr = tl.float64 == DTYPE
    TOP: tl.constexpr = 1024 if WIDE else 128
    LEAST: tl.constexpr = -1022 if WIDE else -149
    size = exponent + exponent_of(number)
    far = exponent_of(center) + unit
    # The center must stay in range too, with 8 bits to spare for values that are larger than the center.
    before = tl.minimum(tl.maximum(tl.minimum(size, TOP - 8 - far), LEAST), TOP - 1)
    if not WIDE:
        is_near = (unit == 0) & (far < _NARROW_FAR) & (size <= _NARROW_FAR) & (size >= -_NARROW_FAR)
        before = tl.where(is_near, 0, before)
    return before
