"""Batch normalisation of the arrays of any library that follows the Python array API standard.

It is the base of small backends, which add little more than a name. All operations are on arrays: in float64, or, where
a library or a device has no float64, in pairs of float32, which have twice its digits.

Source: the Python array API standard, https://data-apis.org/array-api/latest.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Array, Backend, Batch, Capabilities, Kernels, Moments, Params, Stats, dtype_name

_SPLIT = 4097.0
"""2**12 + 1, the factor by which the digits of a float32 are split into two halves."""
_HAVE_FLOAT64: dict[tuple[Any, str], bool] = {}
"""By library and device: whether it has float64."""


class Pair:
    """Numbers with twice the digits of float32: ``hi + lo``, where hi is the sum rounded to float32.

    Source: Dekker, A Floating-Point Technique for Extending the Available Precision, 1971.
    """

    def __init__(self, hi: Array, lo: Array | float = 0.0) -> None:
        """Make pairs of two parts, which are not renormalized."""
        self.hi, self.lo = hi, lo

    def __neg__(self) -> "Pair":
        """Return the negative numbers."""
        return Pair(-self.hi, -self.lo)

    def __add__(self, other: "Number | float") -> "Pair":
        """Return sums."""
        other = _pair(other)
        total, rest = _two_sum(self.hi, other.hi)
        return _renormalized(total, rest + (self.lo + other.lo))

    __radd__ = __add__

    def __sub__(self, other: "Number | float") -> "Pair":
        """Return differences."""
        return self + -_pair(other)

    def __rsub__(self, other: "Number | float") -> "Pair":
        """Return ``other - self``."""
        return _pair(other) + -self

    def __mul__(self, other: "Number | float") -> "Pair":
        """Return products."""
        other = _pair(other)
        product, rest = _two_product(self.hi, other.hi)
        return _renormalized(product, rest + (self.hi * other.lo + self.lo * other.hi))

    __rmul__ = __mul__

    def __truediv__(self, other: "Number | float") -> "Pair":
        """Return quotients."""
        other = _pair(other)
        quotient = self.hi / other.hi
        rest = self - other * quotient
        return _renormalized(quotient, rest.hi / other.hi)

    def __rtruediv__(self, other: float) -> "Pair":
        """Return ``other / self``."""
        dividend = _pair(other)
        return Pair(0 * self.hi + dividend.hi, dividend.lo) / self


Number: TypeAlias = Array | Pair
"""An array of float64, or pairs of float32."""


class Mean(NamedTuple):
    """A mean as the unevaluated sum of two numbers for each channel, since float64 input needs its digits."""

    hi: Number
    lo: Number


class ArrayAPIKernels(Kernels):
    """Kernels that operate on arrays, in the namespace of their arguments.

    All operations on values that count are differentiable, so a library with autograd needs :meth:`constant` alone.
    """

    def constant(self, x: Array) -> Array:
        """Return x as a constant to differentiation; a library with autograd overrides this method."""
        return x

    def moments(self, batch: Batch) -> Moments:
        """Return the statistics of each channel.

        Sums of x and x**2 lose all their digits where the mean is large. Sums of x - shift do not if the shift is near
        the mean: a value of the channel is near enough to find the mean, and sums around that mean give the remaining
        digits. A constant channel is exact, since its deviations are 0.
        """
        x, sample_weight, _ = batch
        xp = _namespace(x)
        rows = _each(_rows, _wide(x))
        # The shift cancels out, so no derivative passes through it.
        constant, counts = _each(self.constant, rows), None
        if sample_weight is None:
            count, shift = x.size // x.shape[1], _exact(_leading(constant)[:, 0])
        else:
            counts = _each(lambda part: xp.reshape(part, (1, -1)), _wide(sample_weight))
            count = _each(lambda part: part[0], _sum(counts))
            is_value = _leading(counts) > 0
            largest = xp.max(xp.where(is_value, _leading(constant), -xp.inf), axis=1)  # a value that counts
            shift = _exact(xp.where(xp.any(is_value), largest, 0.0))

        def deviations(rows: Number, shift: Number) -> Number:
            d = rows - _each(lambda part: part[:, None], shift)
            return d if counts is None else _where(is_value, d, 0.0)

        def weighted(values: Number) -> Number:
            return values if counts is None else values * counts

        shift = shift + _ratio(_sum(weighted(deviations(constant, shift))), count)
        d = deviations(rows, shift)
        once = weighted(d)
        total = _sum(once)
        return Moments(count, Mean(shift, _ratio(total, count)), _sum(d * once) - _ratio(total * total, count))

    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: None = None) -> Array:
        x, (weight, bias) = batch.x, params
        y = _xhat(batch, stats, eps)
        if weight is not None:
            y = y * _column(_wide(weight), x)
        if bias is not None:
            y = y + _column(_wide(bias), x)
        return _narrow(_masked(y, batch), x.dtype)  # the only rounding to x's dtype

    def grad_sums(self, dy: Array, batch: Batch, stats: Stats, eps: float) -> tuple[Array, Array]:
        gradient = _masked(_wide(dy), batch)
        products = gradient * _xhat(batch, stats, eps)
        return _sum(_each(_rows, gradient)), _sum(_each(_rows, products))

    def grad_input(
        self, dy: Array, batch: Batch, stats: Stats, weight: Array | None, eps: float, sums: tuple[Array, Array] | None
    ) -> Array:
        x, sample_weight, _ = batch
        dx = _masked(_wide(dy), batch)
        if sums is not None:
            mean_dy, mean_dy_xhat = (_column(_ratio(total, stats.count), x) for total in sums)
            projection = mean_dy + _xhat(batch, stats, eps) * mean_dy_xhat
            dx = dx - (projection if sample_weight is None else projection * _against(_wide(sample_weight)))
        scale = _invstd(stats.var, eps)
        if weight is not None:
            scale = scale * _wide(weight)
        return _narrow(dx * _column(scale, x), x.dtype)

    def sample_weights(
        self, shape: tuple[int, ...], dtype: str, mask: Array | None, lengths: Array | None, sample_weight: Array | None
    ) -> Array:
        given = next(values for values in (mask, lengths, sample_weight) if values is not None)
        xp = _namespace(given)

        def aligned(values: Array) -> Array:
            return xp.reshape(values, (*values.shape, *[1] * (len(shape) - values.ndim)))

        weights = xp.ones(shape, dtype=getattr(xp, dtype), **_place(given))
        if sample_weight is not None:
            is_weight = (sample_weight >= 0) & (sample_weight < xp.inf)  # a traced one has not been checked
            weights = weights * aligned(xp.astype(xp.where(is_weight, sample_weight, xp.nan), weights.dtype))
        if mask is not None:
            weights = xp.where(aligned(mask), weights, 0.0)
        if lengths is not None:
            positions = xp.arange(shape[1], dtype=lengths.dtype, **_place(given))
            weights = xp.where(positions < aligned(lengths), weights, 0.0)
            is_length = aligned((lengths >= 0) & (lengths <= shape[1]))
            weights = xp.where(is_length, weights, xp.nan)
        if not has_float64(xp, _device(weights)):  # sums and products of pairs have the range of float32
            is_large = xp.any(weights > 2.0**100)
            weights = xp.where(is_large & (weights > 0), weights * 2.0**-40 + 2.0**-100, weights)
        return weights

    def merge(self, first: Moments, second: Moments) -> Moments:
        (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
        total = count + more
        difference = (other_hi - hi) + (other_lo - lo)
        step = _ratio(difference * more, total)
        change = lo + step
        mean = hi + change
        rest = change - (mean - hi)  # the rounding error of the mean, for the pair
        return Moments(total, Mean(mean, rest), m2 + (more_m2 + difference * step * count))

    def to_vectors(self, moments: Moments, dtype: str) -> tuple[Array, ...]:
        numbers = [_each(lambda part: part, number) for number in (*moments.mean, moments.m2)]
        return tuple(chain(*((number.hi, number.lo) if isinstance(number, Pair) else (number,) for number in numbers)))

    def from_vectors(self, count: Any, vectors: tuple[Array, ...]) -> Moments:
        is_pairs = len(vectors) == 6
        hi, lo, m2 = map(Pair, vectors[::2], vectors[1::2]) if is_pairs else vectors
        return Moments(count, Mean(hi, lo), m2)

    def variance(self, moments: Moments, correction: int) -> Number:
        return _ratio(moments.m2, moments.count - correction)

    def step(self, momentum: float | None, num_batches_tracked: Array | None, count: Any, correction: int) -> Any:
        step = 1 / _wide(num_batches_tracked) if momentum is None else momentum
        if isinstance(count, int | float):  # a float is the count of replicas without a value
            return step if isinstance(count, int) or count > correction else 0.0
        lacks_variance = _leading(count) <= correction  # not so if it is NaN
        return _where(~lacks_variance, 0.0 * count + step, 0.0)

    def lerp(self, start: Array, end: Any, step: Any) -> Array:
        xp = _namespace(start)
        end = _each(self.constant, end.hi + end.lo if isinstance(end, Mean) else _wide(end))
        moved = _narrow(_wide(start) * (1 - step) + end * step, start.dtype)
        if isinstance(step, int | float):
            return xp.asarray(start, copy=True) if step == 0 else moved
        return xp.where(_leading(step) == 0, start, moved)  # with a step of 0, end may be NaN


class ArrayAPIBackend(Backend):
    """The backend of a library's arrays, over its namespace."""

    namespace: Any
    """The module of the library, as its arrays' ``__array_namespace__`` returns it."""
    kernels = ArrayAPIKernels()

    def __init__(self, namespace: Any = None, name: str | None = None) -> None:
        """Make the backend of a library that has none; a subclass has namespace and name as attributes instead."""
        if namespace is not None:
            self.namespace = namespace
        if name is not None:
            self.name = name  # type: ignore[misc]

    @property
    def version(self) -> str:
        return str(getattr(self.namespace, "__version__", "unknown"))

    @cached_property
    def capabilities(self) -> Capabilities:
        info = self.namespace.__array_namespace_info__()
        floating = info.dtypes(kind="real floating")
        return Capabilities(
            dtypes=frozenset(name for name in ("float32", "float64") if name in floating),
            devices=tuple(map(self.device_name, info.devices())),
            mutable=True,
            strided=False,  # the standard has no memory orders
            masks=True,
            replicas="float64" in floating,
        )

    def owns(self, x: object) -> bool:
        namespace = getattr(type(x), "__array_namespace__", None)
        return namespace is not None and namespace(x) is self.namespace

    def device_name(self, device: Any) -> str:
        """Return the name of a device; ``asarray`` takes it."""
        return str(device)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        xp = self.namespace
        info = xp.__array_namespace_info__()
        if dtype not in (None, "int64") and dtype not in (known := info.dtypes(kind=None)):
            raise TypeError(f"{self.name} has no dtype {dtype}; it has {', '.join(known)}.")
        if isinstance(device, str):
            devices = {self.device_name(known): known for known in info.devices()}
            if device not in devices:
                raise ValueError(f"the devices of {self.name} are {', '.join(devices)}, not {device!r}.")
            device = devices[device]
        x = x.hi if isinstance(x, Pair) else x
        given = dtype or (dtype_name(x.dtype) if hasattr(x, "dtype") else None)
        where = x.device if device is None and self.owns(x) else device
        if given == "int64" and given not in info.dtypes(device=where, kind=None):
            dtype = "int32"  # a count, where the library has no larger integers
        return xp.asarray(x, dtype=None if dtype is None else getattr(xp, dtype), device=device)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.from_dlpack(x)

    def device(self, x: Array) -> Any:
        return x.device

    def copy(self, x: Array) -> Array:
        return self.namespace.asarray(x, copy=True)

    def concatenated(self, parts: Sequence[Any]) -> Array:
        xp = self.namespace
        own = next(part for part in parts if self.owns(part))
        dtype = "float64" if has_float64(xp, _device(own)) else "float32"
        wide = (self.asarray(part, dtype, None if self.owns(part) else self.device(own)) for part in parts)
        return xp.concat([xp.reshape(part, (-1,)) for part in wide])

    def within(self, values: Array, low: float, high: float) -> bool | None:
        values = _leading(_wide(values))
        return bool(self.namespace.all((low <= values) & (values < high)))


