"""Batch normalisation in Triton.

Statistics are exact to float64, whatever x is, and every sum is a tree that shapes and strides determine: no program
adds to memory that another writes to. A value of weight 0 is replaced before anything is computed of it. Offsets are of
64 bits. Numbers of float64 come as the bits of an integer, since Triton would round them to float32.

x has rows, positions and channels; tiles of cells (a row and a position) by channels are shared out over axis 1 of the
grid, blocks of channels over axis 0. ``triton_tiles`` says how. No result depends on how but in its last bits.
"""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import (
    FAR,
    FARTHEST,
    as_dtype,
    exponent_before,
    exponent_of,
    float64,
    is_far,
    limited,
    power,
    scaled,
)

_LARGE = tl.constexpr(600)
"""The exponent of a unit in which no sum of float64 overflows, and of values far enough from 1 none loses digits."""
_ROWS = tl.constexpr(0)
_POSITIONS = tl.constexpr(1)
_CHANNELS = tl.constexpr(2)

_EXTENTS = ("num_rows", "num_positions", "num_channels", "position_tiles", "tiles")
_OF_X = ("x_row", "x_position", "x_channel")
_OF_SUMS = ("programs", "num_channels", "x_channel", "middle", "last", "number")
_OF_Y = ("y_row", "y_position", "y_channel")
_OF_DY = ("dy_row", "dy_position", "dy_channel")
_OF_DX = ("dx_row", "dx_position", "dx_channel")
_OF_WEIGHTS = ("w_row", "w_position")


@triton.jit
def _scaled(number, ALIGNED: tl.constexpr):
    """Return a stride or extent that was divided, so that the compiler knows by what it can be."""
    return number.to(tl.int64) * ALIGNED


