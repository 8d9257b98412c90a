"""The cutting of a batch into tiles for the kernels in Triton.

A batch is rows x positions x channels, whatever order memory has. A cell is one row at one position. A tile is CELLS
cells by CHANNELS channels, and its cells are CELLS / POSITIONS rows by POSITIONS positions. All of these are powers of
two::

                 channels of block 0      channels of block 1
              p0  p1  p2  p3 | p4  p5     p0  p1  p2  p3 | p4  p5       POSITIONS = 4, CELLS = 8:
             +---------------+-------    +---------------+-------       a tile has 2 rows
        r0   |               |           |               |
        r1   |    tile 0     |  tile 1   |    tile 0     |  tile 1      position_tiles = 2,
             +---------------+-------    +---------------+-------       tiles side by side along positions
        r2   |               |           |               |
        r3   |    tile 2     |  tile 3   |    tile 2     |  tile 3      tiles = 4, in each block of channels
             +---------------+-------    +---------------+-------

Axis 0 of the grid has one program per block of channels, axis 1 the programs that share the tiles of a block: of P
programs, program p takes the tiles p, p + P, p + 2 P, ... and masks what of them lies outside the batch.

A kernel that sums up sees the cells of a tile as UNROLLED parts of SUMS = CELLS / UNROLLED cells::

        part 0   s0 s1 s2 s3  |
        part 1   s0 s1 s2 s3  |  added first: one thread holds all values of a column
                 -----------  v
        sums     s0 s1 s2 s3     SUMS x CHANNELS numbers in float64, to which each tile of the program adds

The tiles depend on shapes, strides and the dtype alone, so sums are made in one order on every card. The axis along
which memory is contiguous lies along the lanes of a warp, and a load is of 16 bytes wherever strides allow.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mbn_common.strides import described

ROWS, POSITIONS, CHANNELS = range(3)
"""The axes of a batch: the kernels sum over rows and positions. ``triton_tensors`` has the same numbers."""

_NO_AXIS = -1
"""The axis of a tensor that is contiguous along none."""
_VECTOR = 16
"""Bytes that a thread loads at a time."""
_SEGMENT = 128
"""Neighbouring bytes that memory hands over at once."""
_BYTES = 64
_VALUES = 16
"""Bytes and values of a tile that a thread holds at most.

Several loads under way at the same time hide the latency of memory. More values would need so many registers in float64
that a multiprocessor could not hold several programs, of which one loads while the others compute.
"""
_WARPS = 4
"""Warps of a program at most: small programs fill the registers of a multiprocessor with less left over."""
_NARROWEST, _WIDEST = 64, 1024
"""Least and largest number of neighbouring positions (or rows) in a tile, where there are as many."""
_SLACK = 1.25
"""Ratio of what tiles cover to what there is, beyond which smaller tiles are better."""
_FEW = 256
"""Tiles in all below which smaller ones are made, so that all multiprocessors of a large card are busy."""
_MANY = {True: 2048, False: 4096}
"""Programs at most, of a kernel that sums (True) and of one that writes results (False).

