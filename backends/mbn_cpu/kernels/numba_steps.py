"""Fused steps: a training or evaluation step, or a pullback, in one compiled call on one thread, for small arrays.

They support float32 alone, and contiguous memory. A step on a small array takes a few microseconds, so the code around
the compiled call has to be short. It allocates the results, which is faster than to return them from Numba.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from mbn.contract import Batch, Moments, Params, Settings, State, Stats
from mbn_cpu import memory
from mbn_cpu.channel_stats import Pair, Scaled, counted
from mbn_cpu.kernels import numba_loops
from mbn_cpu.kernels.numba_passes import flat, partials_of, readable

NO_VECTOR = np.empty(0, np.float32)
_NO_REST = np.empty(0)


def train(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> tuple[np.ndarray, State, Stats] | None:
    """Return output, new state and statistics of a step of training.

    If a channel is beyond the range of float32, return None and write nothing.
    """
    x, weights, _ = batch
    sizes, y = _sizes(x), memory.empty_like(x) if out is None else out
    mean, var, tracked = state
    tracked = None if tracked is None else counted(tracked)
    arrays = flat(x), _vector(weights), flat(y)
    vectors = *_vectors(params), _vector(mean), _vector(var)
    new, found = np.empty((2, sizes[1]), np.float32), np.empty((3, sizes[1]))
    advance = share_of(settings.momentum, tracked), settings.eps, settings.correction
    count = numba_loops.train(*arrays, *sizes, *vectors, *advance, new, found)
    if count < 0:
        return None
    if mean is not None:
        mean, var = _like(new, mean)
    return y, State(mean, var, tracked), statistics_of(found, weights, count)


def evaluate(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> np.ndarray | None:
    """Return the output of evaluation; None as ``train``."""
    return normalize(batch, Stats(state.running_mean, state.running_var, None), params, settings.eps, out)


def pullback(
    dy: np.ndarray, batch: Batch, weight: np.ndarray | None, stats: Stats, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, weight and bias."""
    x, weights, _ = batch
    sizes, dx = _sizes(x), memory.empty_like(x)
    arrays = flat(dy), flat(x), _vector(weights), flat(dx)
    sums = np.empty((2, sizes[1]), np.float64 if weight is None else np.float32)
    numba_loops.pull_back(*arrays, *sizes, _vector(weight), *_statistics(stats), float(stats.count or 0), eps, sums)
    return dx, sums[1], sums[0]


@lru_cache(maxsize=1024)
def sizes_of(shape: tuple[int, ...], is_c_contiguous: bool) -> tuple[bool, int, int, int]:
    """Return the arguments ``last``, ``c``, ``length`` and ``partials`` of the loops for an array in one piece."""
    _, c, length = (*shape, 1)[:3]
    return length == 1 or not is_c_contiguous, c, length, partials_of(shape)


def share_of(momentum: float | None, num_batches_tracked: Any) -> float:
    """Return the weight of a batch in the running statistics, faster than ``channel_stats.step`` does.

    A weighted batch that has no variance has a weight of 0, which the compiled step finds itself.
    """
    if momentum is not None:
        return momentum
    return 0.0 if num_batches_tracked is None else 1 / int(num_batches_tracked)


def statistics_of(found: np.ndarray, weights: Any, count: float) -> Stats:
    """Return the statistics that Numba has found, (3, C): high and low part of the mean, and the variance."""
    return Stats(Pair(found[0], found[1]), found[2], int(count) if weights is None else count)


# The parts of these steps before and after an exchange with other replicas.


def moments(batch: Batch) -> Moments:
    """Return the statistics of a batch."""
    x, weights, _ = batch
    sizes = _sizes(x)
    found = np.empty((3, sizes[1]))
    count = numba_loops.moments(flat(x), _vector(weights), *sizes, found)
    return Moments(int(count) if weights is None else count, Pair(found[0], found[1]), found[2])


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
    mean, var, tracked = state
    tracked = None if tracked is None else counted(tracked)
    new, biased, is_weighted = np.empty((2, m2.size), np.float32), np.empty_like(m2), not isinstance(n, int)
    share = share_of(settings.momentum, tracked)
    running = _vector(mean), _vector(var)
    numba_loops.advance(hi, lo, m2, float(n), is_weighted, *running, share, settings.correction, new, biased)
    if mean is not None:
        mean, var = _like(new, mean)
    return Stats(moments.mean, biased, n), State(mean, var, tracked)


def normalize(batch: Batch, stats: Stats, params: Params, eps: float, out: np.ndarray | None) -> np.ndarray | None:
    """Return the output; None as ``train``."""
    x, weights, _ = batch
    y = memory.empty_like(x) if out is None else out
    last, c, length, _ = _sizes(x)
    arrays = flat(x), _vector(weights), flat(y)
    is_beyond = numba_loops.normalize_by(*arrays, last, c, length, *_vectors(params), *_statistics(stats), eps)
    return None if is_beyond else y


def grad_sums(dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and dy * xhat."""
    x, weights, _ = batch
    sizes = _sizes(x)
    sums = np.empty((2, sizes[1]))
    numba_loops.grad_sums(flat(dy), flat(x), _vector(weights), *sizes, *_statistics(stats), eps, sums)
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
    x, weights, _ = batch
    dx = memory.empty_like(x)
    last, c, length, _ = _sizes(x)
    arrays = flat(dy), flat(x), _vector(weights), flat(dx)
    vectors = _vector(weight), *_statistics(stats)
    numba_loops.grad_input(*arrays, last, c, length, *vectors, float(stats.count), eps, *map(readable, sums))
    return dx


def _sizes(x: np.ndarray) -> tuple[bool, int, int, int]:
    return sizes_of(x.shape, x.flags.c_contiguous)


def _statistics(stats: Stats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the high and the low part of the mean, and the variance."""
    hi, lo = stats.mean if isinstance(stats.mean, Pair) else (stats.mean, _NO_REST)
    return readable(hi), readable(lo), readable(stats.var)


def _vectors(params: Params) -> tuple[np.ndarray, np.ndarray]:
    return _vector(params.weight), _vector(params.bias)


def _vector(vector: np.ndarray | None) -> np.ndarray:
    """Return a vector for Numba; also sample weights, (N, L), as one axis."""
    if vector is None:
        return NO_VECTOR
    return readable(vector if vector.ndim == 1 else vector.reshape(-1))


def _like(new: np.ndarray, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return new running statistics, (2, C), in the byte order of a vector."""
    new = new if vector.dtype.isnative else new.astype(vector.dtype)
    return new[0], new[1]  # faster than unpacking an array
