"""Batch normalisation in Triton.

Statistics are exact to float64, whatever x is, and every sum is a tree that shapes and strides determine: no program
adds to memory that another writes to. A value of weight 0 is replaced before anything is computed of it. Offsets are of
64 bits. Numbers of float64 come as the bits of an integer, since Triton would round them to float32.

x has rows, places and channels; tiles of positions (a row and a place) by channels are shared out over axis 1 of the
grid, blocks of channels over axis 0. ``mbn_torch.tiles`` says how. No result depends on how but in its last bits.
"""

import triton
import triton.language as tl

_ROWS = tl.constexpr(0)
_PLACES = tl.constexpr(1)
_CHANNELS = tl.constexpr(2)

_EXTENTS = ("num_rows", "num_places", "num_channels", "place_tiles", "tiles")
_OF_X = ("x_row", "x_place", "x_channel")
_OF_Y = ("y_row", "y_place", "y_channel")
_OF_DY = ("dy_row", "dy_place", "dy_channel")
_OF_DX = ("dx_row", "dx_place", "dx_channel")
_OF_WEIGHTS = ("w_row", "w_place")


@triton.jit
def _scaled(number, ALIGNED: tl.constexpr):
    """Return a stride or extent that was divided, so that the compiler knows by what it can be."""
    return number.to(tl.int64) * ALIGNED