def _namespace(x: Array) -> Any:
    return x.__array_namespace__()


def _device(x: Array) -> Any:
    """Return the device that computes on x."""
    return x.device if hasattr(x, "device") else _namespace(x).__array_namespace_info__().default_device()


def _place(x: Array) -> dict[str, Any]:
    """Return the arguments that create an array on the device of x."""
    return {"device": x.device} if hasattr(x, "device") else {}


def has_float64(xp: Any, device: Any) -> bool:
    """Tell whether a device of a library has float64."""
    key = xp, str(device)  # equal devices of MLX have different hashes
    if key not in _HAVE_FLOAT64:
        _HAVE_FLOAT64[key] = "float64" in xp.__array_namespace_info__().dtypes(device=device, kind="real floating")
    return _HAVE_FLOAT64[key]


def _wide(x: Number) -> Number:
    """Return numbers in float64, or as pairs where there is no float64."""
    if isinstance(x, Pair):
        return x
    xp = _namespace(x)
    return xp.astype(x, xp.float64) if has_float64(xp, _device(x)) else Pair(xp.astype(x, xp.float32))


def _exact(x: Array) -> Number:
    """Return numbers of the widest dtype as they are, or as pairs where there is no float64."""
    return x if has_float64(_namespace(x), _device(x)) else Pair(x)


