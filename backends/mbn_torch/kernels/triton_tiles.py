"""The tiling of a batch for the kernels in Triton.

A batch is rows x positions x channels, in any memory order. A cell is one row at one position. A tile is CELLS cells by
CHANNELS channels, and its cells are CELLS / POSITIONS rows by POSITIONS positions. All of these are powers of two::

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
programs, program p handles the tiles p, p + P, p + 2 P, ... and masks their cells outside of the batch.

A kernel that sums up divides the cells of a tile into UNROLLED parts of SUMS = CELLS / UNROLLED cells::

        part 0   s0 s1 s2 s3  |
        part 1   s0 s1 s2 s3  |  added first: one thread holds all values of a column
                 -----------  v
        sums     s0 s1 s2 s3     SUMS x CHANNELS numbers in float64, to which each tile of the program adds

The tiles depend on shapes, strides and the dtype alone, so the order of a sum is the same on every GPU. Neighbouring
threads of a warp load neighbouring memory, 16 bytes each wherever the strides allow.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mbn_common.strides import described

ROWS, POSITIONS, CHANNELS = range(3)
"""The axes of a batch: the kernels sum over rows and positions. ``triton_tensors`` has the same numbers."""

_NO_AXIS = -1
"""The contiguous axis of a tensor without a stride of 1."""
_VECTOR = 16
"""Bytes that a thread loads at a time."""
_SEGMENT = 128
"""Bytes of one memory transaction."""
_BYTES = 64
_VALUES = 16
"""The most bytes and values of a tile that a thread holds.

Several loads in flight hide the latency of memory. More values would need so many registers in float64 that a
multiprocessor could not hold several programs, of which one loads while the others compute.
"""
_WARPS = 4
"""The most warps of a program: small programs leave fewer registers of a multiprocessor unused."""
_NARROWEST, _WIDEST = 64, 1024
"""The least and the largest number of neighbouring positions (or rows) in a tile, if the batch has as many."""
_SLACK = 1.25
"""The ratio of the extent that tiles cover to the extent of the batch above which smaller tiles are better."""
_FEW = 256
"""Below this number of tiles in all, tiles are made smaller, to occupy all multiprocessors of a large GPU."""
_MANY = {True: 2048, False: 4096}
"""The most programs of a kernel that sums (True) and of one that writes results (False).

This is a few per multiprocessor of a large GPU, so that the others do not wait long for the last one. More programs
would only add partial sums, and repeat the work that each program does once.
"""


class Tiling(NamedTuple):
    """A grid of programs, and the arguments from which each program derives its tiles."""

    grid: tuple[int, int]
    """Blocks of channels, and programs that share the tiles of each block."""
    extents: tuple[int, ...]
    """Rows, positions, channels, tiles side by side along positions, and tiles of a block of channels.

    The extent along the axis of ``units[0]`` is divided by ``ALIGNED``.
    """
    strides: tuple[tuple[int, ...], ...]
    """The strides of each tensor along rows, positions and channels, in values; last those of the weights, if any.

    The strides of a tensor are divided by ``ALIGNED``, except the stride of 1 along its axis in ``units``. Those of the
    weights are not divided.
    """
    constants: dict[str, Any]
    """Constants of all kernels: ``CELLS``, ``POSITIONS``, ``CHANNELS``, ``ALIGNED``, and options of the compiler."""
    loads: int
    """``UNROLLED``: the parts of a tile, one per load of a thread, so that a thread adds up the parts by itself."""
    units: tuple[int, ...]
    """The axis along which each tensor is contiguous (has a stride of 1), or -1."""


def tiling(tensors: Sequence[torch.Tensor], weights: torch.Tensor | None, *, sums: bool) -> Tiling:
    """Return the tiles of a batch.

    Args:
        tensors: of one shape, (N, C) or (N, C, L); the first is x, and its strides determine the tiles.
        weights: the sample weights, (N,) or (N, L), or None.
        sums: whether each program writes partial sums, instead of a result for each value.
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
    # If the strides of all tensors allow it, ``described`` merges rows and positions into rows of one position.
    (rows, channels, positions), found = described(shape, strides, weights)
    extents = rows, positions, channels
    all_strides = [(of.row, of.position, of.channel) for of in found]
    units = [next((axis for axis in (CHANNELS, POSITIONS, ROWS) if of[axis] == 1), _NO_AXIS) for of in all_strides]
    count = len(strides)
    # The compiler loads 16 bytes at a time only where it knows that offsets are aligned. So all strides except those of
    # 1 are divided by a common power of two, a compile-time constant by which the kernels multiply again. So is the
    # extent along the contiguous axis, since the mask of a load must be the same for all of its values.
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
    """Return the number of warps, and the cells, positions and channels of a tile.

    ``main`` is the axis along which x is contiguous.
    """
    rows, positions, channels = extents
    total = rows * positions
    beside = _fitting(positions, _NARROWEST, _WIDEST)
    # The contiguous axis first: a tile extends over at least one memory transaction along it, if the batch does.
    if main == CHANNELS:
        block = _fitting(channels, _SEGMENT // itemsize, 512 // itemsize)
    else:
        width = beside if main == POSITIONS else min(_above(rows), _WIDEST)
        block = min(_above(channels), max(1, _SEGMENT // itemsize // width))
    # Values of a tile: as many as the threads can hold; fewer, down to one load per thread, if there are few tiles.
    size = _WARPS * 32 * min(_BYTES // itemsize, _VALUES)
    while size > _WARPS * 32 * _VECTOR // itemsize and -(-total * _above(channels) // size) < _FEW:
        size //= 2
    cells = min(max(1, size // block), _above(rows) * beside)
    beside = min(beside, cells)
    warps = min(_WARPS, max(1, cells * block * itemsize // (_VECTOR * 32)))
    return warps, cells, beside, block


def _fitting(size: int, least: int, most: int) -> int:
    """Return the width of tiles along an axis of ``size``, a power of two from ``least`` to ``most``.

    It is the largest width whose tiles cover at most ``_SLACK`` times ``size``; if there is none, the width whose tiles
    cover least. For a ``size`` of at most ``least``, one tile covers the axis.
    """
    if size <= least:
        return _above(size)
    widths = [width for width in (1 << k for k in reversed(range(most.bit_length()))) if least <= width <= most]
    covered = {width: -(-size // width) * width for width in widths}
    return next((width for width in widths if covered[width] <= _SLACK * size), min(widths, key=covered.__getitem__))


def _above(size: int) -> int:
    """Return the least power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()