@triton.jit
def _offset(row, place, row_stride, place_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far positions are from the first."""
    if UNIT == _ROWS:
        rows = row
    else:
        rows = row * _scaled(row_stride, ALIGNED)
    if UNIT == _PLACES:
        places = place
    else:
        places = place * _scaled(place_stride, ALIGNED)
    return rows + places


@triton.jit
def _across(channel, stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far channels are from the first."""
    if UNIT == _CHANNELS:
        channels = channel.to(tl.int64)
    else:
        channels = channel * _scaled(stride, ALIGNED)
    return channels


@triton.jit
def _values(row, place, channel, row_stride, place_stride, channel_stride, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how far the values of a tile are from its first: positions, on one axis or on two, by channels."""
    positions = _offset(row.to(tl.int64), place.to(tl.int64), row_stride, place_stride, UNIT, ALIGNED)
    return tl.expand_dims(positions, -1) + _across(channel, channel_stride, UNIT, ALIGNED)


@triton.jit
def _extent(size, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    if UNIT == AXIS:
        whole = _scaled(size, ALIGNED)
    else:
        whole = size.to(tl.int64)
    return whole


@triton.jit
def _top(tile, place_tiles, POSITIONS: tl.constexpr, PLACES: tl.constexpr):
    """Return the first row of a tile; there may be more of them than 32 bits hold."""
    return (tile // place_tiles) * tl.full((), POSITIONS // PLACES, tl.int64)


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _as(values, DTYPE: tl.constexpr):
    """Return values of float64 in another dtype; there is no way to halves but through float32."""
    if tl.float64 != DTYPE:
        values = values.to(tl.float32)
    return values.to(DTYPE)


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
def _invstd(var, eps, channel, is_channel):
    """Return 1 / sqrt(var + eps), and 0 where var + eps is 0."""
    spread = tl.load(var + channel, mask=is_channel, other=1).to(tl.float64) + _float64(eps)
    return tl.where(spread == 0, 0.0, 1.0 / tl.sqrt(tl.where(spread == 0, 1.0, spread)))


@triton.jit
def _divisor(count):
    return tl.where(count == 0, 1.0, count)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_WEIGHTS))
def moments(
    x,
    weights,
    shift,
    partials,
    num_rows,
    num_places,
    num_channels,
    place_tiles,
    tiles,
    x_row,
    x_place,
    x_channel,
    w_row,
    w_place,
    UNIT_X: tl.constexpr,
    ALIGNED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """Sum up x - shift and its square, each as often as it counts, and the weights: one row of partials per program.

    ``shift`` is one value of each channel, or None for the first. What a thread holds of a tile it sums up first, which
    leaves fewer sums to keep.
    """
    LANES: tl.constexpr = POSITIONS // UNROLLED
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    places = _extent(num_places, _PLACES, UNIT_X, ALIGNED)
    channels = _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    across = _across(channel, x_channel, UNIT_X, ALIGNED)
    if shift is None:
        first = tl.load(x + across, mask=is_channel, other=0)
    else:
        first = _as(tl.load(shift + channel, mask=is_channel, other=0), x.dtype.element_ty)
    start = first.to(tl.float64)
    position = tl.arange(0, UNROLLED)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    row = position // PLACES
    place = position % PLACES
    within = _values(row, place, channel, x_row, x_place, x_channel, UNIT_X, ALIGNED)
    total = tl.zeros((LANES, CHANNELS), tl.float64)
    squares = tl.zeros((LANES, CHANNELS), tl.float64)
    count = tl.zeros((UNROLLED, LANES), tl.float64)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, place_tiles, POSITIONS, PLACES)
        left = (tile % place_tiles) * PLACES
        is_value = (top + row < rows) & (left + place < places)
        source = x + _offset(top, left, x_row, x_place, UNIT_X, ALIGNED)
        mask = is_value[:, :, None] & is_channel[None, None, :]
        # Where there is no value, the shift takes its place, and adds nothing.
        d = tl.load(source + within, mask=mask, other=first[None, None, :]).to(tl.float64) - start[None, None, :]
        if weights is None:
            total += tl.sum(d, 0)
            squares += tl.sum(d * d, 0)
        else:
            offset = _offset(top + row, left + place, w_row, w_place, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)
            d = tl.where((w > 0)[:, :, None], d, 0.0)
            once = d * w[:, :, None]
            total += tl.sum(once, 0)
            squares += tl.sum(once * d, 0)
            count += w
    if weights is None:
        target = partials + tl.program_id(1) * 2 * channels + channel
    else:
        target = partials + tl.program_id(1) * 3 * channels + channel
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


@triton.jit(do_not_specialize=("programs", "num_channels", "x_channel", "number", "correction", "momentum"))
def finish_moments(
    partials,
    x,
    shift,
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
    number,
    correction,
    momentum,
    WEIGHTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Make of partial sums the mean (two rows of result), m2, the biased variance and the count, and new statistics.

    ``number`` is that of the values where there are no weights. What is None is not asked for.
    """
    channels = num_channels.to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    total = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    squares = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    counts = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    STATISTICS: tl.constexpr = 3 if WEIGHTED else 2
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += _partial(partials, program, channel, programs, channels, 0, STATISTICS)
        squares += _partial(partials, program, channel, programs, channels, 1, STATISTICS)
        if WEIGHTED:
            counts += _partial(partials, program, channel, programs, channels, 2, STATISTICS)
    total = tl.sum(total, 0)
    if WEIGHTED:
        count = tl.sum(counts, 0)
    else:
        count = tl.zeros((CHANNELS,), tl.float64) + number.to(tl.float64)
    if shift is None:
        hi = tl.load(x + channel * x_channel.to(tl.int64), mask=is_channel, other=0).to(tl.float64)
    else:
        hi = _vector(shift, channel, is_channel)
    lo = total / _divisor(count)
    m2 = tl.sum(squares, 0) - total * lo
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
        _lerp(running_mean, hi + lo, step, new_mean, channel, is_channel)
        _lerp(running_var, unbiased, step, new_var, channel, is_channel)


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
        share = _float64(momentum)
    return share


@triton.jit
def _lerp(start, end, step, target, channel, is_channel):
    """Store (1 - step) * start + step * end; a batch that does not count leaves no trace."""
    old = _vector(start, channel, is_channel)
    new = tl.where(step == 0, old, (1.0 - step) * old + step * end)
    tl.store(target + channel, _as(new, target.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_Y, *_OF_WEIGHTS, "eps"))
def normalize(
    x,
    y,
    hi,
    lo,
    var,
    weight,
    bias,
    weights,
    eps,
    num_rows,
    num_places,
    num_channels,
    place_tiles,
    tiles,
    x_row,
    x_place,
    x_channel,
    y_row,
    y_place,
    y_channel,
    w_row,
    w_place,
    COMPUTE: tl.constexpr,
    UNIT_X: tl.constexpr,
    UNIT_Y: tl.constexpr,
    ALIGNED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write (x - mean) / sqrt(var + eps) * weight + bias to y.

    Computed as (x - K) * scale + shift with K the mean rounded to what is computed in: x - K is exact where x is near
    the mean, and the rest of the mean goes into the shift.
    """
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    places = _extent(num_places, _PLACES, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    mean, rest = _center(hi, lo, channel, is_channel)
    scale = _invstd(var, eps, channel, is_channel)
    if weight is not None:
        scale *= _vector(weight, channel, is_channel)
    center = mean.to(COMPUTE)
    shift = ((center.to(tl.float64) - mean) - rest) * scale
    if bias is not None:
        shift += _vector(bias, channel, is_channel)
    scale = scale.to(COMPUTE)[None, :]
    shift = shift.to(COMPUTE)[None, :]
    center = center[None, :]
    position = tl.arange(0, POSITIONS)
    row = position // PLACES
    place = position % PLACES
    of_x = _values(row, place, channel, x_row, x_place, x_channel, UNIT_X, ALIGNED)
    of_y = _values(row, place, channel, y_row, y_place, y_channel, UNIT_Y, ALIGNED)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, place_tiles, POSITIONS, PLACES)
        left = (tile % place_tiles) * PLACES
        is_value = (top + row < rows) & (left + place < places)
        mask = is_value[:, None] & is_channel[None, :]
        values = tl.load(x + _offset(top, left, x_row, x_place, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        values = (values.to(COMPUTE) - center) * scale + shift
        if weights is not None:
            offset = _offset(top + row, left + place, w_row, w_place, -1, 1)
            keep = tl.load(weights + offset, mask=is_value, other=0) > 0
            values = tl.where(keep[:, None], values, 0.0)
        target = y + _offset(top, left, y_row, y_place, UNIT_Y, ALIGNED)
        tl.store(target + of_y, values.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_DY, *_OF_WEIGHTS))
def grad_sums(
    x,
    dy,
    hi,
    lo,
    weights,
    partials,
    num_rows,
    num_places,
    num_channels,
    place_tiles,
    tiles,
    x_row,
    x_place,
    x_channel,
    dy_row,
    dy_place,
    dy_channel,
    w_row,
    w_place,
    UNIT_X: tl.constexpr,
    UNIT_DY: tl.constexpr,
    ALIGNED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """Sum up dy and dy * (x - mean), the mean rounded to float64: one row of partials per program."""
    LANES: tl.constexpr = POSITIONS // UNROLLED
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    places = _extent(num_places, _PLACES, UNIT_X, ALIGNED)
    channels = _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    center, _ = _center(hi, lo, channel, is_channel)
    center = center[None, None, :]
    position = tl.arange(0, UNROLLED)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    row = position // PLACES
    place = position % PLACES
    of_x = _values(row, place, channel, x_row, x_place, x_channel, UNIT_X, ALIGNED)
    of_dy = _values(row, place, channel, dy_row, dy_place, dy_channel, UNIT_DY, ALIGNED)
    total = tl.zeros((LANES, CHANNELS), tl.float64)
    products = tl.zeros((LANES, CHANNELS), tl.float64)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, place_tiles, POSITIONS, PLACES)
        left = (tile % place_tiles) * PLACES
        is_value = (top + row < rows) & (left + place < places)
        mask = is_value[:, :, None] & is_channel[None, None, :]
        values = tl.load(x + _offset(top, left, x_row, x_place, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
        gradients = tl.load(dy + _offset(top, left, dy_row, dy_place, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0)
        d = values.to(tl.float64) - center
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = _offset(top + row, left + place, w_row, w_place, -1, 1)
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
    sums,
    rounded,
    eps,
    programs,
    num_channels,
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
    _, rest = _center(hi, lo, channel, is_channel)
    sum_dy = tl.sum(total, 0)
    sum_dy_xhat = (tl.sum(products, 0) - rest * sum_dy) * _invstd(var, eps, channel, is_channel)
    tl.store(sums + channel, sum_dy, mask=is_channel)
    tl.store(sums + channels + channel, sum_dy_xhat, mask=is_channel)
    if rounded is not None:
        tl.store(rounded + channel, _as(sum_dy, rounded.dtype.element_ty), mask=is_channel)
        tl.store(rounded + channels + channel, _as(sum_dy_xhat, rounded.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=(*_EXTENTS, *_OF_X, *_OF_DY, *_OF_DX, *_OF_WEIGHTS, "eps", "number"))
def grad_input(
    x,
    dy,
    dx,
    hi,
    lo,
    var,
    weight,
    sum_dy,
    sum_dy_xhat,
    count,
    weights,
    eps,
    number,
    num_rows,
    num_places,
    num_channels,
    place_tiles,
    tiles,
    x_row,
    x_place,
    x_channel,
    dy_row,
    dy_place,
    dy_channel,
    dx_row,
    dx_place,
    dx_channel,
    w_row,
    w_place,
    UNIT_X: tl.constexpr,
    UNIT_DY: tl.constexpr,
    UNIT_DX: tl.constexpr,
    ALIGNED: tl.constexpr,
    POSITIONS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the gradient of x to dx; ``count``, or the number where that is None, is what the sums are divided by.

    Computed in float64 and rounded once: where it is small its terms are not. The mean of dy is taken off before
    anything else, so that little is lost of a gradient with a large mean.
    """
    rows = _extent(num_rows, _ROWS, UNIT_X, ALIGNED)
    places = _extent(num_places, _PLACES, UNIT_X, ALIGNED)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < _extent(num_channels, _CHANNELS, UNIT_X, ALIGNED)
    factor = _invstd(var, eps, channel, is_channel)
    scale = factor
    if weight is not None:
        scale *= _vector(weight, channel, is_channel)
    scale = scale[None, :]
    if sum_dy is not None:
        if count is None:
            divisor = number.to(tl.float64)
        else:
            divisor = _divisor(tl.load(count).to(tl.float64))
        mean_dy = (_vector(sum_dy, channel, is_channel) / divisor)[None, :]
        slope = _vector(sum_dy_xhat, channel, is_channel) / divisor * factor
        center, rest = _center(hi, lo, channel, is_channel)
        rest = (-rest * slope)[None, :]
        slope = slope[None, :]
        center = center[None, :]
    position = tl.arange(0, POSITIONS)
    row = position // PLACES
    place = position % PLACES
    of_x = _values(row, place, channel, x_row, x_place, x_channel, UNIT_X, ALIGNED)
    of_dy = _values(row, place, channel, dy_row, dy_place, dy_channel, UNIT_DY, ALIGNED)
    of_dx = _values(row, place, channel, dx_row, dx_place, dx_channel, UNIT_DX, ALIGNED)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        top = _top(tile, place_tiles, POSITIONS, PLACES)
        left = (tile % place_tiles) * PLACES
        is_value = (top + row < rows) & (left + place < places)
        mask = is_value[:, None] & is_channel[None, :]
        gradients = tl.load(dy + _offset(top, left, dy_row, dy_place, UNIT_DY, ALIGNED) + of_dy, mask=mask, other=0)
        gradients = gradients.to(tl.float64)
        if weights is not None:
            offset = _offset(top + row, left + place, w_row, w_place, -1, 1)
            w = tl.load(weights + offset, mask=is_value, other=0).to(tl.float64)[:, None]
        if sum_dy is not None:
            values = tl.load(x + _offset(top, left, x_row, x_place, UNIT_X, ALIGNED) + of_x, mask=mask, other=0)
            projection = (values.to(tl.float64) - center) * slope + rest
            if weights is None:
                gradients = (gradients - mean_dy) - projection
            else:
                gradients = (gradients - mean_dy * w) - projection * w
        gradients *= scale
        if weights is not None:
            gradients = tl.where(w > 0, gradients, 0.0)
        target = dx + _offset(top, left, dx_row, dx_place, UNIT_DX, ALIGNED)
        tl.store(target + of_dx, _as(gradients, dx.dtype.element_ty), mask=mask)