def _narrow(x: Number, dtype: Any) -> Array:
    x = x.hi if isinstance(x, Pair) else x
    return _namespace(x).astype(x, dtype)


def _leading(x: Number) -> Array:
    """Return the leading parts, which comparisons use."""
    return x.hi if isinstance(x, Pair) else x


def _dtype_of(x: Number) -> Any:
    return _leading(x).dtype


def _each(function: Any, x: Number) -> Number:
    """Apply a function that rearranges numbers to each part of them."""
    return Pair(function(x.hi), function(x.lo + 0 * x.hi)) if isinstance(x, Pair) else function(x)


def _where(condition: Array, x: Number, other: Array | float) -> Number:
    xp = _namespace(condition)
    if isinstance(x, Pair):
        return Pair(xp.where(condition, x.hi, other), xp.where(condition, x.lo + 0 * x.hi, 0.0))
    return xp.where(condition, x, other)


def _pair(x: "Number | float") -> Pair:
    """Return a number of Python, which has the digits of float64, or an array of float32 as a pair."""
    if not isinstance(x, int | float):
        return x if isinstance(x, Pair) else Pair(x)
    hi = float(np.float32(x))
    return Pair(hi, x - hi if np.isfinite(hi) else 0.0)


def _two_sum(a: Array, b: Array | float) -> tuple[Array, Array]:
    """Return a sum and its rounding error.

    Source: Knuth, The Art of Computer Programming, volume 2, 4.2.2, theorem B.
    """
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: Array | float) -> tuple[Array, Array]:
    """Return a product and its rounding error. Source: Dekker, 1971."""
    product = a * b
    (a_hi, a_lo), (b_hi, b_lo) = _halves(a), _halves(b)
    return product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo


