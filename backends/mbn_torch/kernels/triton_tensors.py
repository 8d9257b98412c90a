"""The helpers that several kernels in Triton share: offsets and extents of tensors, and loads of vectors.

Rules of all kernels: statistics are exact to float64 for every dtype of x. Every sum is a tree that shapes and strides
determine, since no program adds to memory that another writes to. A value of weight 0 is replaced before any arithmetic
reads it. Offsets have 64 bits. A Python float is passed as an integer with the bits of a float64, because Triton would
round it to float32.

``triton_tiles`` sketches the tiles of a batch, and how programs share them. Another tiling changes only the last bits
of a result.

Arguments that all passes over a batch share:

- ``x``, ``y``, ``dy``, ``dx``: pointers to tensors of rows x positions x channels in x's dtype, in any memory order.
  Each has three strides in values, ``x_row``, ``x_position`` and ``x_channel`` for x. ``UNIT_X`` is the axis whose
  stride is 1, or -1; the other strides are divided by ``ALIGNED``.
- ``num_rows``, ``num_positions``, ``num_channels``: the extents of the batch. That of the axis ``UNIT_X`` is divided by
  ``ALIGNED``. ``position_tiles`` is the number of tiles side by side along positions, ``tiles`` that of all tiles of a
  block of channels.
- ``weights``: the weight of each cell, rows x positions in float32 or float64, with the strides ``w_row`` and
  ``w_position`` in values (0 along an axis where the weight is constant); None where each value counts once.
- ``hi``, ``lo``: the mean of each channel is hi + lo. ``var``: the biased variance. All are (channels,), contiguous.
  Statistics of the batch are in float64; a running mean is ``hi`` in its own dtype, with a ``lo`` of None.
- ``exponents``: the exponents of the units of mean and variance, (channels,) integers, for x in float64; None if all
  units are 1. The mean is (hi + lo) * 2**exponent, the variance var * 2**(2 * exponent).
- ``weight``, ``bias``: the parameters, (channels,) in their dtype, contiguous; each may be None.
- ``eps``: the bits of a float64.
- ``CELLS``, ``POSITIONS``, ``CHANNELS``, ``UNROLLED``: the shape of a tile.

Triton compiles a branch on a constant, or on whether an argument is None, only if it is taken.
"""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import exponent_of, float64, scaled

# The axes, with the numbers of ``triton_tiles``.
ROW_AXIS = tl.constexpr(0)
POSITION_AXIS = tl.constexpr(1)
CHANNEL_AXIS = tl.constexpr(2)

# Arguments that Triton must not specialise: by default it compiles other versions for 1 and for multiples of 16.
EXTENTS = ("num_rows", "num_positions", "num_channels", "position_tiles", "tiles")
OF_X = ("x_row", "x_position", "x_channel")
OF_Y = ("y_row", "y_position", "y_channel")
OF_DY = ("dy_row", "dy_position", "dy_channel")
OF_DX = ("dx_row", "dx_position", "dx_channel")
OF_WEIGHTS = ("w_row", "w_position")


@triton.jit
def _scaled(number, ALIGNED: tl.constexpr):
    """Return a stride or extent that was divided by ``ALIGNED``: the compiler sees the factor, and aligned loads."""
    return number.to(tl.int64) * ALIGNED


