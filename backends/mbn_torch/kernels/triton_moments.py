"""The moments of a batch in Triton, and the step of running statistics."""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import (
    FARTHEST,
    as_dtype,
    exponent_of,
    float64,
    is_far,
    limited,
    power,
    scaled,
)
from mbn_torch.kernels.triton_tensors import (
    CHANNEL_AXIS,
    EXTENTS,
    OF_WEIGHTS,
    OF_X,
    POSITION_AXIS,
    ROW_AXIS,
    cell_offsets,
    channel_offsets,
    divisor_of,
    extent_of,
    first_row,
    load_partial,
    load_units,
    load_vector,
    value_offsets,
)

_LARGE = tl.constexpr(600)
"""The exponent of a unit in which no sum of float64 overflows, and of values far enough from 1 none loses digits."""

_OF_SUMS = ("programs", "num_channels", "x_channel", "middle", "last", "number")


@triton.jit
def _one_of_three(x, middle, last, is_channel):
    """Return the one in the middle of three values of each channel, so that an outlier is not what sums are around."""
    a = tl.load(x, mask=is_channel, other=0).to(tl.float64)
    b = tl.load(x + middle, mask=is_channel, other=0).to(tl.float64)
    c = tl.load(x + last, mask=is_channel, other=0).to(tl.float64)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit(do_not_specialize=(*EXTENTS, *OF_X, *OF_WEIGHTS, "middle", "last"))
