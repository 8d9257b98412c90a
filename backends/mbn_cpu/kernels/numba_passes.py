"""The passes over x with loops that Numba compiles.

A pass divides x into chunks, and each chunk is a task for one thread. A chunk has some samples and positions, and all
channels::

    x, (N, C, L), N > 1 and samples of moderate size     x of one sample, or of samples beyond _LARGE values

         +---------- C x L ----------+                        +----- positions -----+----- positions -----+-----+
      n0 |                           |                     n0 | chunk 0             | chunk 1             | 2   |
      n1 |  chunk 0                  |                        +---------------------+---------------------+-----+
         +---------------------------+                     n1 | chunk 3             | chunk 4             | 5   |
      n2 |                           |                        +---------------------+---------------------+-----+
      n3 |  chunk 1                  |                      each with all channels
         +---------------------------+
      n4 |  chunk 2, the rest        |
         +---------------------------+

A loop of ``numba_loops`` takes a chunk as one contiguous axis. A loop that sums has ``partials`` partial sums of each
channel, which it adds up as a tree to one number per channel and chunk; the numbers of the chunks are a tree again::

    chunk i --loop: partials sums per channel, a tree--> partial[i], 2 x C
    partial, chunks x 2 x C --fold_rows: the second half of the chunks is added to the first, until one is left--> 2 x C

Each pass reads x once, in x's memory order, and allocates its result. Only for 16-bit dtypes and for arrays that are
not contiguous each task copies a chunk. The chunks and the partial sums depend on the shape and dtype of x alone, so
the bits depend neither on the memory order nor on the number of threads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mbn.contract import Batch, Moments, Stats
from mbn_cpu import memory, thread_pool
from mbn_cpu.channel_stats import (
    WIDE,
    Line,
    added,
    as_pair,
    compute_dtype,
    fold_rows,
    heaviest,
    invstd,
    is_far,
    is_wide,
    projection,
    units,
)
from mbn_cpu.kernels import numba_halves, numba_loops
from mbn_cpu.kernels.numpy_tiles import Scratch

_SHARE = 2
"""The least number of chunks per thread: waking up a thread takes a good part of the time of one chunk."""
_LARGE = 1 << 22
"""The most values of a sample whose sequence is not divided."""
_PARTIALS = 32
"""Partial sums of a channel, for sequences of more than twice as many positions."""
_ROW = 256
"""The most values of a row of partial sums in which several samples are next to each other, for shorter sequences."""
_PRECISION = 8
"""A factor for x in float64: it divides the sizes of chunks, and multiplies the partial sums of gradients.

