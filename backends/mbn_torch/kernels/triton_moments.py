"""The moments of a batch in Triton, and the step of running statistics.

A pass over x leaves partial sums, and a second kernel finishes them::

    x, cut into tiles by triton_tiles               one program of `moments`: a block of channels, every P-th tile
        |                                           tile:      UNROLLED x SUMS x CHANNELS values
        |  each tile is added to                      |        sum over UNROLLED, within a thread
        v                                             v
    sums of a program, SUMS x CHANNELS  <-------------+        one tile after another
        |  sum over SUMS, a tree
        v
    partials, P x STATISTICS x channels             one program of `finish_...`: a block of channels, all P rows
        |  PROGRAMS rows at a time are added to     sums: PROGRAMS x CHANNELS
        |  sum over PROGRAMS, a tree
        v
    result, one number of each statistic and channel

The rows of partials of one program, each of one number per channel::

                      0                1                  2 (with weights)   last but one       last
    plain             x - shift        (x - shift)**2     weights
    rough             x - shift        the same in a      weights                               largest
                                       unit of 2**600                                           abs(x - shift)
    with exponents    multiples of     multiples of       weights            rests of           rests of
                      x - shift        (x - shift)**2                        x - shift          (x - shift)**2

Input of float32 and narrower takes one plain pass: float64 has digits to spare. Input of float64, and any input of a
layer with statistics in float64, takes a rough pass, for the mean and its unit, and a second one with exponents.
"""

import triton
import triton.language as tl

from mbn_torch.kernels.triton_arithmetic import FARTHEST, as_dtype, exponent_of, float64, is_far, limited, power, scaled
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
"""The exponent of a unit in which no sum of float64 overflows.

Deviations so large that a plain sum of them might overflow lose no digits in it.
"""

_OF_SUMS = ("programs", "num_channels", "x_channel", "middle", "last", "number")


