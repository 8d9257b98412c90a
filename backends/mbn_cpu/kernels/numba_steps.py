"""Fused steps: a training or evaluation step, or a pullback, in one compiled call on one thread, for small arrays.

They support float32 alone, contiguous memory, and no sample weights.
"""

import numpy as np

from mbn.contract import Batch, Params, Settings, State, Stats
from mbn_cpu import memory
from mbn_cpu.channel_stats import Pair, counted, step
from mbn_cpu.kernels import numba_loops
from mbn_cpu.kernels.numba_passes import Layout, flat, readable

_NO_VECTOR = np.empty(0, np.float32)
_NO_REST = np.empty(0)


def train(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> tuple[np.ndarray, State, Stats] | None:
    """Return output, new state and statistics of a step of training.

    If a channel is beyond the range of float32, return None and write nothing.
    """
    x, (_, _, eps, momentum, _, correction) = batch.x, settings
    running_mean, running_var, num_batches_tracked = state
    layout, y = Layout.of(x), memory.empty_like(x) if out is None else out
    _, c, length = layout.shape
    n = x.size // c
    if num_batches_tracked is not None:
        num_batches_tracked = counted(num_batches_tracked)
    is_tracked = running_mean is not None
    running = np.array((running_mean, running_var)) if is_tracked else np.empty((0, 0), np.float32)
    share = float(step(momentum, num_batches_tracked, n, correction)) if is_tracked else 0.0
    arrays = flat(x), flat(y)
    sizes = layout.last, c, length, layout.partials
    new, found, is_beyond = numba_loops.train(*arrays, *sizes, *_vectors(params), running, share, eps, correction)
    if is_beyond:
        return None
    if is_tracked:
        new = new if running_mean.dtype.isnative else new.astype(running_mean.dtype)
        running_mean, running_var = new[0], new[1]  # faster than unpacking an array
    return y, State(running_mean, running_var, num_batches_tracked), Stats(Pair(found[0], found[1]), found[2], n)


def evaluate(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> np.ndarray | None:
    """Return the output of evaluation; None as ``train``."""
    x = batch.x
    layout, y = Layout.of(x), memory.empty_like(x) if out is None else out
    _, c, length = layout.shape
    statistics = readable(state.running_mean), readable(state.running_var)
    arrays = flat(x), flat(y)
    is_beyond = numba_loops.evaluate(*arrays, layout.last, c, length, *_vectors(params), *statistics, settings.eps)
    return None if is_beyond else y


def pullback(
    dy: np.ndarray, batch: Batch, weight: np.ndarray | None, stats: Stats, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, weight and bias."""
    x, (mean, var, count) = batch.x, stats
    hi, lo = mean if isinstance(mean, Pair) else (mean, _NO_REST)
    layout, dx = Layout.of(x), memory.empty_like(x)
    _, c, length = layout.shape
    arrays = flat(dy), flat(x), flat(dx)
    sizes = layout.last, c, length, layout.partials
    vectors = _vector(weight), readable(hi), readable(lo), readable(var)
    sums = np.empty((2, c), np.float64 if weight is None else np.float32)
    numba_loops.pull_back(*arrays, *sizes, *vectors, count or 0, eps, sums)
    return dx, sums[1], sums[0]


def _vectors(params: Params) -> tuple[np.ndarray, np.ndarray]:
    return _vector(params.weight), _vector(params.bias)


def _vector(parameter: np.ndarray | None) -> np.ndarray:
    return _NO_VECTOR if parameter is None else readable(parameter)