So each sum is of fewer values, with fewer roundings. The other sums of float64 are split into parts instead.
"""
_NOTHING = np.empty(0)
"""The argument for absent weights and vectors."""


class Chunk(NamedTuple):
    """The samples and positions of a chunk of an (N, C, L), with all channels."""

    samples: slice
    positions: slice


class Layout(NamedTuple):
    """The axes (N, C, L) by which arrays of one shape are divided into chunks: an (N, C) has an L of 1.

    Loops get ``last``, C, the L of a chunk and ``partials``, and chunks in the order of ``arranged``.
    """

    last: bool
    """Whether channels come last, in an order (N, L, C)."""
    shape: tuple[int, int, int]
    """N, C and L; N and L are swapped if ``transposed``."""
    partials: int
    """Partial sums of each channel and chunk: fewer than L, or L times the samples that are next to each other."""
    transposed: bool = False
    """Whether N and L are swapped, so that arrays in Fortran's order are contiguous."""

    @classmethod
    def of(cls, x: np.ndarray, finer: int = 1) -> "Layout":
        """Return the layout for sums over x: it follows the memory of x as far as the order of sums allows.

        ``finer`` is a factor for the number of partial sums. That number depends on the shape alone, not on the memory.
        """
        _, _, length = shape = x.shape if x.ndim == 3 else (*x.shape, 1)
        is_last = length == 1 or (not x.flags.c_contiguous and x.swapaxes(1, 2).flags.c_contiguous)
        return cls(is_last, shape, partials_of(shape, finer))

    @classmethod
    def for_values(cls, x: np.ndarray) -> "Layout":
        """Return the layout for operations on each value of x: it follows the memory of x."""
        if x.flags.c_contiguous or not x.flags.f_contiguous:
            return cls.of(x)
        shape = x.T.shape if x.ndim == 3 else (1, *x.T.shape)
        return cls(last=False, shape=shape, partials=1, transposed=True)

    def arranged(self, array: np.ndarray) -> np.ndarray:
        """Return a view of an array in the shape of x as (N, C, L), or (N, L, C) with channels last."""
        if array.ndim == 2:
            return array.T[None] if self.transposed else array[:, None]
        if self.transposed:
            return array.T
        return array.swapaxes(1, 2) if self.last else array

    def chunks(self, size: int) -> list[Chunk]:
        """Return chunks of about ``size`` values.

        All chunks but the last have full rows of sums only, even with several samples to a row, or divided sequences.
        """
        n, c, length = self.shape
        samples, positions = 1, length
        if n > 1 and c * length <= _LARGE:
            # Each chunk keeps a sum per channel. With at least 64 cells, these are few compared to its values.
            samples = _multiple(max(1, size // (c * length), 64 // length), max(1, self.partials // length))
        else:
            positions = _multiple(max(size // c, 64), self.partials)
        return [
            Chunk(slice(i, min(i + samples, n)), slice(j, min(j + positions, length)))
            for i in range(0, n, samples)
            for j in range(0, length, positions)
        ]

    def part(self, array: np.ndarray, chunk: Chunk) -> np.ndarray:
        """Return a view of a chunk of an array in the shape of x: (n, C, l), or (n, l, C) with channels last."""
        array = self.arranged(array)[chunk.samples]
        return array[:, chunk.positions] if self.last else array[:, :, chunk.positions]

    def weights(self, weights: np.ndarray | None, chunk: Chunk) -> np.ndarray:
        """Return the weights of a chunk, (n, l) as one axis in float64; empty without weights."""
        if weights is None:
            return _NOTHING
        weights = weights if weights.ndim == 2 else weights[:, None]
        weights = weights.T if self.transposed else weights
        return np.ascontiguousarray(weights[chunk], WIDE).reshape(-1)

    def sizes(self, chunk: Chunk) -> tuple[int, int]:
        """Return C and the L of a chunk."""
        return self.shape[1], chunk.positions.stop - chunk.positions.start


def partials_of(shape: tuple[int, ...], finer: int = 1) -> int:
    """Return the number of partial sums for an (N, C) or (N, C, L); see ``Layout.of``."""
    n, c, length = (*shape, 1)[:3]
    is_long, together = length > 2 * finer * _PARTIALS, max(1, min(n, finer * _ROW // (c * length)))
    return finer * _PARTIALS if is_long else length * together


def _multiple(number: int, of: int) -> int:
    """Return the least multiple of ``of`` that is at least ``number``."""
    return -(-number // of) * of


def moments(x: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    The algorithm is that of ``numpy_passes.moments``: sums of d = x - shift and d², twice for float64 and outliers.
    """
    with np.errstate(all="ignore"):
        shift = heaviest(x, weights)
        count = x.size // x.shape[1] if weights is None else fold_rows(weights.flatten().astype(WIDE))
        divisor = count or 1  # if all weights are 0, so are the sums
        total, squares = sums = _sums(numba_loops.shifted_sums, (shift,), weights, x)
        if is_wide(x):
            shift += total / divisor
            parts = _sums(numba_loops.parted_sums, (shift, units(sums, divisor)), weights, x)
            total, squares = parts[::2] + parts[1::2]
        elif is_far(squares, squares - total * (total / divisor)):
            shift += total / divisor
            total, squares = _sums(numba_loops.shifted_sums, (shift,), weights, x)
        mean = total / divisor
        return Moments(count, added(shift, mean), squares - total * mean)


def normalize(
    x: np.ndarray, line: Line, weights: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Return x normalised by a line, in its dtype and memory order, and 0 where weights are 0."""
    y = memory.empty_like(x) if out is None else out

    def task(layout: Layout, sizes: tuple[int, int], y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        numba_loops.normalize(x, w, y, layout.last, *sizes, *line)

    _each(task, y, weights, x)
    return y


def grad_sums(dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and of dy * (x - mean) / sqrt(var + eps) for each channel, in float64."""
    with np.errstate(all="ignore"):
        hi, lo = as_pair(stats.mean)
        sum_dy, products = _sums(numba_loops.gradient_sums, (hi,), batch.sample_weight, batch.x, dy)
        return sum_dy, (products - lo * sum_dy) * invstd(stats.var, eps)


def grad_input(
    dy: np.ndarray,
    batch: Batch,
    stats: Stats,
    weight: np.ndarray | None,
    eps: float,
    sums: tuple[np.ndarray, np.ndarray] | None,
) -> np.ndarray:
    """Return the gradient of x, in its dtype and memory order.

    It is computed in float64 and rounded once, since its terms may be much larger than the gradient and lose most of
    their digits in the difference.
    """
    x, weights, _ = batch
    with np.errstate(all="ignore"):
        scale, shared = projection(stats, weight, eps, sums)
    center, slope, average = (_NOTHING,) * 3 if shared is None else shared[1:]
    dx: np.ndarray = memory.empty_like(x)

    def task(
        layout: Layout, sizes: tuple[int, int], dx: np.ndarray, x: np.ndarray, dy: np.ndarray, w: np.ndarray
    ) -> None:
        numba_loops.input_gradient(dy, x, w, dx, layout.last, *sizes, center, slope, average, scale)

    _each(task, dx, weights, x, dy)
    return dx


def _sums(
    loop: Callable[..., None],
    vectors: tuple[np.ndarray, ...],
    weights: np.ndarray | None,
    x: np.ndarray,
    *others: np.ndarray,
) -> np.ndarray:
    """Return the sums of a loop over arrays in the shape of x, (2, C), or (4, C) in parts, in float64.

    The loop gets chunks of ``others`` and x, weights, sizes, the number of partial sums and ``vectors``, and writes the
    sums of chunk i to ``partial[i]``.
    """
    compute = compute_dtype(x)
    finer = _PRECISION if compute == WIDE else 1
    layout = Layout.of(x, finer if loop is numba_loops.gradient_sums else 1)
    chunks = layout.chunks(thread_pool.CHUNK // finer)
    partial = np.empty((len(chunks), 4 if loop is numba_loops.parted_sums else 2, layout.shape[1]))

    def add(i: int) -> None:
        chunk = chunks[i]
        with Scratch.taken() as scratch:
            pieces = [_piece(scratch, layout.part(array, chunk), compute) for array in (*others, x)]
            sizes = layout.sizes(chunk)
            loop(*pieces, layout.weights(weights, chunk), layout.last, *sizes, layout.partials, *vectors, partial[i])

    thread_pool.run_tasks(add, len(chunks), at_least=_SHARE)
    return fold_rows(partial)


def _each(
    task: Callable[..., None], result: np.ndarray, weights: np.ndarray | None, x: np.ndarray, *others: np.ndarray
) -> None:
    """Fill the chunks of a result in the shape of x by ``task(layout, sizes, result, x, *others, weights)``.

    A task gets chunks as one axis in the dtype to compute in: the arrays' own memory if it is contiguous and of that
    dtype, else copies.
    """
    layout, compute = Layout.for_values(x), compute_dtype(x)
    chunks = layout.chunks(thread_pool.CHUNK)

    def fill(i: int) -> None:
        chunk = chunks[i]
        part = layout.part(result, chunk)
        with Scratch.taken() as scratch:
            is_direct = _is_plain(part, compute)
            filled = part.reshape(-1) if is_direct else scratch.empty((part.size,), compute)
            pieces = [_piece(scratch, layout.part(array, chunk), compute) for array in (x, *others)]
            task(layout, layout.sizes(chunk), filled, *pieces, layout.weights(weights, chunk))
            if not is_direct:
                _store(scratch, filled, part)

    # Backward: in training the pass for sums has just read each thread's last chunks, which are still in its cache.
    thread_pool.run_tasks(fill, len(chunks), at_least=_SHARE, backward=True)


def _piece(scratch: Scratch, part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a part of an array as one axis in a dtype: its own memory, or a copy in the scratch."""
    if _is_plain(part, dtype):
        return readable(part.reshape(-1))
    if (conversions := numba_halves.of(part.dtype)) is None:
        return scratch.copy(part, dtype).reshape(-1)
    values = scratch.empty((part.size,), dtype)
    bits = part if _is_plain(part, part.dtype) else scratch.copy(part, part.dtype)
    conversions.widen(readable(bits.reshape(-1).view(np.uint16)), values)
    return values


def _store(scratch: Scratch, values: np.ndarray, part: np.ndarray) -> None:
    """Write computed values, one axis in float32 or float64, to a part of an array."""
    if (conversions := numba_halves.of(part.dtype)) is not None:
        is_plain = _is_plain(part, part.dtype)
        rounded = part.reshape(-1) if is_plain else scratch.empty((part.size,), part.dtype)
        conversions.narrow(values, rounded.view(np.uint16))
        if is_plain:
            return
        values = rounded
    np.copyto(part, values.reshape(part.shape), casting="unsafe")


def _is_plain(part: np.ndarray, dtype: np.dtype) -> bool:
    """Tell whether the memory of a part is one aligned, contiguous axis in a dtype."""
    return part.dtype == dtype and part.flags.c_contiguous and part.flags.aligned


class _Memory:
    """An object that describes memory to NumPy, by the array interface."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def flat(array: np.ndarray) -> np.ndarray:
    """Return a contiguous array, of any memory order, as one axis."""
    return readable(array.ravel("K"))


def readable(array: np.ndarray) -> np.ndarray:
    """Return an array for Numba to read, marked as writeable.

    Numba would compile every loop again for read-only arrays, which have another type. The memory is shared, unless the
    byte order is not this machine's.
    """
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    if array.flags.writeable:
        return array
    interface = array.__array_interface__
    address, _ = interface["data"]
    return np.asarray(_Memory({**interface, "data": (address, False)}))
