"""The division of arrays into tiles: a tile is a task for one thread, and fits its cache.

All arrays are viewed with four axes, (A, F, C, L). F samples are folded into one row where samples are too short for a
loop of NumPy, and an (N, C) has an L of 1. Samples that do not fill a row of F are a separate array, which is divided
by itself. A tile is a block of such an array::

    x, (N, C, L) = (7, C, L), F = 3

         F = 3 samples, C x L each                          a tile: `high` rows of A,
      +----------+----------+----------+                            `deep` samples of F,
    a0|    n0    |    n1    |    n2    |  parts[0],                 `across` channels,
      +----------+----------+----------+  (2, 3, C, L)              `along` positions
    a1|    n3    |    n4    |    n5    |
      +----------+----------+----------+                    tiles that differ in their channels alone are one list:
    a0|    n6    |  parts[1], (1, 1, C, L)                  together they give a sum for each channel
      +----------+

No array is copied here. The tiles of sums depend on the shape of x alone, so that neither the memory order nor the
number of threads changes a bit.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np

from mbn.threads import num_processors

SIZE = 3 << 16
"""The most values of a tile: 1.5 MiB in float64. With fewer, threads wait for each other in the interpreter."""
_FEW = 32
"""The most samples that are not folded."""
_ROW = 1 << 13
"""The most values of a row of folded samples: NumPy has a loop for each row, so rows should be long."""
_WIDTH = 1 << 13
"""The most values of a sample in a tile. Larger samples are divided by channels, so that a tile has many samples."""
_LONG = _WIDTH
"""The least number of positions for which NumPy loops over positions alone; else over channels and samples too."""

Tile: TypeAlias = tuple[slice, slice, slice, slice]
"""The slices of a tile along A, F, C and L."""
View: TypeAlias = Callable[[np.ndarray], np.ndarray]


class Layout(NamedTuple):
    """The axes by which arrays of one shape are divided into tiles."""

    view: View
    """A function from an array in x's shape, or one that broadcasts to it, to a view (N, C, L) or (A, F, C, L)."""
    fold: int
    """F, the number of samples that are folded into one row, if the view has three axes."""

    def parts(self, array: np.ndarray) -> list[np.ndarray]:
        """Return an array as (A, F, C, L), and the samples that do not fill a row as a second one, (1, rest, C, L)."""
        array = self.view(array)
        if array.ndim == 4:
            return [array]
        if self.fold == 1:
            return [array[:, None]]
        full = len(array) - len(array) % self.fold
        parts = [array[:full].reshape(-1, self.fold, *array.shape[1:]), array[None, full:]]
        return parts[: 1 + (full < len(array))]


def for_sums(x: np.ndarray) -> Layout:
    """Return the layout for sums over x, (N, C) or (N, C, L); it does not depend on the memory order."""
    view = _as_sequences if x.ndim == 2 else _as_it_is
    return Layout(view, _fold(x.shape))


def for_values(x: np.ndarray, *others: np.ndarray) -> Layout:
    """Return the layout for operations on each value of x, and of other arrays in its shape: it follows x's memory.

    Sums must not use it, since it depends on the memory order.
    """
    if x.ndim == 2:
        return Layout(_transposed, 1) if x.strides[0] < x.strides[1] else for_sums(x)
    # Channels before positions in memory: as for sums. Channels last: each position of a sample is a row, if the rows
    # are contiguous in all arrays; else positions and channels are swapped.
    _, c, length = x.shape
    if x.strides[1] >= x.strides[2] or c == 1 or length == 1:
        return for_sums(x)
    if all(array.strides == x.strides for array in others) and x.strides[0] == length * x.strides[2]:
        return Layout(_as_rows, _fold((len(x) * length, c)))
    return Layout(_channels_last, 1)


