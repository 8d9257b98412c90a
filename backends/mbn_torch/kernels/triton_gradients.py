"""Gradients in Triton: one pass over x and dy for the sums of gradients, and one that writes dx.

The tree of the sums is that of the moments; ``triton_tiles`` shows how programs share tiles::

    x and dy, in tiles of UNROLLED x SUMS x CHANNELS values
        |  each program: sum over UNROLLED, add tile after tile, sum over SUMS
        v
    partials, programs x 2 x channels                row 0: dy, row 1: dy * (x - mean)
        |  finish_grad_sums: add PROGRAMS rows at a time, sum over PROGRAMS
        v
    sums, 2 x channels                               row 0: dy, row 1: dy * xhat
        |
        v
    dx = invstd * weight * (dy - sums[0] / n - xhat * sums[1] / n), tile by tile (without sample weights)

For x in float64, a product of a difference x - mean and a gradient may leave the range. So the kernels multiply x and
its center by ``before``, a power of two that brings differences near 1, and divide the scale by it.
"""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import FAR, as_dtype, exponent_before, exponent_of, limited, power, scaled
from mbn_torch.kernels.triton_tensors import (
    CHANNEL_AXIS,
    EXTENTS,
    OF_DX,
    OF_DY,
    OF_WEIGHTS,
    OF_X,
    POSITION_AXIS,
    ROW_AXIS,
    cell_offsets,
    divisor_of,
    extent_of,
    first_row,
    load_center,
    load_invstd,
    load_partial,
    load_units,
    load_vector,
    value_offsets,
    weighed,
)


