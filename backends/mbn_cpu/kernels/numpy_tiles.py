"""Arrays cut into tiles: what one thread does at a time, and what its cache can hold.

All arrays are seen with four axes, (A, F, C, L): F rows are folded into one where rows are too short for a loop, and
an (N, C) has an L of 1. Nothing here copies an array. How sums are cut depends on the shape of x alone, so that neither
the memory order nor the number of threads changes a bit.
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
"""Values that a tile has at most: 1.5 MiB in float64. Fewer make threads wait for each other in the interpreter."""
_FEW = 32
"""Rows that are not worth folding."""
_ROW = 1 << 13
"""Values that a row should have at least where there are more rows: NumPy sets up a loop for each."""
_WIDTH = 1 << 13
"""Values that a row of a tile has at most, so that a tile has many rows to sum up."""
_LONG = 256
"""Values along L for which a loop of their own pays; shorter ones are made into longer rows."""

Tile: TypeAlias = tuple[slice, slice, slice, slice]
View: TypeAlias = Callable[[np.ndarray], np.ndarray]


class Layout(NamedTuple):
    """A way to see arrays of one shape."""

    view: View
    """From an array in the shape of x, or one that broadcasts against it, to (N, C, L), or to (A, F, C, L) at once."""
    fold: int
    """F."""

    def parts(self, array: np.ndarray) -> list[np.ndarray]:
        """Return an array as (A, F, C, L), and what is left over of it as another one."""
        array = self.view(array)
        if array.ndim == 4:
            return [array]
        if self.fold == 1:
            return [array[:, None]]
        full = len(array) - len(array) % self.fold
        parts = [array[:full].reshape(-1, self.fold, *array.shape[1:]), array[None, full:]]
        return parts[: 1 + (full < len(array))]


def for_sums(x: np.ndarray) -> Layout:
    """Return the layout to sum up x in: the same whatever its memory order is."""
    view = _as_sequences if x.ndim == 2 else _as_it_is
    return Layout(view, _fold(x.shape))


def for_values(x: np.ndarray, *others: np.ndarray) -> Layout:
    """Return the layout to go through the values of x, and of others in its shape, in: along the memory of x."""
    if x.ndim == 2:
        return Layout(_transposed, 1) if x.strides[0] < x.strides[1] else for_sums(x)
    _, c, length = x.shape
    if x.strides[1] >= x.strides[2] or c == 1 or length == 1:
        return for_sums(x)
    if all(array.strides == x.strides for array in others) and x.strides[0] == length * x.strides[2]:
        return Layout(_as_rows, _fold((len(x) * length, c)))
    return Layout(_channels_last, 1)


def cut(shape: tuple[int, ...]) -> list[list[Tile]]:
    """Return tiles of ``SIZE`` values at most that cover an (A, F, C, L), in lists that cover all channels each."""
    a, f, c, length = shape
    along = min(length, SIZE)
    across = min(c, max(1, _WIDTH // along))
    deep = min(f, max(1, SIZE // (along * across)))
    high = max(1, SIZE // (along * across * deep))
    starts = product(_slices(a, high), _slices(f, deep), _slices(length, along))
    return [[(i, j, channels, k) for channels in _slices(c, across)] for i, j, k in starts]


def of(array: np.ndarray, tile: Tile) -> np.ndarray:
    """Return what an (A, F, C, L) has at a tile, or one with an axis of 1 that broadcasts against such."""
    _, _, c, _ = array.shape
    return array[tile] if c > 1 else array[(*tile[:2], slice(None), *tile[3:])]


class Scratch:
    """Arrays to compute in, kept for the next tile and the next call: the pages of new ones would cost more than these.

    As a context it hands out one that nobody else has.
    """

    _free: ClassVar[deque["Scratch"]] = deque(maxlen=num_processors())

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._taken = 0

    @classmethod
    @contextmanager
    def taken(cls) -> Iterator["Scratch"]:
        """Hand out one for a ``with`` block, and take it back with all its arrays."""
        try:
            scratch = cls._free.pop()
        except IndexError:
            scratch = cls()
        scratch._taken = 0
        yield scratch
        cls._free.append(scratch)

    def copy(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return a copy in C order, in an array that is not in use."""
        copy = self.empty(values.shape, dtype)
        np.copyto(copy, values, casting="unsafe")
        return copy

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array that is not in use."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._taken == len(self._buffers):
            self._buffers.append(np.empty(0, np.uint8))
        if self._buffers[self._taken].size < size:
            self._buffers[self._taken] = np.empty(size, np.uint8)
        buffer = self._buffers[self._taken][:size]
        self._taken += 1
        return buffer.view(dtype).reshape(shape)


class Columns:
    """Vectors of the channels, (C,), in forms that broadcast against tiles in long loops."""

    def __init__(self, *vectors: np.ndarray) -> None:
        self._vectors = vectors
        self._spread: dict[tuple[int, ...], list[np.ndarray]] = {}

    def of(self, tile: Tile, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Return what the vectors have for a tile of ``shape``."""
        _, f, c, length = shape
        if length >= _LONG or f == length == 1:
            return [vector[tile[2], None] for vector in self._vectors]
        if c < len(self._vectors[0]):
            return [_spread(vector[tile[2]], shape) for vector in self._vectors]
        if shape[1:] not in self._spread:  # the same for nearly all tiles
            self._spread[shape[1:]] = [_spread(vector, shape) for vector in self._vectors]
        return self._spread[shape[1:]]


def _spread(vector: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    full = np.empty(shape[1:], vector.dtype)
    full[...] = vector[:, None]
    return full


def _fold(shape: tuple[int, ...]) -> int:
    n, *rest = shape
    width = math.prod(rest)
    return 1 if n <= _FEW else max(1, min(n, _ROW // width))


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


def _as_sequences(array: np.ndarray) -> np.ndarray:
    return array[:, :, None]


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.T[None, None]


def _as_rows(array: np.ndarray) -> np.ndarray:
    n, c, length = array.shape
    return array.swapaxes(1, 2).reshape(n * length, c, 1)


def _channels_last(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(1, 2)[..., None]
