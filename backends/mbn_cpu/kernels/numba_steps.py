"""Fused steps: a training or evaluation step, or a pullback, in one compiled call on one thread, for small arrays.

They support float32 alone, contiguous memory, and no sample weights.
"""

import numpy as np

from mbn.contract import Batch, Moments, Params, Settings, State, Stats
from mbn_cpu import memory
from mbn_cpu.channel_stats import Pair, Scaled, counted, step
from mbn_cpu.kernels import numba_loops
from mbn_cpu.kernels.numba_passes import Layout, flat, readable

_NO_VECTOR = np.empty(0, np.float32)
_NO_REST = np.empty(0)
_NO_STATISTICS = np.empty((0, 0), np.float32)


def train(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> tuple[np.ndarray, State, Stats] | None:
    """Return output, new state and statistics of a step of training.

    If a channel is beyond the range of float32, return None and write nothing.
    """
    x, (_, _, eps, momentum, _, correction) = batch.x, settings
    layout, y = Layout.of(x), memory.empty_like(x) if out is None else out
    _, c, length = layout.shape
    n = x.size // c
    arrays = flat(x), flat(y)
    sizes = layout.last, c, length, layout.partials
    # As ``advance`` does, but without its calls, which take as long as a tenth of the arithmetic.
    running_mean, running_var, count = state
    if count is not None:
        count = counted(count)
    is_tracked = running_mean is not None
    running = np.array((running_mean, running_var)) if is_tracked else _NO_STATISTICS
    share = float(step(momentum, count, n, correction)) if is_tracked else 0.0
    new, found, is_beyond = numba_loops.train(*arrays, *sizes, *_vectors(params), running, share, eps, correction)
    if is_beyond:
        return None
    if is_tracked:
        new = new if running_mean.dtype.isnative else new.astype(running_mean.dtype)
        running_mean, running_var = new[0], new[1]  # faster than unpacking an array
    return y, State(running_mean, running_var, count), Stats(Pair(found[0], found[1]), found[2], n)


def evaluate(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> np.ndarray | None:
    """Return the output of evaluation; None as ``train``."""
    x = batch.x
    layout, y = Layout.of(x), memory.empty_like(x) if out is None else out
    _, c, length = layout.shape
    statistics = readable(state.running_mean), _NO_REST, readable(state.running_var)
    sizes = layout.last, c, length
    is_beyond = numba_loops.normalize_by(flat(x), flat(y), *sizes, *_vectors(params), *statistics, settings.eps)
    return None if is_beyond else y


def pullback(
    dy: np.ndarray, batch: Batch, weight: np.ndarray | None, stats: Stats, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, weight and bias."""
    x = batch.x
    layout, dx = Layout.of(x), memory.empty_like(x)
    _, c, length = layout.shape
    arrays = flat(dy), flat(x), flat(dx)
    sizes = layout.last, c, length, layout.partials
    sums = np.empty((2, c), np.float64 if weight is None else np.float32)
    numba_loops.pull_back(*arrays, *sizes, _vector(weight), *_statistics(stats), stats.count or 0, eps, sums)
    return dx, sums[1], sums[0]


# The parts of these steps before and after an exchange with other replicas.


def moments(batch: Batch) -> Moments:
    """Return the statistics of a batch."""
    layout = Layout.of(batch.x)
    _, c, length = layout.shape
    found = numba_loops.moments(flat(batch.x), layout.last, c, length, layout.partials)
    return Moments(batch.x.size // c, Pair(found[0], found[1]), found[2])


def merge(first: Moments, second: Moments) -> Moments | None:
    """Return the statistics of two batches together, or None where their squares may leave the range of float64."""
    if isinstance(first.m2, Scaled) or isinstance(second.m2, Scaled):
        return None
    (count, mean, m2), (more, other, more_m2) = first, second
    found, is_in_range = numba_loops.merge(*mean, m2, float(count), *other, more_m2, float(more))
    return Moments(count + more, Pair(found[0], found[1]), found[2]) if is_in_range else None


def advance(state: State, moments: Moments, settings: Settings) -> tuple[Stats, State]:
    """Return the statistics to normalise a batch by, and the state after the step."""
    n, (hi, lo), m2 = moments
    running_mean, running_var, count = state
    if count is not None:
        count = counted(count)
    is_tracked = running_mean is not None
    running = np.array((running_mean, running_var)) if is_tracked else _NO_STATISTICS
    share = float(step(settings.momentum, count, n, settings.correction)) if is_tracked else 0.0
    new, found = numba_loops.advance(hi, lo, m2, float(n), running, share, settings.correction)
    if is_tracked:
        new = new if running_mean.dtype.isnative else new.astype(running_mean.dtype)
        running_mean, running_var = new[0], new[1]
    return Stats(moments.mean, found, n), State(running_mean, running_var, count)


def normalize(batch: Batch, stats: Stats, params: Params, eps: float, out: np.ndarray | None) -> np.ndarray | None:
    """Return the output; None as ``train``."""
    x = batch.x
    layout, y = Layout.of(x), memory.empty_like(x) if out is None else out
    _, c, length = layout.shape
    arrays = flat(x), flat(y)
    is_beyond = numba_loops.normalize_by(*arrays, layout.last, c, length, *_vectors(params), *_statistics(stats), eps)
    return None if is_beyond else y


def grad_sums(dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and dy * xhat."""
    layout = Layout.of(batch.x)
    _, c, length = layout.shape
    arrays = flat(dy), flat(batch.x)
    sums = numba_loops.grad_sums(*arrays, layout.last, c, length, layout.partials, *_statistics(stats), eps)
    return sums[0], sums[1]


def grad_input(
    dy: np.ndarray,
    batch: Batch,
    stats: Stats,
    weight: np.ndarray | None,
    eps: float,
    sums: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return the gradient of x, given the sums."""
    x = batch.x
    layout, dx = Layout.of(x), memory.empty_like(x)
    _, c, length = layout.shape
    arrays = flat(dy), flat(x), flat(dx)
    vectors = _vector(weight), *_statistics(stats)
    numba_loops.grad_input(*arrays, layout.last, c, length, *vectors, float(stats.count), eps, *map(readable, sums))
    return dx


def _statistics(stats: Stats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the high and the low part of the mean, and the variance."""
    hi, lo = stats.mean if isinstance(stats.mean, Pair) else (stats.mean, _NO_REST)
    return readable(hi), readable(lo), readable(stats.var)


def _vectors(params: Params) -> tuple[np.ndarray, np.ndarray]:
    return _vector(params.weight), _vector(params.bias)


def _vector(parameter: np.ndarray | None) -> np.ndarray:
    return _NO_VECTOR if parameter is None else readable(parameter)