@triton.jit
def _one_of_three(x, middle, last, is_channel):
    """Return the median of three values of each channel in float64, as the shift of sums: it is no outlier.

    ``x`` are pointers to the first value of each channel; ``middle`` and ``last`` are offsets from it, in values, of a
    value in the row in the middle and in the last row. Median of a, b, c: max(min(a, b), min(max(a, b), c)).
    """
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
    """Sum up x - shift and its square, each times its weight, and the weights.

    Writes the partial sums of this program, which the top of this file lists, to ``partials``.

    ``triton_tensors`` describes x, weights, extents and strides. The others are:

    - ``shift``: (channels,) in float64; None has the kernel take the median of three values. With ``exponents`` it is
      (3, channels): the center and the two powers of two that ``finish_rough_moments`` writes.
    - ``exponents``: (channels,) int32; x is divided by 2**exponent, and the center is in the same unit. Or None.
    - ``partials``: programs x STATISTICS x channels in float64, written.
    - ``middle``, ``last``: offsets for ``_one_of_three``.
    - ``ROUGH``: whether this is the rough pass. It has no squares, which may overflow: it has the sum of the deviations
      twice, the second time in a unit in which it does not, and the largest deviation.

    Around one of the values, the sum of squares of ordinary data is not much larger than m2. So m2, the difference of
    two sums, loses few digits.
    """
    SUMS: tl.constexpr = CELLS // UNROLLED
    # The channels of this program, and their shift.
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
    # Rounded to x's dtype, since it also stands in for values that are masked: those then differ by 0 from it.
    first = as_dtype(first, x.dtype.element_ty)
    start = first.to(tl.float64)
    factor = power(-load_units(exponents, channel, is_channel))
    if exponents is not None:
        # A center in units and not rounded, and the powers of two that take terms apart.
        start = load_vector(shift, channel, is_channel)
        apart = load_vector(shift + channels, channel, is_channel)[None, None, :]
        apart_squares = load_vector(shift + 2 * channels, channel, is_channel)[None, None, :]
        total_left = tl.zeros((SUMS, CHANNELS), tl.float64)
        squares_left = tl.zeros((SUMS, CHANNELS), tl.float64)
    if ROUGH:
        factor = power(channel * 0 - _LARGE)
        largest = tl.zeros((SUMS, CHANNELS), tl.float64)
    # The cells of a tile as parts by sums, and where each is within a tile.
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
        # Load the values of the tile.
        is_value = (row < rows - top) & (position < positions - left)
        source = x + cell_offsets(top, left, x_row, x_position, UNIT_X, ALIGNED)
        mask = is_value[:, :, None] & is_channel[None, None, :]
        # Where there is no value, the shift stands in for it, and adds nothing to the sums.
        values = tl.load(source + within, mask=mask, other=first[None, None, :]).to(tl.float64)
        # Take deviations. A factor of 2**-unit may make the stand-in differ from the center, hence the second mask.
        if exponents is None:
            d = values - start[None, None, :]
        else:
            d = tl.where(mask, values * factor[None, None, :] - start[None, None, :], 0.0)
        if ROUGH:
            far = values * factor[None, None, :] - (start * factor)[None, None, :]
        once = d
        # Replace deviations of weight 0, which may be NaN, by 0, and multiply the others by their weights.
        if weights is not None:
            offset = cell_offsets(top + row, left + position, w_row, w_position, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)
            d = tl.where((w > 0)[:, :, None], d, 0.0)
            once = d * w[:, :, None]
            if ROUGH:
                far = tl.where((w > 0)[:, :, None], far, 0.0) * w[:, :, None]
            count += w
        square = once * d
        # Take terms apart: to add a power of two far above a term and to take it off again rounds the term to a
        # multiple of that power's last digit. Such multiples add up without a rounding, however many there are.
        if exponents is not None:
            left_of_once = once
            left_of_square = square
            once = (once + apart) - apart
            square = (square + apart_squares) - apart_squares
            total_left += tl.sum(left_of_once - once, 0)
            squares_left += tl.sum(left_of_square - square, 0)
        # Accumulate: first over the parts of the tile, which a thread holds itself, so that it keeps fewer sums.
        total += tl.sum(once, 0)
        if ROUGH:
            squares += tl.sum(far, 0)
        else:
            squares += tl.sum(square, 0)
        if ROUGH:
            largest = tl.maximum(largest, tl.max(tl.abs(d), 0))
    STATISTICS: tl.constexpr = (2 if weights is None else 3) + (ROUGH if exponents is None else 2)
    # Reduce the sums over the cells of a tile, and store one number per statistic and channel.
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
    """Finish the rough sums of ``moments``: a unit of each channel, about its mean, and two powers of two.

    - ``partials``: programs x STATISTICS x channels in float64, STATISTICS being 3, or 4 with weights.
    - ``x``: the batch, of which three values per channel are read where ``shift`` is None. ``x_channel``, ``middle``
      and ``last`` are a stride and offsets in values, none of them divided by ``ALIGNED``.
    - ``shift``: (channels,) in float64, the shift of the sums, or None.
    - ``center``: (3, channels) in float64, written. Row 0 has about the mean of each channel, in its unit. Rows 1 and 2
      have the powers of two that take the terms x - mean and (x - mean)**2 apart, in the unit and in its square.
    - ``exponents``: (channels,) int32, written: those of the units, 0 where no square is near the ends of the range.
    - ``programs``, ``num_channels``: extents of ``partials``. ``number``: values per channel, where not ``WEIGHTED``.
    - ``PROGRAMS``, ``CHANNELS``: the block of partial sums that this program adds up at a time.

    A power of two takes terms apart without an error if it is larger than any sum of them: after it has been added to a
    term and taken off, the term is a multiple of its last digit, and so are the sums, which float64 can hold.

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
    # The unit is the size of the largest deviation, where its square may leave the range, and else 1.
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
    # The mean of the deviations, in the unit. Of large ones the plain sum may have overflowed, not that in 2**600.
    near = scaled(tl.sum(total, 0) / divisor_of(count), -unit)
    near = tl.where(unit > 0, scaled(tl.sum(far, 0) / divisor_of(count), _LARGE - unit), near)
    tl.store(center + channel, scaled(start, -unit) + near, mask=is_channel)
    # Bounds of the sums: count times the largest term. Around the mean a deviation is at most twice as large as around
    # one of the values, and its square four times. The other factors are for exponents, which are rounded down, and for
    # a deviation that overflowed: it is less than twice the largest number of float64, which stands in for it.
    spread = scaled(limited(spread, tl.float64), -unit)
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
    """Finish the sums of ``moments``: the moments of each channel, and new running statistics.

    - ``partials``: programs x STATISTICS x channels in float64, STATISTICS being 2, one more with weights and two more
      with exponents.
    - ``x``, ``x_channel``, ``middle``, ``last``: as ``finish_rough_moments`` has them, for a ``shift`` of None.
    - ``shift``: the shift of the sums, (channels,) in float64, or None. With exponents it is in their units: of its
      three rows the first is read.
    - ``exponents``: (channels,) int32, or None.
    - ``running_mean``, ``running_var``: (channels,) in their dtype; None where the layer has none.
    - ``num_batches_tracked``: one int64, or None.
    - ``result``: (4, channels) in float64, or (5, channels) if ``WEIGHTED``, written: the two parts of the mean, m2 and
      the biased variance, all in units, and the sum of the weights.
    - ``new_mean``, ``new_var``, ``new_num_batches_tracked``: written, None where their old ones are.
    - ``programs``, ``num_channels``: extents of ``partials``. ``number``: values per channel, where not ``WEIGHTED``.
    - ``correction``: an integer taken off the count for the running variance.
    - ``momentum``: the bits of a float64, or None for the average of all batches so far.
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
    # Add up the partial sums, so many programs at a time, and reduce those sums; the exact parts meet the rests last.
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
    # From sums around the shift to moments: the mean is the shift and the mean deviation, and m2 = sum d**2 - n lo**2.
    lo = total / divisor_of(count)
    m2 = squares - total * lo
    var = m2 / divisor_of(count)
    tl.store(result + channel, hi, mask=is_channel)
    tl.store(result + channels + channel, lo, mask=is_channel)
    tl.store(result + 2 * channels + channel, m2, mask=is_channel)
    tl.store(result + 3 * channels + channel, var, mask=is_channel)
    if WEIGHTED:
        tl.store(result + 4 * channels + channel, count, mask=is_channel)
    # The step of the running statistics. The first block of channels alone writes the number of batches.
    if num_batches_tracked is not None:
        tl.store(new_num_batches_tracked, _counted(num_batches_tracked), mask=tl.program_id(0) == 0)
    if running_mean is not None:
        step = tl.zeros((CHANNELS,), tl.float64) + _share(momentum, num_batches_tracked)
        excess = count - correction.to(tl.float64)
        if WEIGHTED:  # No comparison with a count of NaN is true, so NaN shows in the new statistics.
            step = tl.where(excess <= 0, 0.0, step)
        unbiased = tl.where(excess <= 0, 0.0, m2 / tl.where(excess <= 0, 1.0, excess))
        unit = load_units(exponents, channel, is_channel)
        _lerp(running_mean, hi + lo, unit, step, new_mean, channel, is_channel)
        _lerp(running_var, unbiased, 2 * unit, step, new_var, channel, is_channel)


@triton.jit
def _counted(num_batches_tracked):
    """Return the number of batches after one more, from a pointer to an int64; the largest int64 stays."""
    count = tl.load(num_batches_tracked)
    return tl.where(count == 0x7FFFFFFFFFFFFFFF, count, count + 1)


@triton.jit
def _share(momentum, num_batches_tracked):
    """Return the share of a batch in the running statistics; without a momentum all batches have the same."""
    if momentum is None:
        share = 1.0 / _counted(num_batches_tracked).to(tl.float64)
    else:
        share = float64(momentum)
    return share


@triton.jit
def _lerp(start, end, unit, step, target, channel, is_channel):
    """Store (1 - step) * start + step * end * 2**unit, from and to (channels,) vectors.

    Where the step is 0 the old number stays, even beside an end that is NaN or infinite.
    """
    old = load_vector(start, channel, is_channel)
    new = tl.where(step == 0, old, (1.0 - step) * old + scaled(step * end, unit))
    tl.store(target + channel, as_dtype(new, target.dtype.element_ty), mask=is_channel)