def cut(shape: tuple[int, ...]) -> list[list[Tile]]:
    """Return tiles of ``SIZE`` values at most that cover an (A, F, C, L).

    Each list covers all channels of the same rows, samples and positions.
    """
    # A tile extends along the last axes first: positions, channels up to a width, samples of a row, and rows.
    a, f, c, length = shape
    along = min(length, SIZE)
    across = min(c, max(1, _WIDTH // along))
    deep = min(f, max(1, SIZE // (along * across)))
    high = max(1, SIZE // (along * across * deep))
    starts = product(_slices(a, high), _slices(f, deep), _slices(length, along))
    return [[(i, j, channels, k) for channels in _slices(c, across)] for i, j, k in starts]


def of(array: np.ndarray, tile: Tile) -> np.ndarray:
    """Return a tile of an (A, F, C, L), or of weights, (A, F, 1, L), which broadcast against it."""
    _, _, c, _ = array.shape
    return array[tile] if c > 1 else array[(*tile[:2], slice(None), *tile[3:])]


class Scratch:
    """Memory for temporary arrays, kept for the next tile and the next call, since new pages of memory take longer.

    ``taken`` returns one that no other thread uses. Each array that is requested from it is a buffer of its own; for
    the next tile all buffers are free again.
    """

    _free: ClassVar[deque["Scratch"]] = deque(maxlen=num_processors())

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._taken = 0

    @classmethod
    @contextmanager
    def taken(cls) -> Iterator["Scratch"]:
        """Return a scratch for a ``with`` block; afterwards its arrays are free for other tiles."""
        try:
            scratch = cls._free.pop()
        except IndexError:
            scratch = cls()
        scratch._taken = 0
        yield scratch
        cls._free.append(scratch)

    def copy(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return a copy in C order, in an unused buffer."""
        copy = self.empty(values.shape, dtype)
        np.copyto(copy, values, casting="unsafe")
        return copy

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an uninitialised array in an unused buffer."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._taken == len(self._buffers):
            self._buffers.append(np.empty(0, np.uint8))
        if self._buffers[self._taken].size < size:
            self._buffers[self._taken] = np.empty(size, np.uint8)
        buffer = self._buffers[self._taken][:size]
        self._taken += 1
        return buffer.view(dtype).reshape(shape)


class Columns:
    """Vectors of the channels, (C,), in shapes that broadcast against tiles in long loops.

    Against (A, F, C, L) a vector of (C, 1) gives loops over L alone. Where L is short, the vector is repeated to (F, C,
    L): then NumPy makes one loop of all three axes.
    """

    def __init__(self, *vectors: np.ndarray) -> None:
        self._vectors = vectors
        self._spread: dict[tuple[int, ...], list[np.ndarray]] = {}

    def of(self, tile: Tile, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Return the vectors for a tile of ``shape``, as (channels, 1) or (F, channels, L) of the tile."""
        _, f, c, length = shape
        if length >= _LONG or f == length == 1:
            return [vector[tile[2], None] for vector in self._vectors]
        if c < len(self._vectors[0]):
            return [_spread(vector[tile[2]], shape) for vector in self._vectors]
        if shape[1:] not in self._spread:  # nearly all tiles have the same shape
            self._spread[shape[1:]] = [_spread(vector, shape) for vector in self._vectors]
        return self._spread[shape[1:]]


def _spread(vector: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a (C,) vector repeated to (F, C, L), for a tile of (A, F, C, L)."""
    full = np.empty(shape[1:], vector.dtype)
    full[...] = vector[:, None]
    return full


def _fold(shape: tuple[int, ...]) -> int:
    """Return the number of samples of an array of ``shape``, (N, ...), that are folded into one row."""
    n, *rest = shape
    width = math.prod(rest)
    return 1 if n <= _FEW else max(1, min(n, _ROW // width))


def _slices(n: int, step: int) -> list[slice]:
    """Return slices of length ``step`` that cover an axis of length n; the last may be shorter."""
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


# Views of arrays, (N, C) or (N, C, L), and of weights, (N, 1) or (N, 1, L).


def _as_it_is(array: np.ndarray) -> np.ndarray:
    """Return an (N, C, L)."""
    return array


def _as_sequences(array: np.ndarray) -> np.ndarray:
    """Return an (N, C) as (N, C, 1)."""
    return array[:, :, None]


def _transposed(array: np.ndarray) -> np.ndarray:
    """Return an (N, C) as (1, 1, C, N): samples are positions."""
    return array.T[None, None]


def _as_rows(array: np.ndarray) -> np.ndarray:
    """Return an (N, C, L) as (N * L, C, 1): each position of a sample is a sample."""
    n, c, length = array.shape
    return array.swapaxes(1, 2).reshape(n * length, c, 1)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Return an (N, C, L) as (N, L, C, 1): positions are the samples of a row."""
    return array.swapaxes(1, 2)[..., None]
