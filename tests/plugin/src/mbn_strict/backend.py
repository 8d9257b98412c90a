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
    # A framework that differentiates, vectorises, traces or compiles has rules of its own for what follows: whoever
    # declares autograd, vmap, jit or compile writes the transformation of that name too.
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "float64"}),
        devices=("CPU_DEVICE", "device1", "device2"),  # the other two have no float64 to compute in
        mutable=True,
        strided=False,  # the Array API has no memory order
        masks=True,
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

    def copy(self, x: Array) -> Array:
        return xp.asarray(x, copy=True)

    # How often each value counts. One of weight 0 may be NaN, so it has to be replaced: to multiply it by 0 is no use.

    def weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: Array | None,
        lengths: Array | None,
        sample_weight: Array | None,
    ) -> Array:
        device = next(given.device for given in (mask, lengths, sample_weight) if given is not None)
        weights = xp.ones(shape, dtype=_DTYPES[dtype], device=device)
        if sample_weight is not None:
            weights = weights * _aligned(xp.astype(sample_weight, weights.dtype), shape)
        if mask is not None:
            weights = xp.where(_aligned(mask, shape), weights, 0.0)
        if lengths is not None:
            steps = xp.arange(shape[1], dtype=xp.int64, device=device)
            weights = xp.where(steps < _aligned(xp.astype(lengths, xp.int64), shape), weights, 0.0)
        return weights

    def within(self, values: Array, low: float, high: float) -> bool:
        # Decision: a framework that traces cannot tell while it does so. Return None then, and let `weights` give NaN
        # for what is not allowed.
        values = _wide(values)
        return bool(xp.all((low <= values) & (values < high)))

    # The arithmetic. x is (N, C) or (N, C, L) and is checked already.

    def moments(self, x: Array, weights: Array | None = None) -> Moments:
        rows = _rows(_wide(x))
        # Decision: the form of the count. Without weights it is an int, as the contract wants; with weights it is an
        # array here, since to make a number of it may have to wait for a device.
        if weights is None:
            counts = xp.ones(rows.shape[1:], dtype=xp.float64, device=x.device)
            count = rows.shape[1]
        else:
            counts = xp.reshape(_wide(weights), (-1,))
            count = _sum(counts[None, :])[0]
        # Sums of x and x**2 lose all their digits where the mean is large. Sums of x - shift do not if the shift is
        # near the mean: any value that counts is near enough to find the mean to float64's precision, and exactly where
        # all values are the same; around this mean, the second sums find the digits that float64 could not hold.
        heaviest = xp.take(rows, xp.argmax(counts, keepdims=True), axis=1)[:, 0]
        shift = xp.where(xp.any(counts > 0), heaviest, 0.0)
        shift = shift + _ratio(_sum(_deviations(rows, shift, counts) * counts), count)
        d = _deviations(rows, shift, counts)
        total = _sum(d * counts)
        m2 = _sum(d * d * counts) - _ratio(total * total, count)
        return Moments(count, Mean(shift, _ratio(total, count)), m2)

    def merge(self, first: Moments, second: Moments) -> Moments:
        (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
        total = count + more
        difference = (other_hi - hi) + (other_lo - lo)
        step = _ratio(difference * more, total)
        change = lo + step
        mean = hi + change
        rest = change - (mean - hi)  # what rounding took off: the pair has it still
        return Moments(total, Mean(mean, rest), m2 + (more_m2 + difference * step * count))

    def variance(self, moments: Moments, correction: int) -> Array:
        return _ratio(moments.m2, moments.count - correction)

    def normalize(
        self,
        x: Array,
        mean: Any,
        var: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        weights: Array | None = None,
    ) -> Array:
        y = _xhat(x, mean, var, eps, weights)
        if weight is not None:
            y = y * _column(_wide(weight), x)
        if bias is not None:
            y = y + _column(_wide(bias), x)
        return xp.astype(_masked(y, weights), x.dtype)  # the only rounding that float32 sees

    def lerp(self, start: Array, end: Any, weight: Any) -> Array:
        end = end.hi + end.lo if isinstance(end, Mean) else _wide(end)
        weight = xp.asarray(weight, dtype=xp.float64, device=start.device)
        moved = xp.astype((1 - weight) * _wide(start) + weight * end, start.dtype)
        return xp.where(weight == 0, start, moved)  # end may be anything then

    def step(self, momentum: float | None, num_batches_tracked: Array | None, count: Any, correction: int) -> Any:
        weight = 1 / _wide(num_batches_tracked) if momentum is None else momentum
        return weight if isinstance(count, int) else weight * _wide(count > correction)

    # The gradient, by hand. A backend whose framework differentiates needs it all the same: for `vjp`.

    def grad_sums(
        self, dy: Array, x: Array, mean: Any, var: Array, eps: float, weights: Array | None = None
    ) -> tuple[Array, Array]:
        dy = _masked(_wide(dy), weights)
        return _sum(_rows(dy)), _sum(_rows(dy * _xhat(x, mean, var, eps, weights)))

    def grad_input(
        self,
        dy: Array,
        x: Array,
        mean: Any,
        var: Array,
        weight: Array | None,
        eps: float,
        sums: tuple[Array, Array] | None,
        count: Any,
        weights: Array | None = None,
    ) -> Array:
        dx = _masked(_wide(dy), weights)
        if sums is not None:
            mean_dy, mean_dy_xhat = (_column(_ratio(total, count), x) for total in sums)
            w = 1.0 if weights is None else _wide(weights)[:, None, ...]
            dx = dx - w * mean_dy - w * _xhat(x, mean, var, eps, weights) * mean_dy_xhat
        scale = _invstd(var, eps)
        if weight is not None:
            scale = scale * _wide(weight)
        return xp.astype(dx * _column(scale, x), x.dtype)


def _wide(x: Array) -> Array:
    return xp.astype(x, xp.float64)


def _xhat(x: Array, mean: Any, var: Array, eps: float, weights: Array | None) -> Array:
    """Return (x - mean) / sqrt(var + eps) in float64; 0 where var + eps or the weight of a value is 0."""
    hi, lo = mean if isinstance(mean, Mean) else (_wide(mean), xp.zeros_like(_wide(mean)))
    return _masked(_wide(x) - _column(hi, x) - _column(lo, x), weights) * _column(_invstd(var, eps), x)


def _invstd(var: Array, eps: float) -> Array:
    spread = _wide(var) + eps
    return 1 / xp.sqrt(xp.where(spread == 0, xp.inf, spread))


def _masked(values: Array, weights: Array | None) -> Array:
    """Return values, (N, C) or (N, C, L), with 0 in all places of weight 0."""
    return values if weights is None else xp.where(weights[:, None, ...] > 0, values, 0.0)


def _deviations(rows: Array, shift: Array, counts: Array) -> Array:
    """Return the values of each row less its shift, and 0 for those that do not count."""
    return xp.where(counts > 0, rows - shift[:, None], 0.0)


def _ratio(total: Array, count: Any) -> Array:
    """Return total / count, and 0 where the count is too small for a mean or a variance: 0 or less."""
    count = xp.asarray(count, dtype=xp.float64, device=total.device)
    return xp.where(count > 0, total, 0.0) / xp.where(count > 0, count, 1.0)


def _sum(rows: Array) -> Array:
    """Return the sum of each row, by adding the second half to the first until one column is left.

    Decision: a sum has to give the same bits on every run and for every number of threads, and its error must not grow
    with the number of terms. If the framework's own sum promises that for every memory order, use that.
    """
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = xp.concat([rows[:, :half] + rows[:, half : 2 * half], rows[:, 2 * half :]], axis=1)
    return rows[:, 0]


def _rows(x: Array) -> Array:
    """Return x, (N, C) or (N, C, L), as one row for each channel."""
    return xp.reshape(xp.moveaxis(x, 1, 0), (x.shape[1], -1))


def _column(vector: Array, x: Array) -> Array:
    """Return a (C,) vector in the shape that broadcasts against x."""
    return xp.reshape(vector, (-1, *[1] * (x.ndim - 2)))


def _aligned(values: Array, shape: tuple[int, ...]) -> Array:
    """Return values for each sample or place in the shape that broadcasts to ``shape``."""
    return xp.reshape(values, (*values.shape, *[1] * (len(shape) - values.ndim)))
