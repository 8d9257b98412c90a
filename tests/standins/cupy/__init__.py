"""A stand-in for CuPy without a GPU: NumPy's arithmetic behind CuPy's interface, and kernels that run on the CPU.

It has only the functions that ``mbn_cupy`` and the conformance suite use; tests put it first on ``sys.path`` under
CuPy's name. It is as strict as CuPy: a NumPy array is no operand (TypeError), an array is not converted to a NumPy
array implicitly (TypeError), and a division by zero does not warn. It is stricter where CuPy only warns, only waits or
does not check: the operands of an operation and the arrays of a kernel have to be on the current device, an index must
not be boolean, uninitialised memory is NaN, and a write outside of an array's memory is an error. It does not show how
CuPy compiles, rounds and orders its memory, nor how fast it is.
"""

import numpy as np

from ._array import call, ndarray, operand, stored, unwritten
from ._device import cuda, current_id
from ._memory import Borrowed
from ._raw import RawKernel, RawModule

__all__ = ["RawKernel", "RawModule", "cuda", "ndarray"]
__version__ = "14.2.0+standin"


def asarray(a, dtype=None):
    """Return ``a`` on the current device: itself if it is an array there, otherwise a copy."""
    if isinstance(a, ndarray):
        host = a._host
        if a._device_id == current_id() and (dtype is None or dtype == a.dtype):
            return a
    else:
        host = np.asarray(a)
    with np.errstate(all="ignore"):  # a GPU does not warn
        return stored(host.astype(host.dtype.newbyteorder("=") if dtype is None else dtype))


def ascontiguousarray(a, dtype=None):
    host = operand(a)
    return a if host.flags.c_contiguous and dtype in (None, a.dtype) else stored(np.ascontiguousarray(host, dtype))


class _OnHost:
    """An array of a simulated GPU that tells NumPy by DLPack that it is on the host."""

    def __init__(self, array):
        self.__dlpack__ = array.__dlpack__

    def __dlpack_device__(self):
        return 1, 0


def from_dlpack(array):
    kind, device_id = array.__dlpack_device__()
    if kind != 2:
        message = f"Unsupported array type: {kind}"
        raise TypeError(message)
    with cuda.Device(device_id):
        return ndarray(np.from_dlpack(_OnHost(array)), Borrowed(), device_id)


def asnumpy(a):
    return a.get()


def empty(shape, dtype=float):
    return unwritten(np.empty(shape, np.uint8).shape, dtype)


def empty_like(prototype, dtype=None):
    like = np.empty_like(prototype._host, dtype)
    return unwritten(like.shape, like.dtype, like.strides)


def zeros(shape, dtype=float):
    return stored(np.zeros(shape, dtype))


def zeros_like(x):
    return call(np.zeros_like, x)


def ones(shape, dtype=float):
    return stored(np.ones(shape, dtype))


def arange(stop):
    return stored(np.arange(stop))


def concatenate(arrays):
    return call(lambda *operands: np.concatenate(operands), *arrays)


def stack(arrays):
    return call(lambda *operands: np.stack(operands), *arrays)


def where(condition, x, y):
    return call(np.where, condition, x, y)


def sqrt(x):
    return call(np.sqrt, x)


def maximum(x, y):
    return call(np.maximum, x, y)


def minimum(x, y):
    return call(np.minimum, x, y)


def frexp(x):
    return tuple(call(lambda values, part=part: np.frexp(values)[part], x) for part in (0, 1))


def ldexp(x, exponent):
    return call(np.ldexp, x, exponent)


def may_share_memory(a, b):
    return np.may_share_memory(a._host, b._host)


def shares_memory(a, b):
    return np.shares_memory(a._host, b._host)


def all(a):  # noqa: A001 - CuPy's name
    return call(np.all, a)
