"""Gradients in Triton: a pass over x and dy that sums up, and one that writes dx.

Sums are made in the same tree as moments are, and programs share tiles as ``triton_tiles`` sketches it::

    x and dy, in tiles of UNROLLED x SUMS x CHANNELS values
        |  each program: sum over UNROLLED, add tile after tile, sum over SUMS
        v
    partials, programs x 2 x channels                row 0: dy, row 1: dy * (x - mean)
        |  finish_grad_sums: add PROGRAMS rows at a time, sum over PROGRAMS
        v
    sums, 2 x channels                               row 0: dy, row 1: dy * xhat
        |
        v
    dx = invstd * weight * (dy - sums[0] / n - xhat * sums[1] / n), tile by tile, here without sample weights

In x of float64 a difference x - mean may be as far from 1 as float64 allows, and so may gradients. There the kernels
multiply x and its center by ``before``, a power of two that brings differences near 1, and take it off the scale again.
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

    ``triton_tensors`` describes the arguments. ``partials``, programs x 2 x channels in float64, is written. Values of
    weight 0 do not count, and the others count once, whatever their weights are.

    Of x in float64 the second factor is (x - mean) * before, since it or the product might leave the range.
    """
    SUMS: tl.constexpr = CELLS // UNROLLED
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channels = extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    # The center of each channel, and of float64 the power of two before it.
    center, _ = load_center(hi, lo, channel, is_channel)
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    if WIDE:
        number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
        unit = load_units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        before = power(first)[None, None, :]
        center = scaled(center, unit + first)
    center = center[None, None, :]
    # The cells of a tile as parts by sums, and where each is within a tile.
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
        # Load a tile of each; where there is no value, a dy of 0 adds nothing.
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
            # Both factors are replaced, since either may be NaN.
            keep = (tl.load(weights + offset, mask=is_value, other=0) > 0)[:, :, None]
            d = tl.where(keep, d, 0.0)
            gradients = tl.where(keep, gradients, 0.0)
        # Accumulate: first over the parts of the tile, which a thread holds itself.
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
    - ``hi``, ``lo``, ``var``, ``exponents``, ``eps``: as ``triton_tensors`` has them, and as ``grad_sums`` got them.
    - ``sums``: (2, channels) in float64, written.
    - ``rounded``: the same in the dtype of the parameters, written; None where nobody wants it.
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
    # The products have the factor ``before``: the rest of the mean gets it too, and the scale loses it.
    center, rest = load_center(hi, lo, channel, is_channel)
    number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
    if WIDE:
        unit = load_units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        rest = scaled(rest, unit + first)
        exponent = exponent - first
    # The deviations were from the rounded mean: sum dy * (x - mean) = sum dy * (x - center) - rest * sum dy.
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

    - ``sum_dy``, ``sum_dy_xhat``: (channels,) in float64, the sums of ``finish_grad_sums``, perhaps over more batches
      than this one. Both are None where mean and variance are constants; dx is dy * scale then, and x is not read.
    - ``count``: one float64, the sum of all weights; None where ``number``, the number of values per channel, counts.

    It computes, with w the weight of a cell, or 1::

        dx = (dy - mean_dy * w - ((x * before - center) * slope + rest) * w) * scale * after

    All is computed in float64 and rounded once: where dx is small its terms are not. The mean of dy is taken off first,
    so that little is lost of a gradient with a large mean.
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
    if WIDE:  # The scale is two factors, since one alone may be out of range.
        whole = size + exponent_of(share)
        after = tl.where(share == 0, 0, whole - tl.minimum(tl.maximum(whole, -FAR), FAR))
    scale = limited(scaled(share, size - after), tl.float64)[None, :]
    after = power(after)[None, :]
    if sum_dy is not None:
        # How dx depends on all values: by the mean of dy, and by the slope of its projection on x.
        if count is None:
            divisor = number.to(tl.float64)
        else:
            divisor = divisor_of(tl.load(count).to(tl.float64))
        if weights is not None:
            # A sum of dy divided by the sum of all weights may leave the range. So the divisor is brought near 1, and
            # each weight is multiplied by the same power of two.
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
        # The projection on xhat, xhat * sum_dy_xhat / n, as (x * before - center) * slope + rest.
        slope = limited(scaled(factor, exponent), tl.float64)
        slope = load_vector(sum_dy_xhat, channel, is_channel) / divisor * slope
        rest = (-rest * slope)[None, :]
        slope = slope[None, :]
        center = center[None, :]
    # Where the cells of a tile are within it.
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
        # Load a tile of x, and take off the two parts of dy that the statistics of the batch take away.
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
