"""What the kernels in Triton have in common: offsets and extents of tensors, and loads of vectors.

Statistics are exact to float64, whatever x is, and every sum is a tree that shapes and strides determine: no program
adds to memory that another writes to. A value of weight 0 is replaced before anything is computed of it. Offsets are of
64 bits. Numbers of float64 come as the bits of an integer, since Triton would round them to float32.

x has rows, positions and channels; tiles of cells (a row and a position) by channels are shared out over axis 1 of the
grid, blocks of channels over axis 0. ``triton_tiles`` says how. No result depends on how but in its last bits.
"""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import (
    exponent_of,
    float64,
    scaled,
)

ROW_AXIS = tl.constexpr(0)
POSITION_AXIS = tl.constexpr(1)
CHANNEL_AXIS = tl.constexpr(2)

EXTENTS = ("num_rows", "num_positions", "num_channels", "position_tiles", "tiles")
OF_X = ("x_row", "x_position", "x_channel")
OF_Y = ("y_row", "y_position", "y_channel")
OF_DY = ("dy_row", "dy_position", "dy_channel")
OF_DX = ("dx_row", "dx_position", "dx_channel")
OF_WEIGHTS = ("w_row", "w_position")


@triton.jit
def _scaled(number, ALIGNED: tl.constexpr):
    """Return a stride or extent that was divided, so that the compiler knows by what it can be."""
    return number.to(tl.int64) * ALIGNED


@triton.jit
def cell_offsets(row, position, row_stride, position_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far cells are from the first."""
    if UNIT == ROW_AXIS:
        rows = row
    else:
        rows = row * _scaled(row_stride, ALIGNED)
    if UNIT == POSITION_AXIS:
        positions = position
    else:
        positions = position * _scaled(position_stride, ALIGNED)
    return rows + positions


@triton.jit
def channel_offsets(channel, stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far channels are from the first."""
    if UNIT == CHANNEL_AXIS:
        channels = channel.to(tl.int64)
    else:
        channels = channel * _scaled(stride, ALIGNED)
    return channels


@triton.jit
def value_offsets(
    row, position, channel, row_stride, position_stride, channel_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr
):
    """Return how far the values of a tile are from its first: cells, on one axis or on two, by channels."""
    cells = cell_offsets(row.to(tl.int64), position.to(tl.int64), row_stride, position_stride, UNIT, ALIGNED)
    return tl.expand_dims(cells, -1) + channel_offsets(channel, channel_stride, UNIT, ALIGNED)


@triton.jit
def extent_of(size, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an extent that was divided if its axis is the one along which x is contiguous."""
    if UNIT == AXIS:
        whole = _scaled(size, ALIGNED)
    else:
        whole = size.to(tl.int64)
    return whole


@triton.jit
def first_row(tile, position_tiles, CELLS: tl.constexpr, POSITIONS: tl.constexpr):
    """Return the first row of a tile; there may be more of them than 32 bits hold."""
    return (tile // position_tiles) * tl.full((), CELLS // POSITIONS, tl.int64)


@triton.jit
def load_vector(vector, channel, is_channel):
    """Return what a vector holds of channels, in float64."""
    return tl.load(vector + channel, mask=is_channel, other=0).to(tl.float64)


@triton.jit
def load_center(hi, lo, channel, is_channel):
    """Return a mean as a number and the rest of it; one without a rest is a number already."""
    first = load_vector(hi, channel, is_channel)
    if lo is None:
        center = first
        rest = first * 0
    else:
        second = load_vector(lo, channel, is_channel)
        center = first + second
        rest = (first - center) + second
    return center, rest


@triton.jit
def load_units(exponents, channel, is_channel):
    """Return the exponents of the units of statistics, 0 where none are given."""
    if exponents is None:
        unit = channel * 0
    else:
        unit = tl.load(exponents + channel, mask=is_channel, other=0).to(tl.int32)
    return unit


@triton.jit
def load_invstd(var, exponents, eps, channel, is_channel):
    """Return 1 / sqrt(var + eps) as a number and an exponent, and 0 where var + eps is 0."""
    own = tl.load(var + channel, mask=is_channel, other=1).to(tl.float64)
    little = float64(eps)
    common = load_units(exponents, channel, is_channel)
    if exponents is not None:  # units in which neither is beyond float64
        unit = common
        common = tl.where(unit == 0, 0, tl.maximum(unit, tl.where(little > 0, exponent_of(little) >> 1, unit)))
        own = scaled(own, 2 * (unit - common))
        little = scaled(scaled(little, -common), -common)
    spread = own + little
    return tl.where(spread == 0, 0.0, 1.0 / tl.sqrt(tl.where(spread == 0, 1.0, spread))), -common


@triton.jit
def weighed(number, exponent, weight, channel, is_channel):
    """Return a number and its exponent times what a vector holds, if there is one, as such."""
    if weight is not None:
        factor = load_vector(weight, channel, is_channel)
        own = exponent_of(number)
        other = exponent_of(factor)
        number = scaled(number, -own) * scaled(factor, -other)
        exponent = exponent + own + other
    return number, exponent


@triton.jit
def divisor_of(count):
    """Return what sums are divided by: the count, or 1 where that is 0 and so are the sums."""
    return tl.where(count == 0, 1.0, count)


@triton.jit
def load_partial(partials, program, channel, programs, channels, STATISTIC: tl.constexpr, STATISTICS: tl.constexpr):
    """Return one of so many statistics of some programs, 0 of those that there are not."""
    is_one = (program < programs)[:, None] & (channel < channels)[None, :]
    offset = (program.to(tl.int64) * STATISTICS + STATISTIC)[:, None] * channels + channel[None, :]
    return tl.load(partials + offset, mask=is_one, other=0.0)