They are a few for each multiprocessor of a large card, so that none waits long for the last. More programs would only
add partial sums and work that is done once per program.
"""


class Tiling(NamedTuple):
    """A grid of programs, and the arguments that tell them their tiles."""

    grid: tuple[int, int]
    """Blocks of channels, and programs that share the tiles of each."""
    extents: tuple[int, ...]
    """Rows, positions, channels, tiles side by side along positions, and tiles of a block of channels.

    The extent along the axis of ``units[0]`` is divided by ``ALIGNED``.
    """
    strides: tuple[tuple[int, ...], ...]
    """Strides of each tensor along rows, positions and channels, in values; at last those of the weights, if any.

    Those of a tensor are divided by ``ALIGNED``, but for the stride of 1 along its axis in ``units``. Those of the
    weights are as they are.
    """
    constants: dict[str, Any]
    """Constants of all kernels: ``CELLS``, ``POSITIONS``, ``CHANNELS``, ``ALIGNED``, and options of the compiler."""
    loads: int
    """``UNROLLED``: parts of a tile, as many as a thread has loads of it, so that it adds up the parts by itself."""
    units: tuple[int, ...]
    """The axis along which each tensor is contiguous (has a stride of 1), or -1."""


def tiling(tensors: Sequence[torch.Tensor], weights: torch.Tensor | None, *, sums: bool) -> Tiling:
    """Return the tiles of a batch.

    Args:
        tensors: of one shape, (N, C) or (N, C, L); the first is x, and its strides determine the tiles.
        weights: the sample weights, (N,) or (N, L), or None.
        sums: whether each program leaves partial sums, instead of a result for each value.
    """
    x = tensors[0]
    strides = tuple(tensor.stride() for tensor in tensors)
    return _tiling(x.shape, strides, None if weights is None else weights.stride(), x.itemsize, sums)


@lru_cache(maxsize=1024)
def _tiling(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    weights: tuple[int, ...] | None,
    itemsize: int,
    sums: bool,
) -> Tiling:
    # Where all tensors allow it, rows and positions are one axis of rows, and there is one position.
    (rows, channels, positions), found = described(shape, strides, weights)
    extents = rows, positions, channels
    all_strides = [(of.row, of.position, of.channel) for of in found]
    units = [next((axis for axis in (CHANNELS, POSITIONS, ROWS) if of[axis] == 1), _NO_AXIS) for of in all_strides]
    count = len(strides)
    # The compiler loads 16 bytes at a time only where it knows offsets to be aligned. So all strides but those of 1 are
    # divided by a common power of two, which is compiled in, and the kernels multiply by it again. The extent along the
    # contiguous axis is one of them, since the mask of a load has to be the same for all of its values.
    others = [s for of, unit in zip(all_strides[:count], units, strict=False) for a, s in enumerate(of) if a != unit]
    main = units[0]
    if main != _NO_AXIS:
        others.append(extents[main])
    aligned = next(divisor for divisor in (16, 8, 4, 2, 1) if not any(number % divisor for number in others))
    warps, cells, beside, block = _tile(extents, main, itemsize)
    # The grid: tiles along positions, tiles in all, blocks of channels.
    position_tiles = -(-positions // beside)
    tiles = position_tiles * -(-rows // (cells // beside))
    blocks = -(-channels // block)
    divided = [
        tuple(s // aligned if axis != unit else s for axis, s in enumerate(of))
        for of, unit in zip(all_strides[:count], units, strict=False)
    ]
    constants = {
        "CELLS": cells,
        "POSITIONS": beside,
        "CHANNELS": block,
        "ALIGNED": aligned,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    return Tiling(
        (blocks, max(1, min(tiles, _MANY[sums] // blocks))),
        (*(e // aligned if axis == main else e for axis, e in enumerate(extents)), position_tiles, tiles),
        (*divided, *all_strides[count:]),
        constants,
        min(cells, max(1, cells * block * itemsize // (_VECTOR * 32 * warps))),
        tuple(units[:count]),
    )


def _tile(extents: tuple[int, ...], main: int, itemsize: int) -> tuple[int, int, int, int]:
    """Return the number of warps, and the cells, the positions and the channels of a tile.

    ``main`` is the axis along which x is contiguous.
    """
    rows, positions, channels = extents
    total = rows * positions
    beside = _fitting(positions, _NARROWEST, _WIDEST)
    # The contiguous axis first: a tile has at least one segment of memory along it, where there is as much.
    if main == CHANNELS:
        block = _fitting(channels, _SEGMENT // itemsize, 512 // itemsize)
    else:
        width = beside if main == POSITIONS else min(_above(rows), _WIDEST)
        block = min(_above(channels), max(1, _SEGMENT // itemsize // width))
    # Values of a tile: all that the threads can hold, or less, down to one load of each thread, for more programs.
    size = _WARPS * 32 * min(_BYTES // itemsize, _VALUES)
    while size > _WARPS * 32 * _VECTOR // itemsize and -(-total * _above(channels) // size) < _FEW:
        size //= 2
    cells = min(max(1, size // block), _above(rows) * beside)
    beside = min(beside, cells)
    warps = min(_WARPS, max(1, cells * block * itemsize // (_VECTOR * 32)))
    return warps, cells, beside, block


def _fitting(size: int, least: int, most: int) -> int:
    """Return a power of two from ``least`` to ``most`` as the width of tiles that cover ``size``, or one that does.

    It is the largest one whose tiles cover little more than ``size``; where none is, the one whose tiles cover least.
    """
    if size <= least:
        return _above(size)
    widths = [width for width in (1 << k for k in reversed(range(most.bit_length()))) if least <= width <= most]
    covered = {width: -(-size // width) * width for width in widths}
    return next((width for width in widths if covered[width] <= _SLACK * size), min(widths, key=covered.__getitem__))


def _above(size: int) -> int:
    """Return the least power of two that is not less than ``size``."""
    return 1 << (size - 1).bit_length()
