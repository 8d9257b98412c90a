"""How arrays lie in memory, and which threads read what of them.

It depends on shapes, strides and alignment alone, and how sums are split on shapes: the same on every GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cupy

THREADS = 256
"""In a block, as in the source."""
_WARP = 32
_LINE = 128
"""Bytes of a cache line: what neighbouring threads read together at least, where channels are next to each other."""
_WIDEST = 16
"""Bytes that a thread can read at once."""
_RUN = 16
"""Items that a thread reads in a run, or a multiple of it."""
_ENOUGH_BLOCKS = 512
"""To keep a GPU busy: beyond that, a thread has several runs, so that the blocks' own work counts for less."""
_BLOCKS = 4096
"""At most, where each leaves a result behind: few enough for those to be small beside x."""
_WRITING_BLOCKS = 8192
"""At most, where none does."""
_UNROLLED = 4
"""Items that such a thread reads at a time."""

Strides = tuple[int, int, int]
"""Of rows, channels and places, in values."""


class Layout(NamedTuple):
    """Arrays of one shape as rows x channels x places, and the items and lanes of the threads; see the source."""

    rows: int
    channels: int
    places: int
    strides: tuple[Strides, ...]
    """Of the arrays in their order, and of the weights at last, whose channels are all one."""
    item: tuple[int, int]
    """Channels and places that a thread reads at once; one of them is 1."""
    place_lanes: int
    channel_lanes: int

    @property
    def lanes(self) -> int:
        """Threads in a block that share a channel: a power of two."""
        return min(THREADS // self.channel_lanes, power(self.items))

    @property
    def items(self) -> int:
        """Items of a channel."""
        return self.rows * (self.places // self.item[1])

    @property
    def tiles(self) -> int:
        """Blocks side by side, for all channels."""
        return -(-self.channels // (self.channel_lanes * self.item[0]))

    def summing(self) -> int:
        """Return how many items of a channel a block takes to sum them up."""
        runs = -(-self.items // (self.lanes * _RUN))
        blocks = min(max(runs // 4, -(-_ENOUGH_BLOCKS // self.tiles)), max(1, _BLOCKS // self.tiles))
        return -(-runs // min(blocks, runs)) * self.lanes * _RUN

    def writing(self) -> int:
        """Return how many items of a channel a block takes where each value has a result of its own."""
        steps = -(-self.items // (self.lanes * _UNROLLED))
        return -(-steps // max(1, _WRITING_BLOCKS // self.tiles)) * self.lanes * _UNROLLED


def layout(arrays: Sequence[cupy.ndarray], weights: cupy.ndarray | None) -> Layout:
    """Return the layout of arrays of (N, C) or (N, C, L), by whose first the order of the threads goes, and weights."""
    first = arrays[0]
    rows, channels, places = (*first.shape, 1)[:3]
    strides = [tuple(step // array.itemsize for step in (*array.strides, 0)[:3]) for array in arrays]
    if weights is not None:
        row, place = (step // weights.itemsize for step in (*weights.strides, 0)[:2])
        strides.append((row, 0, place))
    # An axis of one has no stride.
    strides = [(row * (rows > 1), channel * (channels > 1), place * (places > 1)) for row, channel, place in strides]
    if rows == 1 or all(row == places * place for row, _, place in strides):  # one axis, in two pieces
        strides = [(place if places > 1 else row, channel, 0) for row, channel, place in strides]
        rows, places = rows * places, 1
    row, channel, place = map(abs, strides[0])
    if (row < channel or channels == 1) if places == 1 else row < place:  # neighbours are places
        strides = [(place, channel, row) for row, channel, place in strides]
        rows, places = places, rows
    row, channel, place = map(abs, strides[0])
    along_channels = places == 1 or channel < place
    item = _item(arrays, strides[: len(arrays)], channels if along_channels else places, along_channels)
    size = item * first.itemsize
    if along_channels:
        lanes = 1, min(power(channels // item), _WARP, _LINE // size)
        return Layout(rows, channels, places, tuple(strides), (item, 1), *lanes)
    place_lanes = min(power(places // item), _WARP)
    lanes = place_lanes, min(power(channels), _WARP // place_lanes)
    return Layout(rows, channels, places, tuple(strides), (1, item), *lanes)


def _item(arrays: Sequence[cupy.ndarray], strides: Sequence[Strides], length: int, along_channels: bool) -> int:  # noqa: FBT001
    """Return how many neighbours can be read at once, along an axis of a length, in all arrays."""
    itemsize = arrays[0].itemsize
    # Four channels: of each, a thread keeps what it has found.
    widest = min(4, _WIDEST // itemsize) if along_channels else _WIDEST // itemsize
    for size in (8, 4, 2):
        if size > widest or length % size:
            continue
        if all(
            (channel if along_channels else place) == 1
            and row % size == 0
            and (place if along_channels else channel) % size == 0
            and array.data.ptr % (size * itemsize) == 0
            for array, (row, channel, place) in zip(arrays, strides, strict=True)
        ):
            return size
    return 1


def power(number: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (number - 1).bit_length()