@triton.jit
def _offset(row, position, row_stride, position_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far cells are from the first."""
    if UNIT == _ROWS:
        rows = row
    else:
        rows = row * _scaled(row_stride, ALIGNED)
    if UNIT == _POSITIONS:
        positions = position
    else:
        positions = position * _scaled(position_stride, ALIGNED)
    return rows + positions


@triton.jit
def _across(channel, stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far channels are from the first."""
    if UNIT == _CHANNELS:
        channels = channel.to(tl.int64)
    else:
        channels = channel * _scaled(stride, ALIGNED)
    return channels


@triton.jit
def _values(
    row, position, channel, row_stride, position_stride, channel_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr
):
    """Return how far the values of a tile are from its first: cells, on one axis or on two, by channels."""
    cells = _offset(row.to(tl.int64), position.to(tl.int64), row_stride, position_stride, UNIT, ALIGNED)
    return tl.expand_dims(cells, -1) + _across(channel, channel_stride, UNIT, ALIGNED)


@triton.jit
def _extent(size, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    if UNIT == AXIS:
        whole = _scaled(size, ALIGNED)
    else:
        whole = size.to(tl.int64)
    return whole


@triton.jit
def _top(tile, position_tiles, CELLS: tl.constexpr, POSITIONS: tl.constexpr):
    """Return the first row of a tile; there may be more of them than 32 bits hold."""
    return (tile // position_tiles) * tl.full((), CELLS // POSITIONS, tl.int64)


@triton.jit
def _vector(vector, channel, is_channel):
    """Return what a vector holds of channels, in float64."""
    return tl.load(vector + channel, mask=is_channel, other=0).to(tl.float64)


@triton.jit
def _center(hi, lo, channel, is_channel):
    """Return a mean as a number and the rest of it; one without a rest is a number already."""
    first = _vector(hi, channel, is_channel)
    if lo is None:
        center = first
        rest = first * 0
    else:
        second = _vector(lo, channel, is_channel)
        center = first + second
        rest = (first - center) + second
    return center, rest


@triton.jit
def _units(exponents, channel, is_channel):
    """Return the exponents of the units of statistics, 0 where none are given."""
    if exponents is None:
        unit = channel * 0
    else:
        unit = tl.load(exponents + channel, mask=is_channel, other=0).to(tl.int32)
    return unit


@triton.jit
def _invstd(var, exponents, eps, channel, is_channel):
    """Return 1 / sqrt(var + eps) as a number and an exponent, and 0 where var + eps is 0."""
    own = tl.load(var + channel, mask=is_channel, other=1).to(tl.float64)
    little = float64(eps)
    common = _units(exponents, channel, is_channel)
    if exponents is not None:  # units in which neither is beyond float64
        unit = common
        common = tl.where(unit == 0, 0, tl.maximum(unit, tl.where(little > 0, exponent_of(little) >> 1, unit)))
        own = scaled(own, 2 * (unit - common))
        little = scaled(scaled(little, -common), -common)
    spread = own + little
    return tl.where(spread == 0, 0.0, 1.0 / tl.sqrt(tl.where(spread == 0, 1.0, spread))), -common


@triton.jit
def _weighed(number, exponent, weight, channel, is_channel):
    """Return a number and its exponent times what a vector holds, if there is one, as such."""
    if weight is not None:
        factor = _vector(weight, channel, is_channel)
        own = exponent_of(number)
        other = exponent_of(factor)
        number = scaled(number, -own) * scaled(factor, -other)
        exponent = exponent + own + other
    return number, exponent


@triton.jit
def _one_of_three(x, middle, last, is_channel):
    """Return the one in the middle of three values of each channel, so that an outlier is not what sums are around."""
    a = tl.load(x, mask=is_channel, other=0).to(tl.float64)
    b = tl.load(x + middle, mask=is_channel, other=0).to(tl.float64)
    c = tl.load(x + last, mask=is_channel, other=0).to(tl.float64)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _divisor(count):
    return tl.where(count == 0, 1.0, count)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_WEIGHTS, "middle", "last"))
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
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    positions = _extent(num_positions, _POSITIONS, UNIT_X, ALIGNED)
    channels = _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    across = _across(channel, x_channel, UNIT_X, ALIGNED)
    if shift is None:
        first = _one_of_three(x + across, middle, last, is_channel)
    else:
        first = tl.load(shift + channel, mask=is_channel, other=0)
    first = as_dtype(first, x.dtype.element_ty)
    start = first.to(tl.float64)
    factor = power(-_units(exponents, channel, is_channel))
    if exponents is not None:
        start = _vector(shift, channel, is_channel)
        apart = _vector(shift + channels, channel, is_channel)[None, None, :]
        apart_squares = _vector(shift + 2 * channels, channel, is_channel)[None, None, :]
        total_left = tl.zeros((SUMS, CHANNELS), tl.float64)
        squares_left = tl.zeros((SUMS, CHANNELS), tl.float64)
    if ROUGH:
        factor = power(channel * 0 - _LARGE)
        largest = tl.zeros((SUMS, CHANNELS), tl.float64)
    cell = tl.arange(0, UNROLLED)[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
    row = cell // POSITIONS
    position = cell % POSITIONS
    within = _values(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    total = tl.zeros((SUMS, CHANNELS), tl.float64)
    squares = tl.zeros((SUMS, CHANNELS), tl.float64)
    count = tl.zeros((UNROLLED, SUMS), tl.float64)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        source = x + _offset(top, left, x_row, x_position, UNIT_X, ALIGNED)
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
            offset = _offset(top + row, left + position, w_row, w_position, -1, 1)
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


@triton.jit
def _partial(partials, program, channel, programs, channels, STATISTIC: tl.constexpr, STATISTICS: tl.constexpr):
    """Return one of so many statistics of some programs, 0 of those that there are not."""
    is_one = (program < programs)[:, None] & (channel < channels)[None, :]
    offset = (program.to(tl.int64) * STATISTICS + STATISTIC)[:, None] * channels + channel[None, :]
    return tl.load(partials + offset, mask=is_one, other=0.0)


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
        total += _partial(partials, program, channel, programs, channels, 0, STATISTICS)
        far += _partial(partials, program, channel, programs, channels, 1, STATISTICS)
        if WEIGHTED:
            counts += _partial(partials, program, channel, programs, channels, 2, STATISTICS)
        more = _partial(partials, program, channel, programs, channels, STATISTICS - 1, STATISTICS)
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
        start = _vector(shift, channel, is_channel)
    near = scaled(tl.sum(total, 0) / _divisor(count), -unit)
    near = tl.where(unit > 0, scaled(tl.sum(far, 0) / _divisor(count), _LARGE - unit), near)
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
        total += _partial(partials, program, channel, programs, channels, 0, STATISTICS)
        squares += _partial(partials, program, channel, programs, channels, 1, STATISTICS)
        if WEIGHTED:
            counts += _partial(partials, program, channel, programs, channels, 2, STATISTICS)
        if exponents is not None:
            total_left += _partial(partials, program, channel, programs, channels, STATISTICS - 2, STATISTICS)
            squares_left += _partial(partials, program, channel, programs, channels, STATISTICS - 1, STATISTICS)
    total = tl.sum(total, 0) + tl.sum(total_left, 0)
    squares = tl.sum(squares, 0) + tl.sum(squares_left, 0)
    if WEIGHTED:
        count = tl.sum(counts, 0)
    else:
        count = tl.zeros((CHANNELS,), tl.float64) + number.to(tl.float64)
    if shift is None:
        hi = _one_of_three(x + channel * x_channel.to(tl.int64), middle, last, is_channel)
    else:
        hi = _vector(shift, channel, is_channel)
    lo = total / _divisor(count)
    m2 = squares - total * lo
    var = m2 / _divisor(count)
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
        unit = _units(exponents, channel, is_channel)
        _lerp(running_mean, hi + lo, unit, step, new_mean, channel, is_channel)
        _lerp(running_var, unbiased, 2 * unit, step, new_var, channel, is_channel)


@triton.jit
def _counted(num_batches_tracked):
    """Return the count of batches after one more; the largest int64 stays."""
    count = tl.load(num_batches_tracked)
    return tl.where(count == 0x7FFFFFFFFFFFFFFF, count, count + 1)


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
    old = _vector(start, channel, is_channel)
    new = tl.where(step == 0, old, (1.0 - step) * old + scaled(step * end, unit))
    tl.store(target + channel, as_dtype(new, target.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_Y, *_OF_WEIGHTS, "eps"))
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
    """Write (x - mean) / sqrt(var + eps) * weight + bias to y.

    Computed as (x - K) * scale + shift with K the mean rounded to what is computed in: x - K is exact where x is near
    the mean, and the rest of the mean goes into the shift. A scale out of range has a power of two taken off it, by
    which x and K are multiplied first.
    """
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    positions = _extent(num_positions, _POSITIONS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    mean, rest = _center(hi, lo, channel, is_channel)
    number, exponent = _invstd(var, exponents, eps, channel, is_channel)
    number, exponent = _weighed(number, exponent, weight, channel, is_channel)
    unit = _units(exponents, channel, is_channel)
    center = limited(mean, COMPUTE).to(tl.float64)
    shift = tl.where(number == 0, 0.0, scaled(((center - mean) - rest) * number, exponent + unit))
    if bias is not None:
        shift += _vector(bias, channel, is_channel)
    first = exponent_before(number, exponent, center, unit, COMPUTE)
    before = tl.where(number == 0, 0.0, power(first)).to(COMPUTE)[None, :]
    center = tl.where(number == 0, 0.0, scaled(center, unit + first)).to(COMPUTE)[None, :]
    scale = limited(scaled(number, exponent - first), COMPUTE)[None, :]
    shift = shift.to(COMPUTE)[None, :]
    cell = tl.arange(0, CELLS)
    row = cell // POSITIONS
    position = cell % POSITIONS
    of_x = _values(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    of_y = _values(row, position, channel, y_row, y_position, y_channel, UNIT_Y, ALIGNED)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        mask = is_value[:, None] & is_channel[None, :]
        values = tl.load(x + _offset(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        values = (values.to(COMPUTE) * before - center) * scale + shift
        if weights is not None:
            offset = _offset(top + row, left + position, w_row, w_position, -1, 1)
            keep = tl.load(weights + offset, mask=is_value, other=0) > 0
            values = tl.where(keep[:, None], values, 0.0)
        target = y + _offset(top, left, y_row, y_position, UNIT_Y, ALIGNED)
        tl.store(target + of_y, values.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_DY, *_OF_WEIGHTS, "eps"))
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
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    positions = _extent(num_positions, _POSITIONS, UNIT_X, ALIGNED)
    channels = _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    center, _ = _center(hi, lo, channel, is_channel)
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    if WIDE:
        number, exponent = _invstd(var, exponents, eps, channel, is_channel)
        unit = _units(exponents, channel, is_channel)
        first = exponent_before(number, exponent, center, unit, tl.float64)
        before = power(first)[None, None, :]
        center = scaled(center, unit + first)
    center = center[None, None, :]
    cell = tl.arange(0, UNROLLED)[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
    row = cell // POSITIONS
    position = cell % POSITIONS
    of_x = _values(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    of_dy = _values(row, position, channel, dy_row, dy_position, dy_channel, UNIT_DY, ALIGNED)
    total = tl.zeros((SUMS, CHANNELS), tl.float64)
    products = tl.zeros((SUMS, CHANNELS), tl.float64)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        mask = is_value[:, :, None] & is_channel[None, None, :]
        values = tl.load(x + _offset(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        gradients = tl.load(dy + _offset(top, left, dy_row, dy_position, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0)
        if WIDE:
            d = values * before - center
        else:
            d = values.to(tl.float64) - center
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = _offset(top + row, left + position, w_row, w_position, -1, 1)
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
        total += _partial(partials, program, channel, programs, channels, 0, 2)
        products += _partial(partials, program, channel, programs, channels, 1, 2)
    center, rest = _center(hi, lo, channel, is_channel)
    number, exponent = _invstd(var, exponents, eps, channel, is_channel)
    if WIDE:
        unit = _units(exponents, channel, is_channel)
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


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_DY, *_OF_DX, *_OF_WEIGHTS, "eps", "number"))
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
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    positions = _extent(num_positions, _POSITIONS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float64
    factor, exponent = _invstd(var, exponents, eps, channel, is_channel)
    share, size = _weighed(factor, exponent, weight, channel, is_channel)
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
            divisor = _divisor(tl.load(count).to(tl.float64))
        if weights is not None:  # a sum of dy divided by that of all weights may leave the range
            common = -exponent_of(divisor)
            divisor = scaled(divisor, common)
        mean_dy = (_vector(sum_dy, channel, is_channel) / divisor)[None, :]
        center, rest = _center(hi, lo, channel, is_channel)
        if WIDE:
            unit = _units(exponents, channel, is_channel)
            first = exponent_before(factor, exponent, center, unit, tl.float64)
            before = power(first)[None, :]
            center = scaled(center, unit + first)
            rest = scaled(rest, unit + first)
            exponent = exponent - first
        slope = limited(scaled(factor, exponent), tl.float64)
        slope = _vector(sum_dy_xhat, channel, is_channel) / divisor * slope
        rest = (-rest * slope)[None, :]
        slope = slope[None, :]
        center = center[None, :]
    cell = tl.arange(0, CELLS)
    row = cell // POSITIONS
    position = cell % POSITIONS
    of_x = _values(row, position, channel, x_row, x_position, x_channel, UNIT_X, ALIGNED)
    of_dy = _values(row, position, channel, dy_row, dy_position, dy_channel, UNIT_DY, ALIGNED)
    of_dx = _values(row, position, channel, dx_row, dx_position, dx_channel, UNIT_DX, ALIGNED)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, position_tiles, CELLS, POSITIONS)
        left = (tile % position_tiles) * POSITIONS
        is_value = (row < rows - top) & (position < positions - left)
        mask = is_value[:, None] & is_channel[None, :]
        gradients = tl.load(dy + _offset(top, left, dy_row, dy_position, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0)
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = _offset(top + row, left + position, w_row, w_position, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)[:, None]
        if sum_dy is not None:
            values = tl.load(x + _offset(top, left, x_row, x_position, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
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
        target = dx + _offset(top, left, dx_row, dx_position, UNIT_DX, ALIGNED)
        tl.store(target + of_dx, as_dtype(gradients, dx.dtype.element_ty), mask=mask)