def _halves(a: Array | float) -> tuple[Any, Any]:
    if isinstance(a, int | float):  # its halves are those of a float32, too
        hi, lo = _halves(np.asarray(a, np.float32))
        return float(hi), float(lo)
    large = _SPLIT * a
    hi = large - (large - a)
    return hi, a - hi


def _renormalized(hi: Array, lo: Array) -> Pair:
    total = hi + lo
    return Pair(total, lo - (total - hi))


def _xhat(batch: Batch, stats: Stats, eps: float) -> Number:
    """Return (x - mean) / sqrt(var + eps); 0 where var + eps or the weight of a sample is 0."""
    x = batch.x
    parts = stats.mean if isinstance(stats.mean, Mean) else (_wide(stats.mean),)
    d = _wide(x)
    for part in parts:
        d = d - _column(part, x)
    return _masked(d, batch) * _column(_invstd(stats.var, eps), x)


def _invstd(var: Number, eps: float) -> Number:
    spread = _wide(var) + eps
    is_spread = _leading(spread) != 0
    numerator = _exact(_namespace(is_spread).astype(is_spread, _dtype_of(spread)))
    return numerator / _sqrt(_where(is_spread, spread, 1.0))


def _sqrt(x: Number) -> Number:
    xp = _namespace(_leading(x))
    if not isinstance(x, Pair):
        return xp.sqrt(x)
    root = xp.sqrt(x.hi)
    rest = x - Pair(root) * Pair(root)
    is_finite = xp.isfinite(root) & (root > 0)
    change = xp.where(is_finite, rest.hi, 0.0) / xp.where(is_finite, 2 * root, 1.0)
    return _renormalized(root, change)