@triton.jit(do_not_specialize=(*EXTENTS, *OF_X, *OF_DY, *OF_WEIGHTS, "eps"))
def grad_sums(
    x,
    dy,
    hi,
    lo,
    var,
    exponents,
    weights,
    partials,
    eps,
    num_rows,
    num_positions,
    num_channels,
    position_tiles,
    tiles,
    x_row,
    x_position,
    x_channel,
    dy_row,
    dy_position,
    dy_channel,
    w_row,
    w_position,
    UNIT_X: tl.constexpr,
    UNIT_DY: tl.constexpr,
    ALIGNED: tl.constexpr,
    CELLS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """Sum up dy and dy * (x - mean), with the mean rounded to float64.

    ``triton_tensors`` describes the arguments. The kernel writes ``partials``, programs x 2 x channels in float64.
    Cells of weight 0 are left out; the sums of the others are not weighted.

    For x in float64 the second factor is (x - mean) * before, since x - mean or the product might leave the range.
    """
    SUMS: tl.constexpr = CELLS // UNROLLED
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channels = extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    # The center of each channel and, for float64, the power of two that x and the center are multiplied by.
    center, _ = load_center(hi, lo, channel, is_channel)
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    if WIDE:
        number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
        unit = load_units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        before = power(first)[None, None, :]
        center = scaled(center, unit + first)
    center = center[None, None, :]
    # Row and position of each cell within a tile, in an array of parts by sums.
    cell = tl.arange(0, UNROLLED)[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
    row = cell // POSITIONS
    position = cell % POSITIONS
    of_x = value_offsets(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    of_dy = value_offsets(row, position, channel, dy_row, dy_position, dy_channel, UNIT_DY, ALIGNED)
    total = tl.zeros((SUMS, CHANNELS), tl.float64)
    products = tl.zeros((SUMS, CHANNELS), tl.float64)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = first_row(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        # Load a tile of x and one of dy; outside of the batch dy is 0, which adds 0 to both sums.
        mask = is_value[:, :, None] & is_channel[None, None, :]
        values = tl.load(x + cell_offsets(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        gradients = tl.load(
            dy + cell_offsets(top, left, dy_row, dy_position, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0
        )
        # Take deviations, in float64.
        if WIDE:
            d = values * before - center
        else:
            d = values.to(tl.float64) - center
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            # Replace both factors where the weight is 0, since either may be NaN.
            keep = (tl.load(weights + offset, mask=is_value, other=0) > 0)[:, :, None]
            d = tl.where(keep, d, 0.0)
            gradients = tl.where(keep, gradients, 0.0)
        # Accumulate. The sum over the parts of a tile stays within a thread.
        total += tl.sum(gradients, 0)
        products += tl.sum(d * gradients, 0)
    # Reduce the sums over the cells of a tile, and store the two of each channel.
    target = partials + tl.program_id(1) * 2 * channels + channel
    tl.store(target, tl.sum(total, 0), mask=is_channel)
    tl.store(target + channels, tl.sum(products, 0), mask=is_channel)


@triton.jit(do_not_specialize=("programs", "num_channels", "eps"))
def finish_grad_sums(
    partials,
    hi,
    lo,
    var,
    exponents,
    sums,
    rounded,
    eps,
    programs,
    num_channels,
    WIDE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Finish the sums of ``grad_sums``: those of dy and of dy * xhat, xhat being (x - mean) / sqrt(var + eps).

    - ``partials``: programs x 2 x channels in float64, with the extents ``programs`` and ``num_channels``.
    - ``hi``, ``lo``, ``var``, ``exponents``, ``eps``: the arguments of ``grad_sums``; see ``triton_tensors``.
    - ``sums``: (2, channels) in float64, written.
    - ``rounded``: the same in the dtype of the parameters, written; or None.
    - ``WIDE``: whether x is in float64.
    - ``PROGRAMS``, ``CHANNELS``: the block of partial sums that this program adds up at a time.
    """
    channels = num_channels.to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    total = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    products = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += load_partial(partials, program, channel, programs, channels, 0, 2)
        products += load_partial(partials, program, channel, programs, channels, 1, 2)
    # The products contain the factor ``before``: multiply the remainder of the mean by it, and divide the scale by it.
    center, rest = load_center(hi, lo, channel, is_channel)
    number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
    if WIDE:
        unit = load_units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        rest = scaled(rest, unit + first)
        exponent = exponent - first
    # The deviations are from the center, the rounded mean: sum dy * (x - mean) = sum dy * (x - center) - rest * sum dy.
    sum_dy = tl.sum(total, 0)
    sum_dy_xhat = (tl.sum(products, 0) - rest * sum_dy) * limited(scaled(number, exponent), tl.float64)
    tl.store(sums + channel, sum_dy, mask=is_channel)
    tl.store(sums + channels + channel, sum_dy_xhat, mask=is_channel)
    if rounded is not None:
        tl.store(rounded + channel, as_dtype(sum_dy, rounded.dtype.element_ty), mask=is_channel)
        tl.store(rounded + channels + channel, as_dtype(sum_dy_xhat, rounded.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=(*EXTENTS, *OF_X, *OF_DY, *OF_DX, *OF_WEIGHTS, "eps", "number"))
def grad_input(
    x,
    dy,
    dx,
    hi,
    lo,
    var,
    exponents,
    weight,
    sum_dy,
    sum_dy_xhat,
    count,
    weights,
    eps,
    number,
    num_rows,
    num_positions,
    num_channels,
    position_tiles,
    tiles,
    x_row,
    x_position,
    x_channel,
    dy_row,
    dy_position,
    dy_channel,
    dx_row,
    dx_position,
    dx_channel,
    w_row,
    w_position,
    UNIT_X: tl.constexpr,
    UNIT_DY: tl.constexpr,
    UNIT_DX: tl.constexpr,
    ALIGNED: tl.constexpr,
    CELLS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the gradient of x to dx, and 0 where the weight of a cell is 0.

    ``triton_tensors`` describes the arguments of all passes; ``dx`` is written. The others are:

    - ``sum_dy``, ``sum_dy_xhat``: (channels,) in float64, the sums of ``finish_grad_sums``, which may include those of
      other replicas. Both are None where mean and variance are constants; then dx is dy * scale, and x is not read.
    - ``count``: one float64, the sum of all weights; None where the count is ``number``, the values per channel.

    The kernel computes, with w the weight of a cell, or 1::

        dx = (dy - mean_dy * w - ((x * before - center) * slope + rest) * w) * scale * after

    All arithmetic is in float64 and rounded once, since large terms may cancel to a small dx. The mean of dy is
    subtracted first, so that a dy with a large mean loses few digits.
    """
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    # The scale of each channel, invstd * weight, as a number with an exponent.
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    factor, exponent = load_invstd(var, exponents, eps, channel, is_channel)
    share, size = weighed(factor, exponent, weight, channel, is_channel)
    after = size * 0
    if WIDE:  # Split the scale into two factors, since one alone may be out of range.
        whole = size + exponent_of(share)
        after = tl.where(share == 0, 0, whole - tl.minimum(tl.maximum(whole, -FAR), FAR))
    scale = limited(scaled(share, size - after), tl.float64)[None, :]
    after = power(after)[None, :]
    if sum_dy is not None:
        # The parts of dx that depend on all values: the mean of dy, and the projection of dy on xhat.
        if count is None:
            divisor = number.to(tl.float64)
        else:
            divisor = divisor_of(tl.load(count).to(tl.float64))
        if weights is not None:
            # A sum of dy divided by the sum of the weights may leave the range. So multiply the divisor by a power of
            # two that brings it near 1, and each weight by the same power.
            common = -exponent_of(divisor)
            divisor = scaled(divisor, common)
        mean_dy = (load_vector(sum_dy, channel, is_channel) / divisor)[None, :]
        center, rest = load_center(hi, lo, channel, is_channel)
        if WIDE:
            unit = load_units(exponents, channel, is_channel)
            first = exponent_before(factor, exponent, center, unit, tl.float64)
            before = power(first)[None, :]
            center = scaled(center, unit + first)
            rest = scaled(rest, unit + first)
            exponent = exponent - first
        # Write the projection, xhat * sum_dy_xhat / n, as (x * before - center) * slope + rest.
        slope = limited(scaled(factor, exponent), tl.float64)
        slope = load_vector(sum_dy_xhat, channel, is_channel) / divisor * slope
        rest = (-rest * slope)[None, :]
        slope = slope[None, :]
        center = center[None, :]
    # Row and position of each cell within a tile.
    cell = tl.arange(0, CELLS)
    row = cell // POSITIONS
    position = cell % POSITIONS
    of_x = value_offsets(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    of_dy = value_offsets(row, position, channel, dy_row, dy_position, dy_channel, UNIT_DY, ALIGNED)
    of_dx = value_offsets(row, position, channel, dx_row, dx_position, dx_channel, UNIT_DX, ALIGNED)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = first_row(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        # Load a tile of dy, and of the weights.
        mask = is_value[:, None] & is_channel[None, :]
        gradients = tl.load(
            dy + cell_offsets(top, left, dy_row, dy_position, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0
        )
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)[:, None]
        # Load a tile of x, and subtract the mean of dy and its projection.
        if sum_dy is not None:
            values = tl.load(x + cell_offsets(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
            if WIDE:
                values = values * before
            projection = (values.to(tl.float64) - center) * slope + rest
            if weights is None:
                gradients = (gradients - mean_dy) - projection
            else:
                part = w * power(common)
                gradients = (gradients - mean_dy * part) - projection * part
        # Scale, replace gradients of weight 0, and store them rounded.
        gradients *= scale
        if WIDE:
            gradients *= after
        if weights is not None:
            gradients = tl.where(w > 0, gradients, 0.0)
        target = dx + cell_offsets(top, left, dx_row, dx_position, UNIT_DX, ALIGNED)
        tl.store(target + of_dx, as_dtype(gradients, dx.dtype.element_ty), mask=mask)
