"""Arrays cut into tiles: what one thread does at a time, and what its cache can hold.

All arrays are seen with four axes, (A, F, C, L): F rows are folded into one where rows are too short for a loop, and an
(N, C) has an L of 1. Nothing here copies an array. How sums are cut depends on the shape of x alone, so that neither the
memory order nor the number of threads changes a bit.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple, TypeAlias

import numpy as np

_RUN = 64
"""Rows that can be added one after another before rounding errors in float64 count."""
_ROW = 1 << 10
"""Values that a row should have at least where there are more rows: NumPy sets up a loop for each."""
_WIDTH = 1 << 12
"""Values that a row of a tile has at most, so that a tile has many rows to sum up."""
_LONG = 256
"""Values along L for which a loop of their own pays; shorter ones are made into longer rows."""

Tile: TypeAlias = tuple[slice, slice, slice, slice]
View: TypeAlias = Callable[[np.ndarray], np.ndarray]


class Form(NamedTuple):
    """A way to see arrays of one shape."""

    view: View
    """From an array in the shape of x, or one that broadcasts against it, to (N, C, L), or to (A, F, C, L) at once."""
    fold: int
    """F."""

    def parts(self, array: np.ndarray) -> list[np.ndarray]:
        """Return an array as (A, F, C, L), and what is left over of it as another one."""
        array = self.view(array)
        if array.ndim == 4:  # noqa: PLR2004 - (A, F, C, L)
            return [array]
        if self.fold == 1:
            return [array[:, None]]
        whole = len(array) - len(array) % self.fold
        parts = [array[:whole].reshape(-1, self.fold, *array.shape[1:]), array[None, whole:]]
        return parts[: 1 + (whole < len(array))]


def for_sums(x: np.ndarray) -> Form:
    """Return the form to sum up x in: the same whatever its memory order is."""
    view = _as_sequences if x.ndim == 2 else _as_it_is  # noqa: PLR2004 - (N, C)
    return Form(view, _fold(x.shape))


def for_values(x: np.ndarray) -> Form:
    """Return the form to go through the values of x in: along its memory."""
    if x.ndim == 2:  # noqa: PLR2004 - (N, C)
        return Form(_transposed, 1) if x.strides[0] < x.strides[1] else for_sums(x)
    _, c, length = x.shape
    if x.strides[1] >= x.strides[2] or c == 1 or length == 1:
        return for_sums(x)
    if x.strides[0] == length * x.strides[2]:
        return Form(_as_rows, _fold((len(x) * length, c)))
    return Form(_channels_last, 1)


def cut(shape: tuple[int, ...], size: int) -> list[list[Tile]]:
    """Return tiles of at most ``size`` values each that cover an (A, F, C, L): lists of those that cover all channels."""
    a, f, c, length = shape
    along = min(length, size)
    across = min(c, max(1, _WIDTH // along))
    deep = min(f, max(1, size // (along * across)))
    high = max(1, size // (along * across * deep))
    places = product(_slices(a, high), _slices(f, deep), _slices(length, along))
    return [[(i, j, channels, k) for channels in _slices(c, across)] for i, j, k in places]


def of(array: np.ndarray, tile: Tile) -> np.ndarray:
    """Return what an (A, F, C, L) has at a tile, or one with an axis of 1 that broadcasts against such."""
    _, _, c, _ = array.shape
    return array[tile] if c > 1 else array[tile[:2] + (slice(None),) + tile[3:]]


def size_of(x: np.ndarray) -> int:
    """Return how many values of x a tile has.

    Fewer would leave threads waiting for each other in the interpreter. Of float64, whose last digit counts, there are
    no more than can be added up in a run of rows; of other arrays, a share for each of several threads.
    """
    return _RUN * _ROW if x.dtype == np.float64 else min(1 << 18, max(1 << 16, x.size // 4))


def spread(vector: np.ndarray, tile: Tile, shape: tuple[int, ...]) -> np.ndarray:
    """Return what (C,) ``vector`` has for a tile of ``shape``, in a form that broadcasts against it in long loops."""
    column = vector[tile[2], None]
    _, f, c, length = shape
    if length >= _LONG or f == length == 1:
        return column
    full = np.empty((f, c, length), vector.dtype)
    full[...] = column
    return full


def _fold(shape: tuple[int, ...]) -> int:
    n, *rest = shape
    width = int(np.prod(rest))
    return 1 if n <= _RUN else max(1, min(n, _ROW // width))


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