def _masked(values: Number, batch: Batch) -> Number:
    """Return values, (N, C) or (N, C, L), with 0 where the weight of a sample is 0, and NaN where it is NaN."""
    if batch.sample_weight is None:
        return values
    weight = _leading(_against(batch.sample_weight))
    return _where(weight > 0, values, 0.0 * weight)


def _against(weight: Number) -> Number:
    """Return sample weights, (N,) or (N, L), as (N, 1) or (N, 1, L)."""
    return _each(lambda part: part[:, None, ...], weight)


def _ratio(total: Number, count: Any) -> Number:
    """Return total / count, and 0 where the count is too small for a mean or a variance: 0 or less."""
    if isinstance(count, int | float):
        return total / count if count > 0 else total * 0.0
    has_values = ~(_leading(count) <= 0)  # so it is if the count is NaN
    return _where(has_values, total, 0.0) / _where(has_values, count, 1.0)


def _sum(rows: Number) -> Number:
    """Return the sum of each row, by adding the second half to the first until one column is left.

    So the bits are the same at every call and for every number of threads, and the error grows with the logarithm of
    the number of terms.
    """
    xp = _namespace(_leading(rows))
    while (length := _leading(rows).shape[1]) > 1:
        half = length // 2
        first, second, last = (
            _each(lambda part, at=at: part[:, at], rows)
            for at in (slice(half), slice(half, 2 * half), slice(2 * half, length))
        )
        rows = first + second
        if length % 2:
            rows = (
                Pair(*(xp.concat([getattr(part, name) for part in (rows, last)], axis=1) for name in ("hi", "lo")))
                if isinstance(rows, Pair)
                else xp.concat([rows, last], axis=1)
            )
    return _each(lambda part: part[:, 0], rows)


def _rows(x: Array) -> Array:
    """Return x, (N, C) or (N, C, L), as one row for each channel."""
    xp = _namespace(x)
    return xp.reshape(xp.moveaxis(x, 1, 0), (x.shape[1], -1))


def _column(vector: Number, x: Array) -> Number:
    """Return a (C,) vector in the shape that broadcasts against x."""
    xp = _namespace(x)
    return _each(lambda part: xp.reshape(part, (-1, *[1] * (x.ndim - 2))), vector)
