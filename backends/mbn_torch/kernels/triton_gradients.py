"""Gradients in Triton: a pass over x and dy that sums up, and one that writes dx."""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import (
    FAR,
    as_dtype,
    exponent_before,
    exponent_of,
    limited,
    power,
    scaled,
)
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
    """Sum up dy and dy * (x - mean), the mean rounded to float64: one row of partials per program.

    Of float64, the second factor is multiplied by a power of two where it or the product might leave its range.
    """
    SUMS: tl.constexpr = CELLS // UNROLLED
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channels = extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    center, _ = load_center(hi, lo, channel, is_channel)
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    if WIDE:
        number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
        unit = load_units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        before = power(first)[None, None, :]
        center = scaled(center, unit + first)
    center = center[None, None, :]
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
        mask = is_value[:, :, None] & is_channel[None, None, :]
        values = tl.load(x + cell_offsets(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        gradients = tl.load(
            dy + cell_offsets(top, left, dy_row, dy_position, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0
        )
        if WIDE:
            d = values * before - center
        else:
            d = values.to(tl.float64) - center
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            keep = (tl.load(weights + offset, mask=is_value, other=0) > 0)[:, :, None]
            d = tl.where(keep, d, 0.0)
            gradients = tl.where(keep, gradients, 0.0)
        total += tl.sum(gradients, 0)
        products += tl.sum(d * gradients, 0)
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
    """Make of partial sums those of dy and dy * xhat, the two rows of sums; and the same, rounded, of another dtype."""
    channels = num_channels.to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    total = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    products = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += load_partial(partials, program, channel, programs, channels, 0, 2)
        products += load_partial(partials, program, channel, programs, channels, 1, 2)
    center, rest = load_center(hi, lo, channel, is_channel)
    number, exponent = load_invstd(var, exponents, eps, channel, is_channel)
    if WIDE:
        unit = load_units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        rest = scaled(rest, unit + first)
        exponent = exponent - first
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
    """Write the gradient of x to dx; ``count``, or the number where that is None, is what the sums are divided by.

    Computed in float64 and rounded once: where it is small its terms are not. The mean of dy is taken off before
    anything else, so that little is lost of a gradient with a large mean.
    """
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    factor, exponent = load_invstd(var, exponents, eps, channel, is_channel)
    share, size = weighed(factor, exponent, weight, channel, is_channel)
    after = size * 0
    if WIDE:  # two factors, since one may be out of range
        whole = size + exponent_of(share)
        after = tl.where(share == 0, 0, whole - tl.minimum(tl.maximum(whole, -FAR), FAR))
    scale = limited(scaled(share, size - after), tl.float64)[None, :]
    after = power(after)[None, :]
    if sum_dy is not None:
        if count is None:
            divisor = number.to(tl.float64)
        else:
            divisor = divisor_of(tl.load(count).to(tl.float64))
        if weights is not None:  # a sum of dy divided by that of all weights may leave the range
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
        slope = limited(scaled(factor, exponent), tl.float64)
        slope = load_vector(sum_dy_xhat, channel, is_channel) / divisor * slope
        rest = (-rest * slope)[None, :]
        slope = slope[None, :]
        center = center[None, :]
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
        mask = is_value[:, None] & is_channel[None, :]
        gradients = tl.load(
            dy + cell_offsets(top, left, dy_row, dy_position, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0
        )
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)[:, None]
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
        gradients *= scale
        if WIDE:
            gradients *= after
        if weights is not None:
            gradients = tl.where(w > 0, gradients, 0.0)
        target = dx + cell_offsets(top, left, dx_row, dx_position, UNIT_DX, ALIGNED)
        tl.store(target + of_dx, as_dtype(gradients, dx.dtype.element_ty), mask=mask)
