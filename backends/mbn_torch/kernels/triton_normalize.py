"""Normalisation in Triton: one pass over x, which writes y.

``triton_tiles`` shows how programs share the tiles of x; each writes the same tiles of y. Before its first tile, a
program computes four numbers for each of its channels::

    (channels,) vectors   hi, lo, var, exponents, weight, bias
            |
            v
    of each channel       before, center, scale, shift
            |
            v
    of each value         y = (x * before - center) * scale + shift
"""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import exponent_before, limited, power, scaled
from mbn_torch.kernels.triton_tensors import (
    CHANNEL_AXIS,
    EXTENTS,
    OF_WEIGHTS,
    OF_X,
    OF_Y,
    POSITION_AXIS,
    ROW_AXIS,
    cell_offsets,
    extent_of,
    first_row,
    load_center,
    load_invstd,
    load_units,
    load_vector,
    value_offsets,
    weighed,
)


@triton.jit(do_not_specialize=(*EXTENTS, *OF_X, *OF_Y, *OF_WEIGHTS, "eps"))
def normalize(
    x,
    y,
    hi,
    lo,
    var,
    exponents,
    weight,
    bias,
    weights,
    eps,
    num_rows,
    num_positions,
    num_channels,
    position_tiles,
    tiles,
    x_row,
    x_position,
    x_channel,
    y_row,
    y_position,
    y_channel,
    w_row,
    w_position,
    COMPUTE: tl.constexpr,
    UNIT_X: tl.constexpr,
    UNIT_Y: tl.constexpr,
    ALIGNED: tl.constexpr,
    CELLS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write (x - mean) / sqrt(var + eps) * weight + bias to y, and 0 where the weight of a cell is 0.

    ``triton_tensors`` describes the arguments. ``y`` is written; it may be x. ``COMPUTE`` is the dtype of the
    arithmetic: float64 for x in float64, else float32.

    The kernel computes (x - K) * scale + shift, with K the mean rounded to ``COMPUTE``: x - K is exact where x is near
    the mean, and the shift contains the remainder of the mean. If the scale is out of range, a power of two is moved
    from it to x and K, which are multiplied by that power first.
    """
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    # Load the statistics of the channels; compute the scale, weight / sqrt(var + eps), as a number with an exponent.
    mean, rest = load_center(hi, lo, channel, is_channel)
    number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
    number, exponent = weighed(number, exponent, weight, channel, is_channel)
    unit = load_units(exponents, channel, is_channel)
    # The shift corrects for the difference of center and mean. A scale of 0 gives the bias alone.
    center = limited(mean, COMPUTE).to(tl.float64)
    shift = tl.where(number == 0, 0.0, scaled(((center - mean) - rest) * number, exponent + unit))
    if bias is not None:
        shift += load_vector(bias, channel, is_channel)
    # Divide the exponent of the scale between a factor before the subtraction and one after it.
    first = exponent_before(number, exponent, center, unit, COMPUTE)
    before = tl.where(number == 0, 0.0, power(first)).to(COMPUTE)[None, :]
    center = tl.where(number == 0, 0.0, scaled(center, unit + first)).to(COMPUTE)[None, :]
    scale = limited(scaled(number, exponent - first), COMPUTE)[None, :]
    shift = shift.to(COMPUTE)[None, :]
    # Row and position of each cell within a tile.
    cell = tl.arange(0, CELLS)
    row = cell // POSITIONS
    position = cell % POSITIONS
    of_x = value_offsets(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    of_y = value_offsets(row, position, channel, y_row, y_position, y_channel, UNIT_Y, ALIGNED)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = first_row(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        # Load a tile, normalise it, replace values of weight 0, and store them rounded.
        mask = is_value[:, None] & is_channel[None, :]
        values = tl.load(x + cell_offsets(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        values = (values.to(COMPUTE) * before - center) * scale + shift
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            keep = tl.load(weights + offset, mask=is_value, other=0) > 0
            values = tl.where(keep[:, None], values, 0.0)
        target = y + cell_offsets(top, left, y_row, y_position, UNIT_Y, ALIGNED)
        tl.store(target + of_y, values.to(y.dtype.element_ty), mask=mask)
