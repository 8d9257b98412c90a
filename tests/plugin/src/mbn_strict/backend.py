"""Batch normalisation of array_api_strict arrays, and the template of a backend.

It has to give the same numbers as every other backend in the least code that does, so it computes everything in
float64 and on whole arrays; a backend made for speed works on blocks that fit the processor's caches.
"""

from typing import Any, ClassVar, NamedTuple

import array_api_strict as xp
import numpy as np

from mbn.contract import Array, Backend, Capabilities, Moments

_StrictArray = type(xp.empty(0))  # the class has no public name
_DTYPES = xp.__array_namespace_info__().dtypes()


class Mean(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors.

    Decision: the form of a mean is the backend's own business, and needs more digits than x has. One float64 vector is
    enough where x is float32 at most; float64 inputs need a pair.
    """

    hi: Array
    lo: Array


class StrictBackend(Backend):
    """The backend of array_api_strict arrays."""

    name: ClassVar[str] = "strict"

    # Decision: promise here what the framework can do on this machine, and no more; the suite tests all of it. If that
    # has to be found out, do so in __init__, and raise there if the framework cannot work at all (no GPU, say).
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "float64"}),
        devices=("CPU_DEVICE", "device1", "device2"),  # the other two have no float64 to compute in
        mutable=True,
        strided=False,  # the Array API has no memory order
    )
    version = xp.__version__

    def owns(self, x: object) -> bool:
        return isinstance(x, _StrictArray)

    # The border. Only here do NumPy arrays and the framework's meet.

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        # Decision: what `device` may be. The names in the capabilities and whatever `device(x)` returns have to work.
        if device is not None and not isinstance(device, xp.Device):
            device = xp.Device(device)  # a ValueError for a name that it does not know
        if dtype is not None and dtype not in _DTYPES:
            message = f"array_api_strict has no dtype {dtype}."
            raise TypeError(message)
        return xp.asarray(x, dtype=None if dtype is None else _DTYPES[dtype], device=device)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.from_dlpack(x)

    def device(self, x: Array) -> xp.Device:
        return x.device

    # The arithmetic. x is (N, C) or (N, C, L) and is checked already.

    def moments(self, x: Array) -> Moments:
        rows = xp.reshape(xp.moveaxis(_wide(x), 1, 0), (x.shape[1], -1))
        count = rows.shape[1]
        # Sums of x and x**2 lose all their digits where the mean is large. Sums of x - shift do not if the shift is
        # near the mean: the first value is near enough to find the mean to float64's precision, and exactly where all
        # values are the same; around this mean, the second sums find the digits that float64 could not hold.
        shift = rows[:, 0]
        shift = shift + _sum(rows - shift[:, None]) / count
        rows = rows - shift[:, None]
        total = _sum(rows)
        return Moments(count, Mean(shift, total / count), _sum(rows * rows) - total * total / count)

    def normalize(self, x: Array, mean: Any, var: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
        hi, lo = mean if isinstance(mean, Mean) else (_wide(mean), xp.zeros_like(_wide(mean)))
        spread = _wide(var) + eps
        scale = 1 / xp.sqrt(xp.where(spread == 0, xp.inf, spread))  # a scale of 0 leaves the bias alone
        if weight is not None:
            scale = scale * _wide(weight)
        y = (_wide(x) - _column(hi, x) - _column(lo, x)) * _column(scale, x)
        if bias is not None:
            y = y + _column(_wide(bias), x)
        return xp.astype(y, x.dtype)  # the only rounding that float32 sees

    def lerp(self, start: Array, end: Any, weight: Any) -> Array:
        end = end.hi + end.lo if isinstance(end, Mean) else _wide(end)
        return xp.astype((1 - weight) * _wide(start) + weight * end, start.dtype)

    def reciprocal(self, count: Array) -> Array:
        return 1 / _wide(count)


def _wide(x: Array) -> Array:
    return xp.astype(x, xp.float64)


def _sum(rows: Array) -> Array:
    """Return the sum of each row, by adding the second half to the first until one column is left.

    Decision: a sum has to give the same bits on every run and for every number of threads, and its error must not grow
    with the number of terms. If the framework's own sum promises that for every memory order, use that.
    """
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = xp.concat([rows[:, :half] + rows[:, half : 2 * half], rows[:, 2 * half :]], axis=1)
    return rows[:, 0]


def _column(vector: Array, x: Array) -> Array:
    """Return a (C,) vector in the shape that broadcasts against x."""
    return xp.reshape(vector, (-1, *[1] * (x.ndim - 2)))
