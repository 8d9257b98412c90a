"""Conversions between float16 and float32, on their bits.

NumPy's conversions are several times slower than memory, and Numba has no float16. Widening is exact, and narrowing
rounds to the nearest, ties to even. Subnormal numbers, infinities and NaN are kept.

::

               sign   exponent            fraction
    float16    15     14..10  (bias 15)   9..0       10 bits: shifted left by 13, they are the upper ones of float32's
    float32    31     30..23  (bias 127)  22..0      23 bits

Both loops choose between values and have no branches, so that the compiler can vectorise them.

Source: IEEE 754-2008, sections 3.4 and 4.3.1.
"""

import numpy as np

from mbn_cpu.kernels.numba_compilation import compiled

_ALL_BUT_SIGN = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
"""The bits of float32's infinity; as an integer, those of a NaN are larger."""
_HALF_INFINITY = np.uint32(0x7C00)
_HALF_NAN = np.uint32(0x7E00)
"""The bits of float16's infinity, and of a NaN."""
_LEAST_NORMAL = np.uint32((127 - 14) << 23)
"""The bits of float16's least normal number in float32."""
_OTHER_BIAS = np.uint32((127 - 15) << 23)
"""The difference of the biases, as an exponent in float32."""
_SCALE = np.float32(2.0 ** (127 - 15))
"""The factor that corrects the difference of the biases."""
_BEYOND = np.float32(2.0**16)
"""The bound of finite numbers of float16: the value that its largest exponent, of infinity and NaN, would have."""
_NAN = np.float32(np.nan)
_INF = np.float32(np.inf)


@compiled
def widen(bits, out, values):
    """Write float16 numbers, given as bits in uint16, to ``values`` in float32; ``out`` is its memory as uint32.

    All arrays have one axis and the same size.
    """
    # Shift sign, exponent and fraction to float32's bits.
    for i in range(bits.size):
        half = np.uint32(bits[i])
        out[i] = (half & np.uint32(0x8000)) << np.uint32(16) | (half & np.uint32(0x7FFF)) << np.uint32(13)
    # The exponents now lack the difference of the biases. A product adds it, and is exact for subnormal numbers too.
    # A product of 2**16 means infinity, and a larger one NaN.
    for i in range(bits.size):
        value = values[i] * _SCALE
        size = abs(value)
        special = _NAN if size > _BEYOND else value * _INF
        values[i] = value if size < _BEYOND else special


@compiled
def narrow(bits, out):
    """Round float32 numbers, given as bits in uint32, to float16, and write their bits in uint16 to ``out``."""
    for i in range(bits.size):
        sign = bits[i] >> np.uint32(16) & np.uint32(0x8000)
        size = bits[i] & _ALL_BUT_SIGN
        # A normal number: round by adding half of the last kept digit, less 1 if that digit is even, and cutting off 13
        # bits. A carry goes into the exponent, which is the right result.
        normal = (size - _OTHER_BIAS + np.uint32(0xFFF) + (size >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
        # A subnormal number is a multiple of the least one, 2**-24: the digits, shifted by the difference between the
        # least exponent and the number's. A shift of 25 removes all 24 digits, so it is enough for every number.
        shift = min(np.uint32(126) - min(size >> np.uint32(23), np.uint32(112)), np.uint32(25))
        digits = size & np.uint32(0x7FFFFF) | np.uint32(0x800000)
        count = digits >> shift
        rest = digits & ((np.uint32(1) << shift) - np.uint32(1))
        tie = np.uint32(1) << (shift - np.uint32(1))
        count += np.uint32(rest > tie or (rest == tie and count & np.uint32(1) == 1))
        # Choose. A number that rounds to more than the largest one is infinity.
        value = normal if size >= _LEAST_NORMAL else count
        special = _HALF_NAN if size > _INFINITY else _HALF_INFINITY
        out[i] = np.uint16(sign | (min(value, _HALF_INFINITY) if size < _INFINITY else special))
