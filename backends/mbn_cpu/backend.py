"""The border and the kernels on host memory: what its backends have in common, which is all but the passes over x.

Everything is on the host, so the border is a cast at most.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from mbn.contract import (
    Backend,
    Batch,
    Capabilities,
    Kernels,
    Moments,
    Operation,
    Params,
    Stats,
    numpy_dtype,
    overlaps_itself,
)
from mbn_cpu import channel_stats
from mbn_cpu.kernels import out_of_range


class HostKernels(Kernels):
    """Kernels of NumPy arrays, made of the passes over x of a module."""

    def __init__(self, passes: ModuleType, at_once: ModuleType | None = None) -> None:
        """Take the four passes from a module, and whole steps from another, if any.

        Of the passes, ``normalize`` takes a ``Line``. Channels beyond their range are computed apart.
        """
        self.passes = passes
        if at_once is not None:
            self.train, self.evaluate, self.pullback = at_once.train, at_once.evaluate, at_once.pullback

    def moments(self, batch: Batch) -> Moments:
        x, weights = _widened(batch.x, batch), batch.sample_weight
        found = self.passes.moments(x, weights)
        if not channel_stats.is_wide(x):
            return found
        with np.errstate(all="ignore"):
            return out_of_range.moments(self.passes.moments, x, weights, found)

    @np.errstate(all="ignore")
    def normalize(
        self, batch: Batch, stats: Stats, params: Params, eps: float, out: np.ndarray | None = None
    ) -> np.ndarray:
        x, weights, (mean, var, _), (weight, bias) = np.asarray(batch.x), batch.sample_weight, stats, params
        line = channel_stats.line(mean, var, weight, bias, eps, channel_stats.compute_dtype(x))
        channels = out_of_range.of_line(line, mean, var, weight, eps)
        if channels is None:
            return self.passes.normalize(x, line, weights, out)
        values = out_of_range.normalize(x, channels, mean, var, weight, bias, eps, weights)  # before x is written to
        y = self.passes.normalize(x, line, weights, out)
        y[:, channels] = values
        return y

    def grad_sums(self, dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
        dy, batch = _widened(dy, batch), batch._replace(x=_widened(batch.x, batch))
        sums = self.passes.grad_sums(dy, batch, stats, eps)
        if _has_room(batch.x, stats.mean):
            return sums
        with np.errstate(all="ignore"):
            channels = out_of_range.of_sums(sums, stats.var, eps)
            if channels is not None:
                of_channels = out_of_range.grad_sums(self.passes.grad_sums, dy, batch, channels, stats, eps)
                for total, own in zip(sums, of_channels, strict=True):
                    total[channels] = own
        return sums

    def grad_input(
        self,
        dy: np.ndarray,
        batch: Batch,
        stats: Stats,
        weight: np.ndarray | None,
        eps: float,
        sums: tuple[np.ndarray, np.ndarray] | None,
    ) -> np.ndarray:
        dy, batch = np.asarray(dy), batch._replace(x=np.asarray(batch.x))
        dx = self.passes.grad_input(dy, batch, stats, weight, eps, sums)
        if _has_room(batch.x, stats.mean, weight):
            return dx
        with np.errstate(all="ignore"):
            channels = out_of_range.of_factors(sums, stats.var, weight, eps, stats.count)
            if channels is not None:
                kernel = self.passes.grad_sums
                dx[:, channels] = out_of_range.grad_input(kernel, dy, batch, channels, stats, weight, eps)
        return dx

    @np.errstate(all="ignore")
    def sample_weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: np.ndarray | None,
        lengths: np.ndarray | None,
        sample_weight: np.ndarray | None,
    ) -> np.ndarray:
        return channel_stats.FORMULAS.sample_weights(shape, dtype, mask, lengths, sample_weight)

    @np.errstate(all="ignore")
    def merge(self, first: Moments, second: Moments) -> Moments:
        return channel_stats.FORMULAS.merge(first, second)

    def variance(self, moments: Moments, correction: int) -> channel_stats.Variance:
        return channel_stats.FORMULAS.variance(moments, correction)

    def step(
        self, momentum: float | None, num_batches_tracked: np.ndarray | None, count: float, correction: int
    ) -> float:
        return channel_stats.step(momentum, num_batches_tracked, count, correction)

    @np.errstate(all="ignore")
    def lerp(self, start: np.ndarray, end: channel_stats.Mean | channel_stats.Variance, step: float) -> np.ndarray:
        return channel_stats.lerp(start, end, step)


class HostBackend(Backend):
    """A backend of NumPy arrays."""

    kernels: HostKernels
    fast: ModuleType
    """The whole of a step at once, for those batches that it ``takes``."""
    fused: HostKernels
    """Kernels with these steps."""

    capabilities = Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        devices=("cpu",),
        mutable=True,
        strided=True,
        masks=True,
        any_size=True,
        out=True,
    )

    def owns(self, x: object) -> bool:
        # A mask would be lost and a matrix would multiply in its own way, so neither passes for an array.
        return isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray | np.matrix)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> np.ndarray:
        if device not in (None, "cpu"):
            message = f"NumPy's only device is 'cpu', not {device!r}."
            raise ValueError(message)
        return np.asarray(x, None if dtype is None else numpy_dtype(dtype))

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def device(self, x: np.ndarray) -> None:
        """There is one device, so none to be on by mistake."""

    def copy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x)

    def conflict(self, out: np.ndarray, x: np.ndarray) -> str | None:
        if not out.flags.writeable:
            return "is read-only"
        if not out.flags.forc and overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself: some of its values share memory"
        # Writing to x itself is safe: each value is read before the one in its place is written.
        is_same = out.__array_interface__["data"] == x.__array_interface__["data"] and out.strides == x.strides
        return None if is_same or not np.shares_memory(out, x) else "overlaps x in memory without being x"

    def within(self, values: np.ndarray, low: float, high: float) -> bool:
        return bool(np.all((low <= values) & (values < high)))

    def kernels_for(
        self, operation: Operation, batch: Batch, other: np.ndarray | None = None, vectors: tuple[Any, ...] = ()
    ) -> tuple[Kernels, Batch]:
        # Whole steps, against the passes of the same backend, training and evaluation of (32, 64): NumPy's are 1.6 and
        # 4.0 times as fast, Numba's 4.8 and 4.2 times; of (1024, 256), which NumPy's do not take, 1.8 and 1.5 times.
        return (self.fused if takes(self.fast, operation, batch, other, vectors) else self.kernels), batch

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return forward, partial(_rounded, pullback)


def takes(
    fast: ModuleType, operation: Operation, batch: Batch, other: np.ndarray | None, operands: tuple[Any, ...]
) -> bool:
    """Tell whether a module of whole steps is the one for a call."""
    if not fast.takes(batch.x, batch.sample_weight, other):
        return False
    if operation == "pullback":
        weight, stats = operands
        return _has_room(batch.x, stats.mean, weight)
    return operation == "evaluate" or (operation == "train" and batch.dtype == "float32")


def _rounded(pullback: Callable[..., Any], kernels: Kernels, dy: Any, batch: Batch, weight: Any, *rest: Any) -> Any:
    """Return gradients, those of parameters in their dtype: beyond its range they are infinite."""
    dx, *sums = pullback(kernels, dy, batch, weight, *rest)
    if weight is not None and sums[0].dtype != weight.dtype:
        with np.errstate(over="ignore"):
            sums = [total.astype(weight.dtype) for total in sums]
    return dx, *sums


def _widened(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Return an array in the shape of x with as many digits as statistics are to have."""
    values = np.asarray(values)
    return (
        values.astype(channel_stats.WIDE) if batch.dtype == "float64" and not channel_stats.is_wide(values) else values
    )


def _has_room(x: np.ndarray, mean: channel_stats.Mean, weight: np.ndarray | None = None) -> bool:
    """Tell whether float64 holds all that is made of x: no vector has the range of float64, which that of x has not."""
    return not (
        channel_stats.is_wide(x)
        or (weight is not None and channel_stats.is_wide(weight))
        or isinstance(mean, channel_stats.Scaled)
        or (not isinstance(mean, channel_stats.Pair) and channel_stats.is_wide(mean))
    )
