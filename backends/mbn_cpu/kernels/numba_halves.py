"""Conversions between halves and float32, on their bits.

NumPy's conversions are several times slower than memory, and Numba has neither dtype. Widening is exact, and narrowing
rounds to the nearest, ties to even. Subnormal numbers and infinities are kept, and every NaN becomes the ordinary one::

               sign   exponent            fraction
    float16    15     14..10  (bias 15)   9..0       the processor's own instructions, where it has them
    bfloat16   15     14..7   (bias 127)  6..0       the upper half of a float32
    float32    31     30..23  (bias 127)  22..0

The loops choose between values and have no branches, so that the compiler can vectorise them.

Source: IEEE 754-2008, sections 3.4 and 4.3.1.
"""

import platform
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.extending import intrinsic

from mbn_cpu.kernels.numba_compilation import compiled

_ALL_BUT_SIGN = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
"""The bits of float32's infinity; as an integer, those of a NaN are larger."""
_FLOAT16_NAN, _BFLOAT16_NAN = np.uint16(0x7E00), np.uint32(0x7FC0)
_NAN = np.float32(np.nan)


def _widened(_: Any, bits: Any) -> Any:
    """Return the signature and the code of a conversion of float16's bits to float32."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def _narrowed(_: Any, value: Any) -> Any:
    """Return the signature and the code of a conversion of float32 to float16's bits."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


as_float32: Any = intrinsic(_widened)
"""In compiled code, float16 as float32."""
as_float16: Any = intrinsic(_narrowed)
"""In compiled code, float32 as float16, rounded."""


@compiled
def widen_float16(bits, values):
    """Write float16 numbers, given as bits in uint16, to ``values`` in float32. All arrays here have one axis."""
    for i in range(bits.size):
        value = as_float32(bits[i])
        values[i] = value if value == value else _NAN  # noqa: PLR0124 - only NaN differs from itself


@compiled
def narrow_float16(values, bits):
    """Round float32 numbers to float16, and write their bits in uint16."""
    for i in range(values.size):
        value = values[i]
        sign = np.uint16(np.float32(value).view(np.uint32) >> np.uint32(16)) & np.uint16(0x8000)
        bits[i] = as_float16(value) if value == value else sign | _FLOAT16_NAN  # noqa: PLR0124 - as above


@compiled
def widen_bfloat16(bits, values):
    """Write bfloat16 numbers, given as bits in uint16, to ``values`` in float32."""
    out = values.view(np.uint32)
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@compiled
def narrow_bfloat16(values, bits):
    """Round float32 numbers to bfloat16, and write their bits in uint16."""
    given = values.view(np.uint32)
    for i in range(given.size):
        # Add half of the last kept digit, less 1 if that digit is even, and cut off 16 bits. A carry goes into the
        # exponent, which is the right result.
        upper = given[i] >> np.uint32(16)
        rounded = given[i] + np.uint32(0x7FFF) + (upper & np.uint32(1)) >> np.uint32(16)
        nan = upper & np.uint32(0x8000) | _BFLOAT16_NAN
        bits[i] = np.uint16(nan if given[i] & _ALL_BUT_SIGN > _INFINITY else rounded)


class Conversions(NamedTuple):
    """The two conversions of a dtype of 16 bits."""

    widen: Callable[[np.ndarray, np.ndarray], None]
    narrow: Callable[[np.ndarray, np.ndarray], None]


@cache
def of(dtype: np.dtype) -> Conversions | None:
    """Return the conversions of halves in this machine's byte order; None for other dtypes, or without instructions."""
    if not dtype.isnative:
        return None
    if dtype == np.float16 and _has_instructions():
        return Conversions(widen_float16, narrow_float16)
    return Conversions(widen_bfloat16, narrow_bfloat16) if dtype.name == "bfloat16" else None


def _has_instructions() -> bool:
    """Tell whether the processor converts float16; else compiled code would call functions that are missing."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    features = config.CPU_FEATURES  # type: ignore[attr-defined]  # set from the environment
    return bool(binding.get_host_cpu_features().get("f16c")) if features is None else "+f16c" in features.split(",")
