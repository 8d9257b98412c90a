"""A stand-in for CuPy where there is no GPU: NumPy's arithmetic behind CuPy's border, on two pretended devices.

It has what ``mbn_cupy`` and the conformance suite use and no more, and it is put first on ``sys.path`` under CuPy's
name. It is as strict as CuPy: a NumPy array is no operand (TypeError), an array does not turn into a NumPy array by
itself (TypeError), and nothing warns of a division by zero. It is stricter where CuPy only warns or only waits: the
operands of an operation have to be on the current device, and no index is boolean. What it cannot show is how CuPy
compiles, rounds and orders its memory.
"""

import threading
from types import SimpleNamespace

import numpy as np

__version__ = "14.2.0+standin"

_DEVICE_COUNT = 2
_current = threading.local()


class Device:
    """A pretended GPU; ``with`` makes it the current one."""

    __hash__ = None

    def __init__(self, device=None):
        self.id = _current_id() if device is None else int(device)
        self._previous = []

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return self.id == other.id if isinstance(other, Device) else NotImplemented

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def __enter__(self):
        self._previous.append(_current_id())
        _current.id = self.id
        return self

    def __exit__(self, *error):
        _current.id = self._previous.pop()


cuda = SimpleNamespace(Device=Device, runtime=SimpleNamespace(getDeviceCount=lambda: _DEVICE_COUNT))


class ndarray:  # noqa: N801 - CuPy's name
    """An array that keeps its values to itself, ``_host``, and says on which device they are pretended to lie."""

    __array_ufunc__ = None  # so that NumPy leaves `numpy_array + x` to this class, which refuses it
    __hash__ = None

    def __init__(self, host, device_id):
        self._host = host
        self._device_id = device_id

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    device = property(lambda self: Device(self._device_id))
    T = property(lambda self: ndarray(self._host.T, self._device_id))
    mT = property(lambda self: ndarray(self._host.mT, self._device_id))  # noqa: N815 - CuPy's name

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
        parts = key if isinstance(key, tuple) else (key,)
        return ndarray(np.asarray(self._host[tuple(map(_index, parts))]), self._device_id)

    def __setitem__(self, key, value):
        _operand(self)[key] = _operand(value)

    def __reduce__(self):
        return asarray, (self.get(),)

    def __deepcopy__(self, memo):
        with self.device:
            return self.copy()

    def get(self):
        return self._host.copy()

    def copy(self):
        return ndarray(self._host.copy(), _current_id())

    def ravel(self):
        return ndarray(self._host.ravel(), self._device_id)

    def astype(self, dtype, *, copy=True):
        if not copy and dtype == self.dtype:
            return self
        return _call(np.ndarray.astype, self, dtype=dtype)


def _operator(ufunc):
    return lambda self, other: _call(ufunc, self, other)


def _reflected(ufunc):
    return lambda self, other: _call(ufunc, other, self)


def _in_place(ufunc):
    return lambda self, other: _call(ufunc, self, other, out=self)


for _name, _ufunc in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "and": np.bitwise_and,
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
ndarray.__neg__ = lambda self: _call(np.negative, self)


def asarray(a, dtype=None):
    """Return ``a`` on the current device: an array itself where it is there already, a copy of anything else."""
    if isinstance(a, ndarray):
        host = a._host
        if a._device_id == _current_id() and (dtype is None or dtype == a.dtype):
            return a
    else:
        host = np.asarray(a)
    return ndarray(host.astype(host.dtype.newbyteorder("=") if dtype is None else dtype), _current_id())


def asnumpy(a):
    return a.get()


def empty_like(prototype, dtype=None):
    return ndarray(np.empty_like(prototype._host, dtype), _current_id())


def zeros_like(a, dtype=None):
    return ndarray(np.zeros_like(a._host, dtype), _current_id())


def zeros(shape, dtype=float):
    return ndarray(np.zeros(shape, dtype), _current_id())


def ones(shape, dtype=float):
    return ndarray(np.ones(shape, dtype), _current_id())


def arange(stop):
    return ndarray(np.arange(stop), _current_id())


def sqrt(x):
    return _call(np.sqrt, x)


def add(x1, x2, out):
    return _call(np.add, x1, x2, out=out)


def subtract(x1, x2, out):
    return _call(np.subtract, x1, x2, out=out)


def where(condition, x, y):
    return _call(np.where, condition, x, y)


def copyto(dst, src, where):
    with np.errstate(all="ignore"):
        np.copyto(*map(_operand, (dst, src)), where=_operand(where))


def argmax(a):
    return _call(np.argmax, a)


def all(a):  # noqa: A001 - CuPy's name
    return _call(np.all, a)


def _call(function, *operands, out=None, **options):
    """Do what NumPy does, on the current device."""
    if out is not None:
        options["out"] = _operand(out)
    with np.errstate(all="ignore"):
        result = function(*map(_operand, operands), **options)
    return ndarray(np.asarray(result), _current_id()) if out is None else out


def _index(key):
    if isinstance(key, ndarray) and key.dtype == bool:
        message = "A boolean index would wait for the GPU, to count its values."
        raise TypeError(message)
    return _operand(key) if isinstance(key, ndarray) else key


def _operand(value):
    if isinstance(value, ndarray):
        if value._device_id != _current_id():
            message = f"The array is on device {value._device_id}, the current device is {_current_id()}."
            raise ValueError(message)
        return value._host
    if isinstance(value, int | float | np.generic):
        return value
    message = f"Unsupported type {type(value)}"
    raise TypeError(message)


def _current_id():
    return getattr(_current, "id", 0)
