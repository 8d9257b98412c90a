"""float16 to float32 and back by the bits: NumPy takes several times as long as memory, and Numba has no float16.

Widening has to be exact, and narrowing to round to the nearest, ties to even, with subnormal numbers, infinities and
NaN as what they are.

Source: IEEE 754-2008, sections 3.4 and 4.3.1.
"""

import numpy as np

from mbn_cpu.kernels.numba_compilation import compiled

_ALL_BUT_SIGN = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
"""The bits of float32's."""
_HALF_INFINITY = np.uint32(0x7C00)
_HALF_NAN = np.uint32(0x7E00)
_LEAST_NORMAL = np.uint32((127 - 14) << 23)
"""The bits of float16's least normal number in float32."""
_OTHER_BIAS = np.uint32((127 - 15) << 23)
"""What an exponent has more in float32 than in float16."""
_SCALE = np.float32(2.0 ** (127 - 15))
_BEYOND = np.float32(2.0**16)
"""What an exponent of all ones would be worth in float16, were it one."""
_NAN = np.float32(np.nan)
_INF = np.float32(np.inf)


@compiled
def widen(bits, out, values):
    """Write numbers given as bits, uint16, to ``values``, float32, of which ``out`` is the memory as uint32."""
    for i in range(bits.size):
        half = np.uint32(bits[i])
        out[i] = (half & np.uint32(0x8000)) << np.uint32(16) | (half & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(bits.size):  # the exponent is right but for its bias, which a product also adds to subnormal numbers
        value = values[i] * _SCALE
        size = abs(value)
        special = _NAN if size > _BEYOND else value * _INF
        values[i] = value if size < _BEYOND else special


@compiled
def narrow(bits, out):
    """Round numbers given as bits of float32, uint32, to bits of float16, uint16."""
    for i in range(bits.size):
        sign = bits[i] >> np.uint32(16) & np.uint32(0x8000)
        size = bits[i] & _ALL_BUT_SIGN
        normal = (size - _OTHER_BIAS + np.uint32(0xFFF) + (size >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
        # A subnormal number is a count of the least one, 2**-24: the digits shifted by what the exponent is short of.
        shift = min(np.uint32(126) - min(size >> np.uint32(23), np.uint32(112)), np.uint32(25))
        digits = size & np.uint32(0x7FFFFF) | np.uint32(0x800000)
        count = digits >> shift
        rest = digits & ((np.uint32(1) << shift) - np.uint32(1))
        tie = np.uint32(1) << (shift - np.uint32(1))
        count += np.uint32(rest > tie or (rest == tie and count & np.uint32(1) == 1))
        value = normal if size >= _LEAST_NORMAL else count
        special = _HALF_NAN if size > _INFINITY else _HALF_INFINITY
        out[i] = np.uint16(sign | (min(value, _HALF_INFINITY) if size < _INFINITY else special))