def moments(
    x,
    weights,
    shift,
    exponents,
    partials,
    num_rows,
    num_positions,
    num_channels,
    position_tiles,
    tiles,
    x_row,
    x_position,
    x_channel,
    w_row,
    w_position,
    middle,
    last,
    UNIT_X: tl.constexpr,
    ALIGNED: tl.constexpr,
    CELLS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROUGH: tl.constexpr,
):
    """Sum up x - shift and its square, each as often as it counts, and the weights: one row of partials per program.

    ``shift`` is one value of each channel, or None for one of three; with ``exponents`` it is what finish_rough_moments
    says, and both its first row and x are in units of their powers of two. Then each term goes into two sums: one of
    multiples of a power of two, which is exact, and one of what is left of them. If ``ROUGH``, instead of squares there
    are the differences again, in a large unit, and at last the largest of them: what can be known of values of any
    size. What a thread holds of a tile it sums up first, which leaves fewer sums to keep.
    """
    SUMS: tl.constexpr = CELLS // UNROLLED
    rows = extent_of(num_rows, ROW_AXIS, UNIT_X, ALIGNED)
    positions = extent_of(num_positions, POSITION_AXIS, UNIT_X, ALIGNED)
    channels = extent_of(num_channels, CHANNEL_AXIS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    across = channel_offsets(channel, x_channel, UNIT_X, ALIGNED)
    if shift is None:
        first = _one_of_three(x + across, middle, last, is_channel)
    else:
        first = tl.load(shift + channel, mask=is_channel, other=0)
    first = as_dtype(first, x.dtype.element_ty)
    start = first.to(tl.float64)
    factor = power(-load_units(exponents, channel, is_channel))
    if exponents is not None:
        start = load_vector(shift, channel, is_channel)
        apart = load_vector(shift + channels, channel, is_channel)[None, None, :]
        apart_squares = load_vector(shift + 2 * channels, channel, is_channel)[None, None, :]
        total_left = tl.zeros((SUMS, CHANNELS), tl.float64)
        squares_left = tl.zeros((SUMS, CHANNELS), tl.float64)
    if ROUGH:
        factor = power(channel * 0 - _LARGE)
        largest = tl.zeros((SUMS, CHANNELS), tl.float64)
    cell = tl.arange(0, UNROLLED)[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
    row = cell // POSITIONS
    position = cell % POSITIONS
    within = value_offsets(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    total = tl.zeros((SUMS, CHANNELS), tl.float64)
    squares = tl.zeros((SUMS, CHANNELS), tl.float64)
    count = tl.zeros((UNROLLED, SUMS), tl.float64)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = first_row(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        source = x + cell_offsets(top, left, x_row, x_position, UNIT_X, ALIGNED)
        mask = is_value[:, :, None] & is_channel[None, None, :]
        # Where there is no value, the shift stands in for it, and adds nothing.
        values = tl.load(source + within, mask=mask, other=first[None, None, :]).to(tl.float64)
        if exponents is None:
            d = values - start[None, None, :]
        else:
            d = tl.where(mask, values * factor[None, None, :] - start[None, None, :], 0.0)
        if ROUGH:
            far = values * factor[None, None, :] - (start * factor)[None, None, :]
        once = d
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)
            d = tl.where((w > 0)[:, :, None], d, 0.0)
            once = d * w[:, :, None]
            if ROUGH:
                far = tl.where((w > 0)[:, :, None], far, 0.0) * w[:, :, None]
            count += w
        square = once * d
        if exponents is not None:
            left_of_once = once
            left_of_square = square
            once = (once + apart) - apart
            square = (square + apart_squares) - apart_squares
            total_left += tl.sum(left_of_once - once, 0)
            squares_left += tl.sum(left_of_square - square, 0)
        total += tl.sum(once, 0)
        if ROUGH:
            squares += tl.sum(far, 0)
        else:
            squares += tl.sum(square, 0)
        if ROUGH:
            largest = tl.maximum(largest, tl.max(tl.abs(d), 0))
    STATISTICS: tl.constexpr = (2 if weights is None else 3) + (ROUGH if exponents is None else 2)
    target = partials + tl.program_id(1) * STATISTICS * channels + channel
    if exponents is not None:
        tl.store(target + (STATISTICS - 2) * channels, tl.sum(total_left, 0), mask=is_channel)
        tl.store(target + (STATISTICS - 1) * channels, tl.sum(squares_left, 0), mask=is_channel)
    if ROUGH:
        tl.store(target + (STATISTICS - 1) * channels, tl.max(largest, 0), mask=is_channel)
    if weights is not None:
        counts = tl.zeros((CHANNELS,), tl.float64) + tl.sum(tl.sum(count, 1), 0)
        tl.store(target + 2 * channels, counts, mask=is_channel)
    tl.store(target, tl.sum(total, 0), mask=is_channel)
    tl.store(target + channels, tl.sum(squares, 0), mask=is_channel)


@triton.jit(do_not_specialize=_OF_SUMS)
def finish_rough_moments(
    partials,
    x,
    shift,
    center,
    exponents,
    programs,
    num_channels,
    x_channel,
    middle,
    last,
    number,
    WEIGHTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Make of rough sums the exponents of units in which no channel is beyond float64, and three rows in those.

    They are about its mean, and the powers of two that take terms apart: those of x - mean and of its squares. What is
    left of a term after one has been added to it and taken off is a multiple of its last digit, and no sum of such
    multiples is as large as it is.

    Source: Rump, Ogita and Oishi, Accurate Floating-Point Summation Part I, 2008, section 3.
    """
    channels = num_channels.to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    total = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    far = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    counts = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    largest = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    STATISTICS: tl.constexpr = 4 if WEIGHTED else 3
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += load_partial(partials, program, channel, programs, channels, 0, STATISTICS)
        far += load_partial(partials, program, channel, programs, channels, 1, STATISTICS)
        if WEIGHTED:
            counts += load_partial(partials, program, channel, programs, channels, 2, STATISTICS)
        more = load_partial(partials, program, channel, programs, channels, STATISTICS - 1, STATISTICS)
        largest = tl.maximum(largest, more)
    spread = tl.max(largest, 0)
    unit = tl.where(is_far(spread), tl.minimum(exponent_of(spread), FARTHEST), 0)
    if WEIGHTED:
        count = tl.sum(counts, 0)
    else:
        count = tl.zeros((CHANNELS,), tl.float64) + number.to(tl.float64)
    if shift is None:
        start = _one_of_three(x + channel * x_channel.to(tl.int64), middle, last, is_channel)
    else:
        start = load_vector(shift, channel, is_channel)
    near = scaled(tl.sum(total, 0) / divisor_of(count), -unit)
    near = tl.where(unit > 0, scaled(tl.sum(far, 0) / divisor_of(count), _LARGE - unit), near)
    tl.store(center + channel, scaled(start, -unit) + near, mask=is_channel)
    spread = scaled(limited(spread, tl.float64), -unit)  # the bound has room for a difference beyond float64
    tl.store(center + channels + channel, power(exponent_of(count * spread) + 4), mask=is_channel)
    tl.store(center + 2 * channels + channel, power(exponent_of(count * spread * spread) + 5), mask=is_channel)
    tl.store(exponents + channel, unit, mask=is_channel)


@triton.jit(
    do_not_specialize=("programs", "num_channels", "x_channel", "middle", "last", "number", "correction", "momentum")
)
def finish_moments(
    partials,
    x,
    shift,
    exponents,
    running_mean,
    running_var,
    num_batches_tracked,
    result,
    new_mean,
    new_var,
    new_num_batches_tracked,
    programs,
    num_channels,
    x_channel,
    middle,
    last,
    number,
    correction,
    momentum,
    WEIGHTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Make of partial sums the mean (two rows of result), m2, the biased variance and the count, and new statistics.

    ``number`` is that of the values where there are no weights. What is None is not asked for. With ``exponents``, all
    but the new statistics are in units of their powers of two.
    """
    channels = num_channels.to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    total = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    squares = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    counts = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    total_left = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    squares_left = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    STATISTICS: tl.constexpr = (3 if WEIGHTED else 2) + (0 if exponents is None else 2)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += load_partial(partials, program, channel, programs, channels, 0, STATISTICS)
        squares += load_partial(partials, program, channel, programs, channels, 1, STATISTICS)
        if WEIGHTED:
            counts += load_partial(partials, program, channel, programs, channels, 2, STATISTICS)
        if exponents is not None:
            total_left += load_partial(partials, program, channel, programs, channels, STATISTICS - 2, STATISTICS)
            squares_left += load_partial(partials, program, channel, programs, channels, STATISTICS - 1, STATISTICS)
    total = tl.sum(total, 0) + tl.sum(total_left, 0)
    squares = tl.sum(squares, 0) + tl.sum(squares_left, 0)
    if WEIGHTED:
        count = tl.sum(counts, 0)
    else:
        count = tl.zeros((CHANNELS,), tl.float64) + number.to(tl.float64)
    if shift is None:
        hi = _one_of_three(x + channel * x_channel.to(tl.int64), middle, last, is_channel)
    else:
        hi = load_vector(shift, channel, is_channel)
    lo = total / divisor_of(count)
    m2 = squares - total * lo
    var = m2 / divisor_of(count)
    tl.store(result + channel, hi, mask=is_channel)
    tl.store(result + channels + channel, lo, mask=is_channel)
    tl.store(result + 2 * channels + channel, m2, mask=is_channel)
    tl.store(result + 3 * channels + channel, var, mask=is_channel)
    if WEIGHTED:
        tl.store(result + 4 * channels + channel, count, mask=is_channel)
    if num_batches_tracked is not None:
        tl.store(new_num_batches_tracked, _counted(num_batches_tracked), mask=tl.program_id(0) == 0)
    if running_mean is not None:
        step = tl.zeros((CHANNELS,), tl.float64) + _share(momentum, num_batches_tracked)
        excess = count - correction.to(tl.float64)
        if WEIGHTED:  # a count of NaN is to be seen in the statistics
            step = tl.where(excess <= 0, 0.0, step)
        unbiased = tl.where(excess <= 0, 0.0, m2 / tl.where(excess <= 0, 1.0, excess))
        unit = load_units(exponents, channel, is_channel)
        _lerp(running_mean, hi + lo, unit, step, new_mean, channel, is_channel)
        _lerp(running_var, unbiased, 2 * unit, step, new_var, channel, is_channel)


@triton.jit
def _counted(num_batches_tracked):
    """Return the count of batches after one more; the largest int64 stays."""
    count = tl.load(num_batches_tracked)
    return tl.where(count == 0x7FFFFFFFFFFFFFFF, count, count + 1)  # noqa: PLR2004 - int64


@triton.jit
def _share(momentum, num_batches_tracked):
    """Return how much a batch weighs in the running statistics: without a momentum, as much as each before."""
    if momentum is None:
        share = 1.0 / _counted(num_batches_tracked).to(tl.float64)
    else:
        share = float64(momentum)
    return share


@triton.jit
def _lerp(start, end, unit, step, target, channel, is_channel):
    """Store (1 - step) * start + step * end * 2**unit; a batch that does not count leaves no trace."""
    old = load_vector(start, channel, is_channel)
    new = tl.where(step == 0, old, (1.0 - step) * old + scaled(step * end, unit))
    tl.store(target + channel, as_dtype(new, target.dtype.element_ty), mask=is_channel)
