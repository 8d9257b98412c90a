"""float16 to float32 and back by the bits: NumPy takes several times as long as memory, and Numba has no float16.

Widening is exact, and narrowing rounds to the nearest, ties to even. Subnormal numbers, infinities and NaN stay such.

::

               sign   exponent            fraction
    float16    15     14..10  (bias 15)   9..0       10 bits: shifted by 13 to the left they are the upper ones of
    float32    31     30..23  (bias 127)  22..0      23 bits

Both loops choose between values and have no branches, so that the compiler can vectorise them.

Source: IEEE 754-2008, sections 3.4 and 4.3.1.
"""

import numpy as np

from mbn_cpu.kernels.numba_compilation import compiled

_ALL_BUT_SIGN = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
"""The bits of float32's infinity; those of a NaN are more."""
_HALF_INFINITY = np.uint32(0x7C00)
_HALF_NAN = np.uint32(0x7E00)
"""The bits of float16's infinity, and of a NaN."""
_LEAST_NORMAL = np.uint32((127 - 14) << 23)
"""The bits of float16's least normal number in float32."""
_OTHER_BIAS = np.uint32((127 - 15) << 23)
"""The difference of the biases, as an exponent in float32."""
_SCALE = np.float32(2.0 ** (127 - 15))
"""The factor that makes good the difference of the biases."""
_BEYOND = np.float32(2.0**16)
"""The bound of finite numbers of float16: its exponent of all ones, of infinity and NaN, would stand for this."""
_NAN = np.float32(np.nan)
_INF = np.float32(np.inf)


@compiled
def widen(bits, out, values):
    """Write float16 numbers, given as bits in uint16, to ``values`` in float32; ``out`` is its memory as uint32.

    All have one axis and the same size.
    """
    # Sign, exponent and fraction to where float32 has them.
    for i in range(bits.size):
        half = np.uint32(bits[i])
        out[i] = (half & np.uint32(0x8000)) << np.uint32(16) | (half & np.uint32(0x7FFF)) << np.uint32(13)
    # The exponents now lack the difference of the biases. A product adds it, and is right for subnormal numbers too.
    # A product of 2**16 stands for infinity, and a larger one for NaN.
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
        # An ordinary number: to add half of the last digit that stays, less 1 if that is even, and cut off 13 bits
        # rounds. A carry goes into the exponent, as it has to.
        normal = (size - _OTHER_BIAS + np.uint32(0xFFF) + (size >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
        # A subnormal number is a multiple of the least one, 2**-24: the digits shifted by what the exponent is short
        # of. A shift of 25 leaves nothing of the 24 digits, so no more is needed.
        shift = min(np.uint32(126) - min(size >> np.uint32(23), np.uint32(112)), np.uint32(25))
        digits = size & np.uint32(0x7FFFFF) | np.uint32(0x800000)
        count = digits >> shift
        rest = digits & ((np.uint32(1) << shift) - np.uint32(1))
        tie = np.uint32(1) << (shift - np.uint32(1))
        count += np.uint32(rest > tie or (rest == tie and count & np.uint32(1) == 1))
        # Choose. What rounds beyond the largest number is infinity.
        value = normal if size >= _LEAST_NORMAL else count
        special = _HALF_NAN if size > _INFINITY else _HALF_INFINITY
        out[i] = np.uint16(sign | (min(value, _HALF_INFINITY) if size < _INFINITY else special))
