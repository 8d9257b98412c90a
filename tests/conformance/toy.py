"""A toy backend, as short as a correct backend can be, in which tests plant bugs."""

from typing import Any

import numpy as np

from mbn.conformance import Transforms
from mbn.contract import Array, Backend, Batch, Capabilities, Kernels, Moments, Params, State, Stats, overlaps_itself


class ToyKernels(Kernels):
    """The shortest correct kernels for NumPy arrays: all results in extended precision, rounded once."""

    def sample_weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        weights = np.ones(shape, dtype)
        for factor in (mask, sample_weight):
            if factor is not None:
                weights = weights * (factor if factor.shape == shape else factor[:, None])
        return weights if lengths is None else np.where(np.arange(shape[1]) < lengths[:, None], weights, 0)

    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        w = spread(weights, x)
        d = np.where(w, x, 0).astype(np.longdouble)
        count = x.size // x.shape[1] if weights is None else w.sum()
        mean = (w * d).sum(axis=over(x)) / (count or 1)
        mean = mean + (w * (d - column(mean, x))).sum(axis=over(x)) / (count or 1)  # makes the mean of a constant exact
        return Moments(count, mean, (w * (d - column(mean, x)) ** 2).sum(axis=over(x)))

    def merge(self, first: Moments, second: Moments) -> Moments:
        (n, mean, m2), (more, other, other_m2) = first, second
        share, d = more / (n + more or 1), other - mean
        return Moments(n + more, mean + d * share, m2 + other_m2 + d * d * n * share)

    def to_vectors(self, moments: Moments, dtype: str) -> tuple[Array, ...]:
        hi = moments.mean.astype(np.float64)
        return hi, (moments.mean - hi).astype(np.float64), moments.m2.astype(np.float64)

    def from_vectors(self, count: Any, vectors: tuple[Array, ...]) -> Moments:
        hi, lo, m2 = vectors
        return Moments(count, hi.astype(np.longdouble) + lo, m2)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (moments.count - correction) if moments.count > correction else 0 * moments.m2

    def xhat(self, batch: Batch, stats: Stats, eps: float) -> tuple[Array, Array]:
        (x, weights, _), (mean, var, _) = batch, stats
        variance = var.astype(np.float64) + eps
        invstd = np.divide(1, np.sqrt(variance), where=variance != 0, out=np.zeros_like(variance))
        d = np.where(spread(weights, x), x, 0) - column(mean.astype(np.longdouble), x)
        return d * column(invstd, x), invstd

    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        (x, weights, _), (weight, bias) = batch, params
        y, _ = self.xhat(batch, stats, eps)
        y = y * column(1.0 if weight is None else weight, x) + column(0.0 if bias is None else bias, x)
        y = np.where(spread(weights, x), y, 0)
        if out is None:
            return like(x, y)
        out[...] = y
        return out

    def lerp(self, start: Array, end: Array, step: Any) -> Array:
        if step == 0:
            return start.copy()
        return ((1 - step) * start.astype(np.float64) + step * end).astype(start.dtype)

    def step(self, momentum: float | None, num_batches_tracked: Any, count: Any, correction: int) -> Any:
        if count <= correction:
            return 0.0
        return 1 / num_batches_tracked if momentum is None else momentum

    def grad_sums(self, dy: Array, batch: Batch, stats: Stats, eps: float) -> tuple[Array, Array]:
        x, weights, _ = batch
        xhat, _ = self.xhat(batch, stats, eps)
        dy = np.where(spread(weights, x), dy, 0).astype(np.float64)
        return dy.sum(axis=over(x)), (dy * xhat).sum(axis=over(x))

    def grad_input(self, dy: Array, batch: Batch, stats: Stats, weight: Any, eps: float, sums: Any) -> Array:
        x, weights, _ = batch
        xhat, invstd = self.xhat(batch, stats, eps)
        w = spread(weights, x)
        dx = np.where(w, dy, 0).astype(np.float64)
        if sums is not None:
            sum_dy, sum_dy_xhat = (column(total / (stats.count or 1), x) for total in sums)
            dx = dx - w * sum_dy - w * xhat * sum_dy_xhat
        dx = column(invstd if weight is None else invstd * weight, x) * dx
        return like(x, np.where(w, dx, 0))


class Toy(Backend):
    """The shortest correct backend for NumPy arrays."""

    name = "toy"
    version = "1"
    kernels = ToyKernels()
    capabilities = Capabilities(
        dtypes=frozenset({"float16", "float32"}),
        devices=("cpu",),
        mutable=True,
        strided=True,
        masks=True,
        any_size=True,
        vmap=True,
        jit=True,
        compile=True,
        modules=True,
        replicas=True,
        out=True,
    )

    def owns(self, x: object) -> bool:
        return isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        if device not in (None, "cpu"):
            message = f"the toy's only device is 'cpu', not {device!r}"
            raise ValueError(message)
        return np.asarray(x, dtype)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def from_dlpack(self, x: Any) -> Array:
        return np.from_dlpack(x)

    def device(self, x: Array) -> Any:
        return "cpu"

    def copy(self, x: Array) -> Array:
        return np.array(x)

    def within(self, values: Array, low: float, high: float) -> bool:
        return bool(np.all((low <= values) & (values < high)))

    def conflict(self, out: Array, x: Array) -> str | None:
        is_same = (out.ctypes.data, out.strides) == (x.ctypes.data, x.strides)
        if overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself"
        return "overlaps x" if np.shares_memory(out, x) and not is_same else None

    def write(self, before: Any, after: Any) -> Any:
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if old is not new]
        if any(old is None or (old.shape, old.dtype) != (new.shape, new.dtype) for old, new in pairs):
            return after
        kept = [old.copy() for old, _ in pairs]
        try:
            for old, new in pairs:
                old[...] = new
        except BaseException:
            for (old, _), value in zip(pairs, kept, strict=True):
                old[...] = value
            raise
        return before

    def module(self, layer: Any, adopt: Any) -> Any:
        return ToyModule(self, layer, adopt)


class ToyModule:
    def __init__(self, backend: Backend, layer: Any, adopt: Any) -> None:
        self.backend, self.layer, self.training = backend, layer, layer.training
        adopt(layer.params, State(*(None if value is None else np.array(value) for value in layer.state)))
        for name, value in {**layer.params._asdict(), **layer.state._asdict()}.items():
            setattr(self, name, value)

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def __call__(self, x: Any, **masking: Any) -> Array:
        params = Params(self.weight, self.bias)
        before = State(self.running_mean, self.running_var, self.num_batches_tracked)
        y, after = self.layer.apply(params, before, x, training=self.training, **masking)
        self.backend.write(before, after)
        return y


def over(x: Array) -> tuple[int, ...]:
    return (0, 2)[: x.ndim - 1]


def column(vector: Any, x: Array) -> Array:
    return np.reshape(vector, (-1,) + (1,) * (x.ndim - 2))


def like(x: Array, values: Array) -> Array:
    result = np.empty_like(x)
    result[...] = values
    return result


def spread(weights: Any, x: Array) -> Array:
    return np.ones((1,) * x.ndim) if weights is None else np.expand_dims(weights.astype(np.float64), 1)


# NumPy has no transformations: a loop stands for vmap, and the function itself for a compiled one.


def looped(function: Any) -> Any:
    def call(*arguments: Array) -> Any:
        results = [function(*slices) for slices in zip(*arguments, strict=True)]
        return tuple(map(np.stack, zip(*results, strict=True)))

    return call


def unchanged(function: Any) -> Any:
    return function


TRANSFORMS = Transforms(vmap=looped, jit=unchanged, compile=unchanged)