@triton.jit
def cell_offsets(row, position, row_stride, position_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the offsets of cells, given by their rows and positions, from the first cell of a tensor, in values."""
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
    """Return the offsets of channels from the first channel, in values."""
    if UNIT == CHANNEL_AXIS:
        channels = channel.to(tl.int64)
    else:
        channels = channel * _scaled(stride, ALIGNED)
    return channels


@triton.jit
def value_offsets(
    row, position, channel, row_stride, position_stride, channel_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr
):
    """Return the offsets of the values of a tile from its first value: the shape of ``row`` plus channels.

    ``row`` and ``position`` locate each cell within its tile; their shape is (cells,), or parts x cells.
    """
    cells = cell_offsets(row.to(tl.int64), position.to(tl.int64), row_stride, position_stride, UNIT, ALIGNED)
    return tl.expand_dims(cells, -1) + channel_offsets(channel, channel_stride, UNIT, ALIGNED)


@triton.jit
def extent_of(size, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the extent along an axis; it was divided by ``ALIGNED`` if x is contiguous along the axis."""
    if UNIT == AXIS:
        whole = _scaled(size, ALIGNED)
    else:
        whole = size.to(tl.int64)
    return whole


@triton.jit
def first_row(tile, position_tiles, CELLS: tl.constexpr, POSITIONS: tl.constexpr):
    """Return the first row of a tile, in 64 bits, since there may be more rows than 32 bits can count."""
    return (tile // position_tiles) * tl.full((), CELLS // POSITIONS, tl.int64)


@triton.jit
def load_vector(vector, channel, is_channel):
    """Return the elements of a (channels,) vector for a block of channels, in float64; channels out of range read 0."""
    return tl.load(vector + channel, mask=is_channel, other=0).to(tl.float64)


@triton.jit
def load_center(hi, lo, channel, is_channel):
    """Return the mean hi + lo rounded to float64, and its rounding error; a ``lo`` of None is 0."""
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
    """Return the exponents of the units of statistics as int32, 0 where ``exponents`` is None."""
    if exponents is None:
        unit = channel * 0
    else:
        unit = tl.load(exponents + channel, mask=is_channel, other=0).to(tl.int32)
    return unit


@triton.jit
def load_invstd(var, exponents, eps, channel, is_channel):
    """Return 1 / sqrt(var + eps) as a number and an exponent, and 0 where var + eps is 0.

    The variance is in the square of a unit, and in that unit eps may be out of float64's range.
    """
    own = tl.load(var + channel, mask=is_channel, other=1).to(tl.float64)
    little = float64(eps)
    common = load_units(exponents, channel, is_channel)
    if exponents is not None:
        # Convert both to the larger of two units: that of var, and about the square root of eps. Neither overflows in
        # it, and the smaller one may underflow to 0.
        unit = common
        common = tl.where(unit == 0, 0, tl.maximum(unit, tl.where(little > 0, exponent_of(little) >> 1, unit)))
        own = scaled(own, 2 * (unit - common))
        little = scaled(scaled(little, -common), -common)
    # Now var + eps is spread * 2**(2 * common). The inner ``where`` avoids a division by 0.
    spread = own + little
    return tl.where(spread == 0, 0.0, 1.0 / tl.sqrt(tl.where(spread == 0, 1.0, spread))), -common


@triton.jit
def weighed(number, exponent, weight, channel, is_channel):
    """Return a number with an exponent times ``weight``, (channels,), as a number with an exponent; a None is 1."""
    if weight is not None:
        # Bring both numbers to exponents of 0 first, so that the product stays in range.
        factor = load_vector(weight, channel, is_channel)
        own = exponent_of(number)
        other = exponent_of(factor)
        number = scaled(number, -own) * scaled(factor, -other)
        exponent = exponent + own + other
    return number, exponent


@triton.jit
def divisor_of(count):
    """Return the divisor of sums: the count, or 1 if the count is 0, where the sums are 0 too."""
    return tl.where(count == 0, 1.0, count)


@triton.jit
def load_partial(partials, program, channel, programs, channels, STATISTIC: tl.constexpr, STATISTICS: tl.constexpr):
    """Return one statistic's partial sums for a block of programs and channels, (PROGRAMS, CHANNELS) in float64.

    Programs and channels out of range read 0. ``partials`` is programs x STATISTICS x channels in float64, contiguous;
    ``STATISTIC`` is an index along its second axis.
    """
    is_one = (program < programs)[:, None] & (channel < channels)[None, :]
    offset = (program.to(tl.int64) * STATISTICS + STATISTIC)[:, None] * channels + channel[None, :]
    return tl.load(partials + offset, mask=is_one, other=0.0)
