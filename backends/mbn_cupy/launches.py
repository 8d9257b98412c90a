"""How arrays lie in memory, and which threads of a GPU read what of them.

It depends on shapes, strides and alignment alone: not on the GPU, or bits would.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cupy

from mbn_common.strides import described

THREADS = 256
"""In a block, at most: as in ``threads.cuh``."""
_WARP = 32
_LINE = 128
"""Bytes of a cache line: what neighbouring threads read together, where channels are next to each other."""
_WIDEST = 16
"""Bytes that a thread can read at once."""
_RUN = 16
"""A multiple of the items that a thread sums up in a run."""
_ENOUGH_BLOCKS = 512
"""Blocks to keep a GPU busy. Where there would be more, threads do several runs: blocks have work of their own."""
_SUMMING_BLOCKS = 4096
"""At most, since each leaves a result behind: they are to be small beside x."""
_STEP = 4
"""Items that a thread reads before it writes any."""
_WRITING_BLOCKS = 8192
"""At most."""

Strides = tuple[int, int, int]
"""Of rows, channels and positions, in values."""


class Cover(NamedTuple):
    """A grid of blocks that goes through all values once."""

    blocks: tuple[int, int, int]
    """Those for all channels, and those that share a channel."""
    threads: tuple[int, int, int]
    arguments: tuple[int, ...]
    """The kernels' first: lanes of positions and of channels, items that a block shares, rows, channels, positions."""


class Layout(NamedTuple):
    """Arrays of one shape as rows x channels x positions."""

    strides: tuple[Strides, ...]
    """Of the arrays in their order; at last of the weights, which have one channel for all."""
    channels: int
    positions: int
    """Neighbours that a thread reads at once, its item: channels or positions, of which the other is 1."""
    summing: Cover
    """For kernels that leave a result for each block and channel."""
    writing: Cover
    """For those that write to each position."""


def layout(arrays: Sequence[cupy.ndarray], weights: cupy.ndarray | None) -> Layout:
    """Return the layout of arrays of (N, C) or (N, C, L), and weights; the order of threads is that of the first."""
    first = arrays[0]
    return _layout(
        first.shape,
        first.itemsize,
        tuple(array.strides for array in arrays),
        tuple(array.data.ptr % _WIDEST for array in arrays),
        None if weights is None else tuple(stride // weights.itemsize for stride in weights.strides),
    )


@lru_cache(maxsize=1024)  # a call would take as long without as its launches do
def _layout(
    shape: tuple[int, ...],
    itemsize: int,
    all_strides: tuple[tuple[int, ...], ...],
    offsets: tuple[int, ...],
    weights_strides: tuple[int, ...] | None,
) -> Layout:
    own_strides = [tuple(stride // itemsize for stride in own) for own in all_strides]
    strides: Sequence[Strides]
    (rows, channels, positions), strides = described(shape, own_strides, weights_strides)
    row, channel, position = map(abs, strides[0])
    if (row < channel or channels == 1) if positions == 1 else row < position:  # neighbours are positions
        strides = [(position, channel, row) for row, channel, position in strides]
        rows, positions = positions, rows
    _, channel, position = map(abs, strides[0])
    if positions == 1 or channel < position:
        # Four channels at most, since a thread keeps what it has found of each.
        widest = min(4, _WIDEST // itemsize)
        item = _item(
            [(channel, row, position) for row, channel, position in strides], channels, widest, itemsize, offsets
        )
        lanes = 1, min(_power(channels // item), _WARP, _LINE // (item * itemsize))
        return _covered(strides, (rows, channels, positions), (item, 1), lanes)
    widest = _WIDEST // itemsize
    item = _item([(position, row, channel) for row, channel, position in strides], positions, widest, itemsize, offsets)
    position_lanes = min(_power(positions // item), _WARP)
    lanes = position_lanes, min(_power(channels), _WARP // position_lanes)
    return _covered(strides, (rows, channels, positions), (1, item), lanes)


def _item(strides: Sequence[Strides], length: int, widest: int, itemsize: int, offsets: tuple[int, ...]) -> int:
    """Return how many neighbours, along the axis of the first strides, can be read at once in all arrays."""
    own = list(zip(strides, offsets, strict=False))  # weights have no offset: they are read one by one
    for size in (8, 4, 2):
        if size > widest or length % size:
            continue
        if all(
            along == 1 and not (other % size or another % size or offset % (size * itemsize))
            for (along, other, another), offset in own
        ):
            return size
    return 1


def _covered(
    strides: Sequence[Strides], sizes: tuple[int, int, int], item: tuple[int, int], lanes: tuple[int, int]
) -> Layout:
    rows, channels, positions = sizes
    items = rows * (positions // item[1])
    sharing = min(THREADS // lanes[1], _power(items))  # threads with the same channels
    tiles = -(-channels // (lanes[1] * item[0]))
    runs = -(-items // (sharing * _RUN))
    blocks = min(max(runs // 4, -(-_ENOUGH_BLOCKS // tiles)), max(1, _SUMMING_BLOCKS // tiles), runs)
    steps = -(-items // (sharing * _STEP))

    def cover(share: int) -> Cover:
        return Cover((tiles, -(-items // share), 1), (sharing * lanes[1], 1, 1), (*lanes, share, *sizes))

    summing = cover(-(-runs // blocks) * sharing * _RUN)
    writing = cover(-(-steps // max(1, _WRITING_BLOCKS // tiles)) * sharing * _STEP)
    return Layout(tuple(strides), *item, summing, writing)


def _power(number: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (number - 1).bit_length()
