"""The strides of the arrays of a call, for kernels that take strides.

A batch is rows x channels x positions::

    (N, C)     rows are samples, and each has one position
    (N, C, L)  rows are samples, positions go along L; sample weights, (N,) or (N, L), have a stride of 0 along channels
"""

from collections.abc import Sequence
from typing import NamedTuple


class Strides(NamedTuple):
    """The strides of an array, in values; 0 along an axis of length 1, where the array's own stride has no meaning."""

    row: int
    channel: int
    position: int


class Extents(NamedTuple):
    """The lengths of the axes of a batch."""

    rows: int
    channels: int
    positions: int


def described(
    shape: tuple[int, ...], strides: Sequence[tuple[int, ...]], weights: tuple[int, ...] | None
) -> tuple[Extents, list[Strides]]:
    """Return the extents of a batch and the strides of its arrays.

    Where the strides of all arrays allow it, rows and positions are merged to one axis, of rows.

    Args:
        shape: of the arrays, (N, C) or (N, C, L).
        strides: of each array, in values.
        weights: of sample weights, (N,) or (N, L), in values; their strides are the last of the result.
    """
    rows, channels, positions = (*shape, 1)[:3]
    given = [(*own, 0)[:3] for own in strides]
    if weights is not None:
        row, position = (*weights, 0)[:2]
        given.append((row, 0, position))
    found = [
        Strides(row * (rows > 1), channel * (channels > 1), position * (positions > 1))
        for row, channel, position in given
    ]
    if rows == 1 or (positions > 1 and all(own.row == positions * own.position for own in found)):
        found = [Strides(own.position, own.channel, 0) for own in found]
        rows, positions = rows * positions, 1
    return Extents(rows, channels, positions), found
