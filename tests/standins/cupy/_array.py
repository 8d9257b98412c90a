"""CuPy's array with NumPy's arithmetic, on the current one of the simulated devices."""

from types import SimpleNamespace

import numpy as np

from ._device import Device, current_id
from ._memory import allocated


class ndarray:  # noqa: N801 - CuPy's name
    """An array on a simulated device, with its values in the private attribute ``_host``."""

    __array_ufunc__ = None  # NumPy leaves `numpy_array + x` to this class, which refuses it
    __hash__ = None

    def __init__(self, host, memory, device_id):
        self._host = host
        self._memory = memory
        self._device_id = device_id

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: self._host.flags)
    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))
    device = property(lambda self: Device(self._device_id))
    T = property(lambda self: self._result(self._host.T))

    def swapaxes(self, axis1, axis2):  # CuPy 13 has no mT
        return self._result(self._host.swapaxes(axis1, axis2))

    def __array__(self, *args, **options):
        message = "Implicit conversion to a NumPy array is not allowed. Please use `.get()`."
        raise TypeError(message)

    def __repr__(self):
        return repr(self._host)

    def __int__(self):
        return int(self._host)

    def __bool__(self):
        return bool(self._host)

    def __getitem__(self, key):
        parts = tuple(map(_index, key if isinstance(key, tuple) else (key,)))
        if not any(part is Ellipsis for part in parts):
            parts += (Ellipsis,)  # an index of a single value gives a view of it
        return self._result(self._host[parts])

    def __setitem__(self, key, value):
        operand(self)[key] = operand(value)

    def __reduce__(self):
        from . import asarray

        return asarray, (self.get(),)

    def __deepcopy__(self, memo):
        with self.device:
            return self.copy()

    def get(self):
        return self._host.copy()

    def __dlpack__(self, *, stream=None, **options):
        return operand(self).__dlpack__(**options)

    def __dlpack_device__(self):
        return 2, self._device_id

    def copy(self):
        return stored(self._host.copy())

    def ravel(self):
        return self._result(self._host.ravel())

    def max(self):
        return call(np.max, self)

    def clip(self, low, high):
        return call(np.clip, self, low, high)

    def astype(self, dtype, order="K", *, copy=True):
        if not copy and dtype == self.dtype:
            return self
        with np.errstate(all="ignore"):  # a GPU does not warn
            return call(np.ndarray.astype, self, dtype=dtype, order=order)

    def _result(self, host):
        """Return a view as an array that shares this one's memory, and a copy in memory of its own."""
        if np.may_share_memory(host, self._host):
            return ndarray(host, self._memory, self._device_id)
        return stored(host, self._device_id)


def _operator(ufunc):
    return lambda self, other: call(ufunc, self, other)


def _reflected(ufunc):
    return lambda self, other: call(ufunc, other, self)


def _in_place(ufunc):
    return lambda self, other: call(ufunc, self, other, out=self)


for _name, _ufunc in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "and": np.bitwise_and,
    "rshift": np.right_shift,
}.items():
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
    setattr(ndarray, f"__r{_name}__", _reflected(_ufunc))
    setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
for _name, _ufunc in {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}.items():
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
ndarray.__neg__ = lambda self: call(np.negative, self)
ndarray.__invert__ = lambda self: call(np.invert, self)
ndarray.__abs__ = lambda self: call(np.abs, self)


def unwritten(shape, dtype, strides=None):
    """Return an uninitialised array, all NaN, on the current device."""
    return ndarray(*allocated(shape, np.dtype(dtype), strides), current_id())


def stored(host, device_id=None):
    """Return the values of a NumPy array, in its order, as an array on a device: the current one if None."""
    copy, memory = allocated(host.shape, host.dtype, np.empty_like(host).strides)
    copy[...] = host
    return ndarray(copy, memory, current_id() if device_id is None else device_id)


def call(function, *operands, out=None, **options):
    """Return the result of a NumPy function, on the current device."""
    if out is not None:
        options["out"] = operand(out)
    with np.errstate(all="ignore"):
        result = function(*map(operand, operands), **options)
    return stored(np.asarray(result)) if out is None else out


def operand(value):
    """Return an operand of CuPy as an operand of NumPy.

    Raises:
        TypeError: CuPy doesn't take this type.
        ValueError: it is not on the current device.
    """
    if isinstance(value, ndarray):
        if value._device_id != current_id():
            message = f"The array is on device {value._device_id}, the current device is {current_id()}."
            raise ValueError(message)
        return value._host
    if isinstance(value, int | float | np.generic):
        return value
    message = f"Unsupported type {type(value)}"
    raise TypeError(message)


def _index(key):
    if isinstance(key, ndarray) and key.dtype == bool:
        message = "A boolean index would wait for the GPU, to count its values."
        raise TypeError(message)
    return operand(key) if isinstance(key, ndarray) else key
