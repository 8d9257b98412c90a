"""CuPy's RawModule, for kernels that run on the CPU; wrong arguments, which CuPy passes on, are a TypeError."""

import itertools
import struct

import cuda_on_host
import numpy as np

from ._array import ndarray, operand

_seeds = itertools.count()  # every launch has another order of threads


class RawModule:
    def __init__(self, *, code, options=()):
        if not isinstance(options, tuple):
            message = f"The options are a tuple, not {type(options)}."
            raise TypeError(message)
        self._code = code
        self._macros = tuple(option for option in options if option.startswith("-D"))
        if others := set(options) - {*self._macros, "--std=c++17", "-std=c++17"}:
            message = f"The stand-in has no options {others}."
            raise ValueError(message)

    def get_function(self, name):
        return RawKernel(cuda_on_host.compile(self._code, self._macros).kernel(name))


class RawKernel:
    def __init__(self, kernel):
        self._kernel = kernel

    def __call__(self, grid, block, args):
        for value in (grid, block, args):
            if not isinstance(value, tuple):
                message = f"grid, block and args are tuples, not {type(value)}."
                raise TypeError(message)
        grid, block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
        parameters = self._kernel.parameters
        if len(args) != len(parameters):
            message = f"The kernel takes {len(parameters)} arguments, not {len(args)}."
            raise TypeError(message)
        values = []
        for index, (value, (kind, size)) in enumerate(zip(args, parameters, strict=True)):
            kinds, as_bytes = _argument(value)
            if kind not in kinds or len(as_bytes) != size:
                message = f"Argument {index} is {value!r}, of {len(as_bytes)} bytes; its parameter is {kind}{size}."
                raise TypeError(message)
            values.append(as_bytes)
        self._kernel.launch(grid, block, values, next(_seeds))
        for index, value in enumerate(args):
            if isinstance(value, ndarray) and not value._memory.is_intact():
                message = f"The kernel wrote outside of the memory of argument {index}."
                raise cuda_on_host.LaunchError(message)


def _argument(value):
    """Return the kinds of parameters that a value may be an argument for, and its bytes."""
    if isinstance(value, ndarray):
        return "P", struct.pack("P", operand(value) is not None and value.data.ptr)
    if isinstance(value, np.generic):
        return {"f": "F", "i": "I", "u": "I", "b": "I"}[value.dtype.kind], value.tobytes()
    if type(value) is int:
        return "I" if value else "IP", struct.pack("q", value)  # 0 is the null pointer as well
    if type(value) is float:
        return "F", struct.pack("d", value)
    message = f"Unsupported type {type(value)}"
    raise TypeError(message)
