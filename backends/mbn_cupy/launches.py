"""The layout of arrays in memory, and the grids of blocks and threads for them.

Arrays are rows x channels x positions, and ``cuda/threads.cuh`` has a sketch of their distribution over threads by
items and columns. This module chooses the numbers so that neighbouring threads read neighbouring memory::

    neighbours in memory    rows x channels x positions    item             position_threads    channel_threads
    channels                N*L x C x 1, or N x C x L      1-4 channels     1                   a cache line of items
    positions along L       N x C x L                      1-8 positions    up to a warp        the rest of a warp
    samples                 L x C x N, or 1 x C x N        1-8 positions    up to a warp        the rest of a warp

A grid is tiles of channels by shares of items. In a column of a block ``sharing`` threads take items in turn::

    all items of a channel    |---------- share ----------|---------- share ----------|-- the rest --|
                               blockIdx.y = 0              blockIdx.y = 1              blockIdx.y = 2
    share, for sums           a multiple of sharing * 16 items: a thread holds 16 at a time, or a divisor of 16
    share, for writing        a multiple of sharing * 4 items: a thread reads 4 before it writes any

All of this depends on shapes, strides and alignment alone, and not on the GPU, so that the bits of sums do not either.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cupy

from mbn_common.strides import described

THREADS = 256
"""The most threads of a block; ``threads.cuh`` has the same number."""
_WARP = 32
_LINE = 128
"""Bytes of a cache line, which neighbouring threads read together where channels are next to each other."""
_WIDEST = 16
"""Bytes that a thread can read at once."""
_CHUNK = 16
"""A thread sums up a multiple of this number of items, which is a multiple of each CHUNK in ``threads.cuh``."""
_ENOUGH_BLOCKS = 512
"""Blocks that keep a GPU busy. Beyond that a thread takes more items instead, since each block takes extra time."""
_SUMMING_BLOCKS = 4096
"""The most blocks of a kernel for sums: each writes a result, and all results should be small compared to x."""
_STEP = 4
"""Items that a thread reads before it writes any: UNROLLED in ``threads.cuh``."""
_WRITING_BLOCKS = 8192
"""The most blocks of a kernel that writes a value for each of x."""

Strides = tuple[int, int, int]
"""The strides of rows, channels and positions, in values."""


class Cover(NamedTuple):
    """A grid of blocks whose threads cover all values once."""

    blocks: tuple[int, int, int]
    """Blocks along channels, blocks along the items of a channel, and 1."""
    threads: tuple[int, int, int]
    """Threads of a block, along one axis."""
    arguments: tuple[int, ...]
    """The first arguments of a kernel: position_threads, channel_threads, share, rows, channels and positions."""


class Layout(NamedTuple):
    """Arrays of one shape as rows x channels x positions."""

    strides: tuple[Strides, ...]
    """The strides of the arrays in their order, and those of the weights, 0 along channels, at the end."""
    channels: int
    positions: int
    """Neighbouring channels and positions of an item, which a thread reads at once; one of them is 1."""
    summing: Cover
    """The grid of kernels that write a result for each block and channel."""
    writing: Cover
    """The grid of kernels that write a value for each of x."""


def layout(arrays: Sequence[cupy.ndarray], weights: cupy.ndarray | None) -> Layout:
    """Return the layout of arrays of one shape, (N, C) or (N, C, L), and of weights, (N,), (N, L) or None.

    Neighbouring threads take neighbouring values of the first array.
    """
    first = arrays[0]
    return _layout(
        first.shape,
        first.itemsize,
        tuple(array.strides for array in arrays),
        tuple(array.data.ptr % _WIDEST for array in arrays),
        None if weights is None else tuple(stride // weights.itemsize for stride in weights.strides),
    )


@lru_cache(maxsize=1024)  # this computation takes as long as the launches of a call
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
    # Neighbours in memory other than channels are positions: if rows are nearer in memory, the two axes are swapped.
    row, channel, position = map(abs, strides[0])
    if (row < channel or channels == 1) if positions == 1 else row < position:
        strides = [(position, channel, row) for row, channel, position in strides]
        rows, positions = positions, rows
    # Channels are contiguous: items are of channels.
    _, channel, position = map(abs, strides[0])
    if positions == 1 or channel < position:
        # Four channels at most, since a thread keeps the statistics of each in registers.
        widest = min(4, _WIDEST // itemsize)
        item = _item(
            [(channel, row, position) for row, channel, position in strides], channels, widest, itemsize, offsets
        )
        threads = 1, min(_power(channels // item), _WARP, _LINE // (item * itemsize))
        return _covered(strides, (rows, channels, positions), (item, 1), threads)
    # Positions are contiguous: items are of positions.
    widest = _WIDEST // itemsize
    item = _item([(position, row, channel) for row, channel, position in strides], positions, widest, itemsize, offsets)
    position_threads = min(_power(positions // item), _WARP)
    threads = position_threads, min(_power(channels), _WARP // position_threads)
    return _covered(strides, (rows, channels, positions), (1, item), threads)


def _item(strides: Sequence[Strides], length: int, widest: int, itemsize: int, offsets: tuple[int, ...]) -> int:
    """Return how many neighbours, along an axis of ``length``, can be read at once in all arrays: 8, 4, 2 or 1.

    ``strides`` are those of that axis first, then of the two others. ``offsets`` are bytes from an aligned address. An
    item has to be contiguous, and aligned to its size.
    """
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
    strides: Sequence[Strides], sizes: tuple[int, int, int], item: tuple[int, int], threads: tuple[int, int]
) -> Layout:
    """Return the layout of arrays with ``sizes`` rows, channels and positions.

    ``item`` is the channels and positions of an item, ``threads`` the threads along positions and along channels.
    """
    rows, channels, positions = sizes
    items = rows * (positions // item[1])
    sharing = min(THREADS // threads[1], _power(items))  # threads with the same channels
    tiles = -(-channels // (threads[1] * item[0]))
    # The steps that the threads of a column take together, of 16 items each for sums, and of 4 for writing.
    chunks = -(-items // (sharing * _CHUNK))
    blocks = min(max(chunks // 4, -(-_ENOUGH_BLOCKS // tiles)), max(1, _SUMMING_BLOCKS // tiles), chunks)
    steps = -(-items // (sharing * _STEP))

    def cover(share: int) -> Cover:
        return Cover((tiles, -(-items // share), 1), (sharing * threads[1], 1, 1), (*threads, share, *sizes))

    summing = cover(-(-chunks // blocks) * sharing * _CHUNK)
    writing = cover(-(-steps // max(1, _WRITING_BLOCKS // tiles)) * sharing * _STEP)
    return Layout(tuple(strides), *item, summing, writing)


def _power(number: int) -> int:
    """Return the least power of two that is not less than a number."""
    return 1 << (number - 1).bit_length()
