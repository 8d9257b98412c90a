"""How a batch is cut into tiles for the kernels in Triton.

All depends on shapes and strides alone, so that sums are made in one order on every card. Whatever order memory has,
the axis along which it is contiguous lies along the lanes of a warp, and a load is of 16 bytes wherever strides allow.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mbn_common.strides import described

ROWS, POSITIONS, CHANNELS = range(3)
"""The axes of a batch: what is summed over is rows, and in each of them positions."""

_NO_AXIS = -1
_VECTOR = 16
"""Bytes that a thread loads at a time."""
_SEGMENT = 128
"""Bytes in a row that memory hands over at once."""
_BYTES = 64
_VALUES = 16
"""Bytes and values of a tile that a thread holds at most: loads under way at the same time hide the latency of memory,
and registers in float64 have to suffice for some programs on a multiprocessor: one loads while the others compute."""
_WARPS = 4
"""Warps of a program at most: the fewer, the more of the registers of a multiprocessor are in use."""
_NARROWEST, _WIDEST = 64, 1024
"""Places or rows that a tile has beside each other, where there are as many."""
_SLACK = 1.25
"""How much more tiles may cover than there is, before smaller ones are better."""
_FEW = 256
"""Programs of which there ought to be more, with smaller tiles, that a large card is busy in all its parts."""
_MANY = {True: 2048, False: 4096}
"""Programs that there are at most, of sums and of results: a few for each multiprocessor of a large card, so that none
waits for the last; more would only add partial sums, and work that is once per program."""


class Tiling(NamedTuple):
    """A grid of programs, and what they have to know."""

    grid: tuple[int, int]
    """Blocks of channels, and programs that share the tiles of each."""
    extents: tuple[int, ...]
    """Rows, positions and channels, tiles beside each other along positions, and tiles."""
    strides: tuple[tuple[int, ...], ...]
    """Those of each tensor along rows, positions and channels."""
    constants: dict[str, Any]
    """What is compiled in, of all kernels: ``num_warps``, the shape of a tile, and what divides strides and extents."""
    loads: int
    """Parts of a tile, as many as a thread has loads of it: it holds the values of one cell in each of them itself."""
    units: tuple[int, ...]
    """The axis along which each tensor is contiguous."""


def tiling(tensors: Sequence[torch.Tensor], weights: torch.Tensor | None, *, sums: bool) -> Tiling:
    """Return the tiles of a batch, the first of tensors of its shape, (N, C) or (N, C, L); ``weights`` are (N[, L]).

    ``sums`` says whether there is a result per program, not per value. Strides of weights, along rows and positions,
    are the last.
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
    (rows, channels, positions), found = described(shape, strides, weights)
    extents = rows, positions, channels
    all_strides = [(of.row, of.position, of.channel) for of in found]
    units = [next((axis for axis in (CHANNELS, POSITIONS, ROWS) if of[axis] == 1), _NO_AXIS) for of in all_strides]
    count = len(strides)
    others = [s for of, unit in zip(all_strides[:count], units, strict=False) for a, s in enumerate(of) if a != unit]
    main = units[0]
    if main != _NO_AXIS:
        others.append(extents[main])
    aligned = next(divisor for divisor in (16, 8, 4, 2, 1) if not any(number % divisor for number in others))
    warps, cells, beside, block = _tile(extents, main, itemsize)
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
    """Return the number of warps, and of a tile how many cells it has, how many of them in a row, and channels."""
    rows, positions, channels = extents
    total = rows * positions
    beside = _fitting(positions, _NARROWEST, _WIDEST)
    if main == CHANNELS:
        block = _fitting(channels, _SEGMENT // itemsize, 512 // itemsize)
    else:
        width = beside if main == POSITIONS else min(_above(rows), _WIDEST)
        block = min(_above(channels), max(1, _SEGMENT // itemsize // width))
    size = _WARPS * 32 * min(_BYTES // itemsize, _VALUES)
    while size > _WARPS * 32 * _VECTOR // itemsize and -(-total * _above(channels) // size) < _FEW:
        size //= 2
    cells = min(max(1, size // block), _above(rows) * beside)
    beside = min(beside, cells)
    warps = min(_WARPS, max(1, cells * block * itemsize // (_VECTOR * 32)))
    return warps, cells, beside, block


def _fitting(size: int, least: int, most: int) -> int:
    """Return the largest power of two of which some cover ``size`` with little left over, or the one with the least."""
    if size <= least:
        return _above(size)
    widths = [width for width in (1 << k for k in reversed(range(most.bit_length()))) if least <= width <= most]
    covered = {width: -(-size // width) * width for width in widths}
    return next((width for width in widths if covered[width] <= _SLACK * size), min(widths, key=covered.__getitem__))


def _above(size: int) -> int:
    """Return the least power of two that is not less than ``size``."""
    return 1 << (size - 1).bit_length()
