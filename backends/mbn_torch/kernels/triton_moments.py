"""The moments of a batch in Triton, and the update of the running statistics.

A pass over x writes partial sums, and a second kernel finishes them::

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

The rows of partials that one program writes, each with one number per channel::

                      0                1                  2 (with weights)   last but one       last
    plain             x - shift        (x - shift)**2     weights
    rough             x - shift        x - shift, in a    weights                               largest
                                       unit of 2**600                                           abs(x - shift)
    with exponents    multiples of     multiples of       weights            rests of           rests of
                      x - shift        (x - shift)**2                        x - shift          (x - shift)**2

Input of float32 and narrower needs one plain pass, since float64 has digits to spare. Input of float64, and any input
of a layer in float64, needs a rough pass, for an approximate mean and its unit, and a second pass with exponents. The
second pass splits each term into a multiple of a power of two and a rest; ``finish_rough_moments`` explains why.
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
"""The exponent of a unit in which no sum overflows; deviations whose plain sum might overflow lose no digits in it."""

_OF_SUMS = ("programs", "num_channels", "x_channel", "middle", "last", "number")


@triton.jit
def _one_of_three(x, middle, last, is_channel):
    """Return the median of three values of each channel in float64, the shift of its sums: unlikely to be an outlier.

    ``x`` are pointers to the first value of each channel; ``middle`` and ``last`` are the offsets, in values, of a
    value in the middle row and of one in the last row. The median of a, b, c is max(min(a, b), min(max(a, b), c)).
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

    The kernel writes the partial sums of this program, which the top of this file lists, to ``partials``.

    ``triton_tensors`` describes x, weights, extents and strides. The other arguments are:

    - ``shift``: (channels,) in float64, or None for the median of three values. With ``exponents`` it is (3, channels):
      the center and the two powers of two that ``finish_rough_moments`` writes.
    - ``exponents``: (channels,) int32, or None; x is divided by 2**exponent, and the center is in the same unit.
    - ``partials``: programs x STATISTICS x channels in float64, written.
    - ``middle``, ``last``: offsets for ``_one_of_three``.
    - ``ROUGH``: whether this is the rough pass. Instead of squares, which may overflow, it sums the deviations a second
      time in a unit in which the sum cannot overflow, and finds the largest deviation.

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
    # Round the shift to x's dtype: it replaces values outside of the batch, whose deviations are then exactly 0.
    first = as_dtype(first, x.dtype.element_ty)
    start = first.to(tl.float64)
    factor = power(-load_units(exponents, channel, is_channel))
    if exponents is not None:
        # Load the center, in units and not rounded, and the powers of two that split the terms.
        start = load_vector(shift, channel, is_channel)
        apart = load_vector(shift + channels, channel, is_channel)[None, None, :]
        apart_squares = load_vector(shift + 2 * channels, channel, is_channel)[None, None, :]
        total_left = tl.zeros((SUMS, CHANNELS), tl.float64)
        squares_left = tl.zeros((SUMS, CHANNELS), tl.float64)
    if ROUGH:
        factor = power(channel * 0 - _LARGE)
        largest = tl.zeros((SUMS, CHANNELS), tl.float64)
    # Row and position of each cell within a tile, in an array of parts by sums.
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
        # Outside of the batch, the shift replaces the value and adds 0 to the sums.
        values = tl.load(source + within, mask=mask, other=first[None, None, :]).to(tl.float64)
        # Take deviations. In units, the center is not the shift: mask the deviations outside of the batch a second
        # time.
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
        # Split terms: adding a power of two far above a term and subtracting it again rounds the term to a multiple of
        # that power's last digit. Such multiples add up without a rounding error, however many there are.
        if exponents is not None:
            left_of_once = once
            left_of_square = square
            once = (once + apart) - apart
            square = (square + apart_squares) - apart_squares
            total_left += tl.sum(left_of_once - once, 0)
            squares_left += tl.sum(left_of_square - square, 0)
        # Accumulate. The sum over the parts of a tile stays within a thread, which then keeps fewer sums.
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
    """Finish the rough sums of ``moments``: a unit and an approximate mean of each channel, and two powers of two.

    - ``partials``: programs x STATISTICS x channels in float64, STATISTICS being 3, or 4 with weights.
    - ``x``: the batch; if ``shift`` is None, three values per channel are read. ``x_channel`` is a stride, ``middle``
      and ``last`` are offsets, all in values and not divided by ``ALIGNED``.
    - ``shift``: (channels,) in float64, the shift of the sums, or None.
    - ``center``: (3, channels) in float64, written. Row 0 is the approximate mean of each channel, in its unit. Rows 1
      and 2 are the powers of two that split the terms x - mean and (x - mean)**2, in the unit and in its square.
    - ``exponents``: (channels,) int32, written: those of the units, 0 where no square may leave the range.
    - ``programs``, ``num_channels``: extents of ``partials``. ``number``: values per channel, where not ``WEIGHTED``.
    - ``PROGRAMS``, ``CHANNELS``: the block of partial sums that this program adds up at a time.

    A power of two splits terms without an error if it is larger than any sum of them: adding it to a term and
    subtracting it again leaves a multiple of its last digit, and float64 represents every sum of such multiples
    exactly.

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
    # The unit is 1, or the size of the largest deviation if its square may leave the range.
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
    # The mean of the deviations, in the unit. If they are large, the plain sum may have overflowed: use that in 2**600.
    near = scaled(tl.sum(total, 0) / divisor_of(count), -unit)
    near = tl.where(unit > 0, scaled(tl.sum(far, 0) / divisor_of(count), _LARGE - unit), near)
    tl.store(center + channel, scaled(start, -unit) + near, mask=is_channel)
    # Bounds of the sums: count times the largest term. A deviation from the mean is at most twice as large as one from
    # a value, its square four times. The other factors make up for exponents, which are rounded down, and for a
    # deviation that overflowed and was replaced by the largest float64, which is more than half of it.
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
    - ``x``, ``x_channel``, ``middle``, ``last``: as in ``finish_rough_moments``; used if ``shift`` is None.
    - ``shift``: the shift of the sums, (channels,) in float64, or None. With exponents it is (3, channels), of which
      the first row is read: the center, in units.
    - ``exponents``: (channels,) int32, or None.
    - ``running_mean``, ``running_var``: (channels,) in their dtype; None where the layer has none.
    - ``num_batches_tracked``: one int64, or None.
    - ``result``: (4, channels) in float64, or (5, channels) if ``WEIGHTED``, written: the two parts of the mean, m2 and
      the biased variance, all in units, and the sum of the weights.
    - ``new_mean``, ``new_var``, ``new_num_batches_tracked``: written; None where the old ones are.
    - ``programs``, ``num_channels``: extents of ``partials``. ``number``: values per channel, where not ``WEIGHTED``.
    - ``correction``: the integer subtracted from the count for the running variance.
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
    # Add the sums of PROGRAMS programs at a time, then reduce; the exact sums and those of the rests are added last.
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
    # From sums around the shift to moments: mean = shift + mean deviation = hi + lo, and m2 = sum d**2 - n lo**2.
    lo = total / divisor_of(count)
    m2 = squares - total * lo
    var = m2 / divisor_of(count)
    tl.store(result + channel, hi, mask=is_channel)
    tl.store(result + channels + channel, lo, mask=is_channel)
    tl.store(result + 2 * channels + channel, m2, mask=is_channel)
    tl.store(result + 3 * channels + channel, var, mask=is_channel)
    if WEIGHTED:
        tl.store(result + 4 * channels + channel, count, mask=is_channel)
    # Update the running statistics. Only the program of the first block of channels writes the count of batches.
    if num_batches_tracked is not None:
        tl.store(new_num_batches_tracked, _counted(num_batches_tracked), mask=tl.program_id(0) == 0)
    if running_mean is not None:
        step = tl.zeros((CHANNELS,), tl.float64) + _share(momentum, num_batches_tracked)
        excess = count - correction.to(tl.float64)
        if WEIGHTED:  # With a count of NaN (invalid weights) comparisons are false, so new statistics become NaN.
            step = tl.where(excess <= 0, 0.0, step)
        unbiased = tl.where(excess <= 0, 0.0, m2 / tl.where(excess <= 0, 1.0, excess))
        unit = load_units(exponents, channel, is_channel)
        _lerp(running_mean, hi + lo, unit, step, new_mean, channel, is_channel)
        _lerp(running_var, unbiased, 2 * unit, step, new_var, channel, is_channel)


@triton.jit
def _counted(num_batches_tracked):
    """Return the count of batches plus 1, from a pointer to an int64; the largest int64 stays as it is."""
    count = tl.load(num_batches_tracked)
    return tl.where(count == 0x7FFFFFFFFFFFFFFF, count, count + 1)


@triton.jit
def _share(momentum, num_batches_tracked):
    """Return the weight of a batch in the running statistics: the momentum, or 1 / count of batches if it is None."""
    if momentum is None:
        share = 1.0 / _counted(num_batches_tracked).to(tl.float64)
    else:
        share = float64(momentum)
    return share


@triton.jit
def _lerp(start, end, unit, step, target, channel, is_channel):
    """Store (1 - step) * start + step * end * 2**unit, from and to (channels,) vectors.

    If the step is 0 the old number is stored, even if the end is NaN or infinite.
    """
    old = load_vector(start, channel, is_channel)
    new = tl.where(step == 0, old, (1.0 - step) * old + scaled(step * end, unit))
    tl.store(target + channel, as_dtype(new, target.dtype.element_ty), mask=is_channel)
