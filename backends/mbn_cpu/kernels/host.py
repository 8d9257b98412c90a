"""Kernels of NumPy arrays: the passes of a module, and separate computations of channels that leave the range."""

from types import ModuleType
from typing import Any

import numpy as np

from mbn.contract import Batch, Kernels, Moments, Params, Settings, State, Stats
from mbn_cpu import channel_stats
from mbn_cpu.kernels import out_of_range


class HostKernels(Kernels):
    """Kernels of NumPy arrays, over the passes of a module."""

    def __init__(self, passes: ModuleType) -> None:
        """Make kernels of the four passes of a module.

        The module's ``normalize`` takes a ``Line``. Channels beyond the range of its arithmetic are computed
        separately, by ``out_of_range``.
        """
        self.passes = passes

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
        if fits_float64(batch.x, stats.mean):
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
        if fits_float64(batch.x, stats.mean, weight):
            return dx
        with np.errstate(all="ignore"):
            channels = out_of_range.of_factors(sums, stats.var, weight, eps, stats.count)
            if channels is not None:
                kernel = self.passes.grad_sums
                dx[:, channels] = out_of_range.grad_input(kernel, dy, batch, channels, stats, weight, eps, sums)
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

    def to_vectors(self, moments: Moments, dtype: str) -> tuple[np.ndarray, ...]:
        return channel_stats.FORMULAS.to_vectors(moments, dtype)

    def from_vectors(self, count: Any, vectors: tuple[np.ndarray, ...]) -> Moments:
        return channel_stats.FORMULAS.from_vectors(count, vectors)

    def variance(self, moments: Moments, correction: int) -> channel_stats.Variance:
        return channel_stats.FORMULAS.variance(moments, correction)

    def step(
        self, momentum: float | None, num_batches_tracked: np.ndarray | None, count: float, correction: int
    ) -> float:
        return channel_stats.step(momentum, num_batches_tracked, count, correction)

    @np.errstate(all="ignore")
    def lerp(self, start: np.ndarray, end: channel_stats.Mean | channel_stats.Variance, step: float) -> np.ndarray:
        return channel_stats.lerp(start, end, step)


class StepKernels(HostKernels):
    """Kernels of small NumPy arrays: the fused steps of a module, and their parts where replicas exchange sums."""

    def __init__(self, passes: ModuleType, steps: ModuleType) -> None:
        """Make kernels of the fused steps of a module; they leave to the passes whatever they do not support."""
        super().__init__(passes)
        self.steps = steps
        self.train, self.evaluate, self.pullback = steps.train, steps.evaluate, steps.pullback

    def moments(self, batch: Batch) -> Moments:
        found: Moments = self.steps.moments(batch)
        return found

    @np.errstate(all="ignore")
    def merge(self, first: Moments, second: Moments) -> Moments:
        found: Moments | None = self.steps.merge(first, second)
        return channel_stats.FORMULAS.merge(first, second) if found is None else found

    def advance(self, state: State, moments: Moments, settings: Settings) -> tuple[Stats, State]:
        if isinstance(moments.m2, channel_stats.Scaled):
            return super().advance(state, moments, settings)
        found: tuple[Stats, State] = self.steps.advance(state, moments, settings)
        return found

    def normalize(
        self, batch: Batch, stats: Stats, params: Params, eps: float, out: np.ndarray | None = None
    ) -> np.ndarray:
        y = (
            None
            if isinstance(stats.var, channel_stats.Scaled)
            else self.steps.normalize(batch, stats, params, eps, out)
        )
        return super().normalize(batch, stats, params, eps, out) if y is None else y

    def grad_sums(self, dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
        sums: tuple[np.ndarray, np.ndarray] = self.steps.grad_sums(dy, batch, stats, eps)
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
        if sums is None:
            return super().grad_input(dy, batch, stats, weight, eps, sums)
        dx: np.ndarray = self.steps.grad_input(dy, batch, stats, weight, eps, sums)
        return dx


def _widened(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Return an array in the shape of x, in float64 if the statistics are."""
    values = np.asarray(values)
    return (
        values.astype(channel_stats.WIDE) if batch.dtype == "float64" and not channel_stats.is_wide(values) else values
    )


def fits_float64(x: np.ndarray, mean: channel_stats.Mean, weight: np.ndarray | None = None) -> bool:
    """Tell whether all sums and factors stay in the range of float64: x, mean and weight have narrower ranges."""
    return not (
        channel_stats.is_wide(x)
        or (weight is not None and channel_stats.is_wide(weight))
        or isinstance(mean, channel_stats.Scaled)
        or (not isinstance(mean, channel_stats.Pair) and channel_stats.is_wide(mean))
    )
