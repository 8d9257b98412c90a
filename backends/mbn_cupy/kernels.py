"""CuPy's arithmetic on x: calls of the kernels in ``cuda/``.

Statistics have the accuracy of float64 for every dtype of x. The host never waits for the GPU. A call allocates its
results and, for sums, a small fraction of x's size, which returns to the pool at the end of the call: so all calls can
be captured in a CUDA graph. All operations are on the current device, in the current stream.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import cupy
import numpy as np

from mbn.contract import Batch, Kernels, Moments, Params, Settings, State, Stats
from mbn_common.channel_stats import Mean, Pair, Scaled, Variance
from mbn_cupy.channel_stats import FORMULAS
from mbn_cupy.compilation import Variant, kernel
from mbn_cupy.launches import THREADS, Cover, Layout, layout

WIDE = np.float64
_NULL = 0
"""The pointer for an absent array."""
_COLUMNS = 8
"""Channels of a block that merges results: enough to read complete sectors of memory."""


class CudaKernels(Kernels):
    """Kernels in CUDA: a step of training and a pullback are three launches each, evaluation is one."""

    def moments(self, batch: Batch) -> Moments:
        """Return count, mean (a Pair) and m2 of each channel of x, (N, C) or (N, C, L); for float64 both are Scaled."""
        x, weights, dtype = batch
        with x.device:
            x = x.astype(WIDE) if dtype == "float64" else x
            call = _Call.of((x,), weights)
            results = call.moments()
            mean, rest, m2 = cupy.empty((3, x.shape[1]))
            count, exponent = _count(x, weights), _exponent(x)
            call.merge("merge_moments", results, _pointer(count), mean, rest, m2, _pointer(exponent))
            return Moments(count, *_in_units(Pair(mean, rest), m2, exponent))

    def normalize(
        self, batch: Batch, stats: Stats, params: Params, eps: float, out: cupy.ndarray | None = None
    ) -> cupy.ndarray:
        """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order, 0 where weights are 0."""
        x, weights, _ = batch
        mean, var, _ = stats
        weight, bias = params
        y = cupy.empty_like(x) if out is None else out
        call = _Call.of((x, y), weights, mean, var, weight, bias)
        call.write("normalize", *call.statistics(mean, var), call.vector(weight), call.vector(bias), float(eps))
        return y

    def grad_sums(self, dy: cupy.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[cupy.ndarray, cupy.ndarray]:
        """Return the sums of dy and of dy * (x - mean) / sqrt(var + eps) for each channel, in float64."""
        x, weights, _ = batch
        mean, var, _ = stats
        call = _Call.of((x, dy), weights, mean, var)
        statistics = call.statistics(mean, var)
        results = call.sums("grad_sums", 2, *statistics, float(eps))
        sum_dy, sum_dy_xhat = cupy.empty((2, x.shape[1]))
        call.merge("merge_sums", results, *statistics, float(eps), sum_dy, sum_dy_xhat)
        return sum_dy, sum_dy_xhat

    def grad_input(
        self,
        dy: cupy.ndarray,
        batch: Batch,
        stats: Stats,
        weight: cupy.ndarray | None,
        eps: float,
        sums: tuple[cupy.ndarray, cupy.ndarray] | None,
    ) -> cupy.ndarray:
        """Return the gradient of x, in its dtype and memory order."""
        x, weights, _ = batch
        mean, var, count = stats
        dx = cupy.empty_like(x)
        call = _Call.of((x, dy, dx), weights, mean, var, weight)
        given = (_NULL, _NULL) if sums is None else tuple(map(cupy.ascontiguousarray, sums))
        counts = (0.0, count) if isinstance(count, cupy.ndarray) else (float(count or 0), _NULL)
        call.write("grad_input", *call.statistics(mean, var), call.vector(weight), float(eps), *given, *counts)
        return dx

    def train(
        self, batch: Batch, params: Params, state: State, settings: Settings, out: cupy.ndarray | None
    ) -> tuple[cupy.ndarray, State, Stats]:
        """Return output, new state and statistics of a step of training."""
        x, weights, _ = batch
        call = _Call.of((x,), weights, *params, *state[:2])
        results = call.moments()
        mean, rest, var = cupy.empty((3, x.shape[1]))
        count, exponent = _count(x, weights), _exponent(x)
        after = State(*(None if old is None else cupy.empty(old.shape, old.dtype) for old in state))
        steps = zip(state, after, strict=True)
        (running_mean, new_mean), (running_var, new_var), (batches, new_batches) = steps
        call.merge(
            "merge_batch",
            results,
            *(_pointer(count), mean, rest, var, _pointer(exponent)),
            *(float(settings.correction), float(settings.momentum or 0), int(settings.momentum is None)),
            *(_pointer(batches), _pointer(new_batches)),
            *(call.vector(running_mean), _pointer(new_mean), call.vector(running_var), _pointer(new_var)),
        )
        stats = Stats(*_in_units(Pair(mean, rest), var, exponent), count)
        return self.normalize(batch, stats, params, settings.eps, out), after, stats

    def sample_weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: cupy.ndarray | None,
        lengths: cupy.ndarray | None,
        sample_weight: cupy.ndarray | None,
    ) -> cupy.ndarray:
        with next(given.device for given in (mask, lengths, sample_weight) if given is not None):
            return FORMULAS.sample_weights(shape, dtype, mask, lengths, sample_weight)

    def merge(self, first: Moments, second: Moments) -> Moments:
        with _device_of(first.m2):
            return FORMULAS.merge(first, second)

    def to_vectors(self, moments: Moments, dtype: str) -> tuple[cupy.ndarray, ...]:
        with _device_of(moments.m2):
            return FORMULAS.to_vectors(moments, dtype)

    def from_vectors(self, count: Any, vectors: tuple[cupy.ndarray, ...]) -> Moments:
        with vectors[0].device:
            return FORMULAS.from_vectors(count, vectors)

    def variance(self, moments: Moments, correction: int) -> Variance:
        with _device_of(moments.m2):
            return FORMULAS.variance(moments, correction)

    def step(
        self,
        momentum: float | None,
        num_batches_tracked: cupy.ndarray | None,
        count: int | cupy.ndarray,
        correction: int,
    ) -> float | cupy.ndarray:
        given = [array for array in (num_batches_tracked, count) if isinstance(array, cupy.ndarray)]
        with given[0].device if given else nullcontext():
            return FORMULAS.step(momentum, num_batches_tracked, count, correction)

    def lerp(self, start: cupy.ndarray, end: Mean | Variance, step: float | cupy.ndarray) -> cupy.ndarray:
        with start.device:
            return FORMULAS.lerp(start, end, step)


def _device_of(m2: Variance) -> cupy.cuda.Device:
    return (m2.values if isinstance(m2, Scaled) else m2).device


class _Call(NamedTuple):
    """The arrays of a call, their layout, and the variant of the kernels for them."""

    layout: Layout
    variant: Variant
    arrays: tuple[Any, ...]
    """The kernels' arguments for x, the other arrays and the weights: pointers and strides."""
    num_features: int

    @classmethod
    def of(
        cls, arrays: Sequence[cupy.ndarray], weights: cupy.ndarray | None, *vectors: Mean | Variance | None
    ) -> "_Call":
        """Return a call with arrays of one shape and dtype, x first, and with vectors, which determine a dtype."""
        x = arrays[0]
        given = [vector.dtype for vector in (weights, *vectors) if isinstance(vector, cupy.ndarray)]
        statistic = "float64" if WIDE in given and np.float32 not in given else "float32"
        plan = layout(arrays, weights)
        placed = [value for array, strides in zip(arrays, plan.strides, strict=False) for value in (array, *strides)]
        if weights is None:
            placed += _NULL, 0, 0
        else:
            row, _, position = plan.strides[-1]
            placed += weights, row, position
        variant = Variant(x.dtype.name, statistic, plan.channels, plan.positions, weights is not None)
        return cls(plan, variant, tuple(placed), x.shape[1])

    def sums(self, name: str, fields: int, *arguments: Any) -> cupy.ndarray:
        """Launch a kernel for sums, and return the results of its blocks, (blocks, C, fields) in float64."""
        cover = self.layout.summing
        results = cupy.empty((cover.blocks[1], self.num_features, fields))
        self._pass(name, cover, *arguments, results)
        return results

    def moments(self) -> cupy.ndarray:
        """Launch the kernel for moments, and return the results of its blocks."""
        fields = 6 if self.variant.value == "float64" else 5 if self.variant.statistic == "float64" else 4
        return self.sums("moments", fields)

    def write(self, name: str, *arguments: Any) -> None:
        """Launch a kernel that writes a value for each of x."""
        self._pass(name, self.layout.writing, *arguments)

    def merge(self, name: str, results: cupy.ndarray, *arguments: Any) -> None:
        """Launch a kernel that merges the results of blocks."""
        blocks, channels, _ = results.shape
        threads = 1 << min(blocks - 1, THREADS // _COLUMNS - 1).bit_length()
        arguments = _COLUMNS, blocks, channels, results, *arguments
        kernel(name, self.variant)((-(-channels // _COLUMNS), 1, 1), (_COLUMNS * threads, 1, 1), arguments)

    def statistics(self, mean: Any, var: Variance) -> tuple[Any, ...]:
        """Return the arguments mean, rest, var and exponent, and the running statistics; null pointers if absent."""
        if isinstance(var, Scaled):
            (hi, lo), exponent = mean
            return hi, lo, var.values, exponent, _NULL, _NULL
        batch_mean = rest = running_mean = _NULL
        if isinstance(mean, Pair):
            batch_mean, rest = mean
        elif mean.dtype == self.variant.statistic:
            running_mean = self.vector(mean)
        else:
            batch_mean = cupy.ascontiguousarray(mean, WIDE)
        if var.dtype == self.variant.statistic:
            return batch_mean, rest, _NULL, _NULL, running_mean, self.vector(var)
        return batch_mean, rest, cupy.ascontiguousarray(var, WIDE), _NULL, running_mean, _NULL

    def vector(self, vector: cupy.ndarray | None) -> Any:
        """Return a (C,) vector as an argument: contiguous, and in the dtype ``statistic`` of the variant."""
        return _NULL if vector is None else cupy.ascontiguousarray(vector, self.variant.statistic)

    def _pass(self, name: str, cover: Cover, *arguments: Any) -> None:
        arguments = *cover.arguments, *self.arrays, *arguments
        kernel(name, self.variant)(cover.blocks, cover.threads, arguments)


def _count(x: cupy.ndarray, weights: cupy.ndarray | None) -> int | cupy.ndarray:
    """Return the number of values per channel, or an array for the sum of their weights."""
    return x.size // x.shape[1] if weights is None else cupy.empty(())


def _exponent(x: cupy.ndarray) -> cupy.ndarray | None:
    """Return an array for the exponents of the statistics' units if x is in float64, else None."""
    return cupy.empty(x.shape[1], np.int32) if x.dtype == WIDE else None


def _in_units(mean: Pair, var: cupy.ndarray, exponent: cupy.ndarray | None) -> tuple[Mean, Variance]:
    return (mean, var) if exponent is None else (Scaled(mean, exponent), Scaled(var, 2 * exponent))


def _pointer(value: Any) -> Any:
    """Return an array as it is, and a null pointer for anything else."""
    return value if isinstance(value, cupy.ndarray) else _NULL
