"""The innermost loops, compiled by Numba: each reads a contiguous chunk of x once.

They have to release the interpreter's lock, since several threads execute them at the same time; to give the same bits
for both memory orders; and to be cached on disk. All of them are in this file, because Numba's cache detects changes
only in the file of a function.

Arguments of all loops:

- ``x``, ``dy``, ``y``, ``dx``: a chunk, (N, C, L), or (N, L, C) where channels come ``last``, as one contiguous axis in
  float32 or float64. An (N, C) has an L of 1, and is both. ``y`` and ``dx`` are written.
- ``w``: the weight of each cell of the chunk, (N, L) as one axis in float64; empty where each value counts once.
  Loops with weights leave out values of weight 0, even NaN.
- ``last``, ``c``, ``length``: whether channels come last, C, and the L of the chunk.
- vectors: (C,) in float64, unless noted.
- ``partials``: the number of partial sums of a channel. Those of all channels are a *row of sums*, of
  ``width = partials * c`` numbers, in which each group of ``inner`` consecutive numbers is of one channel.

The values of a chunk are added to partial sums as follows. The values of one row of this sketch are added to the
partial sums 0, 1, 2, ..., and those of the next row to the same ones. c is a channel, l a position, n a sample::

    partials = samples * L >= L     memory (N, C, L), L = 2, partials = 4: two samples to a row, inner = L
                                      n0c0l0 n0c0l1 n0c1l0 n0c1l1 n1c0l0 n1c0l1 n1c1l0 n1c1l1
                                      n2c0l0 n2c0l1 n2c1l0 n2c1l1 n3c0l0 ...
                                    channels last, memory (N, L, C): the same samples to a row, inner = 1

    partials < L, channels last     memory (N, L, C), partials = 4: four positions to a row, inner = 1
                                      n0l0c0 n0l0c1 n0l1c0 n0l1c1 n0l2c0 n0l2c1 n0l3c0 n0l3c1
                                      n0l4c0 ...                       an incomplete row is added at the end

    partials < L, channels before   memory (N, C, L), partials = 4: a row is four positions of one channel, inner = 4
                                      n0c0: l0 l1 l2 l3                to the partial sums of channel 0
                                            l4 l5 ...
                                      n0c1: l0 l1 l2 l3                to those of channel 1

So in both memory orders a partial sum has the same values in the same order: by n and l, and those of positions beyond
the last full row at the end. ``_collapse`` adds up the partial sums of a channel as a tree::

    p0  p1  p2  p3  p4           half = 3: p0 += p3, p1 += p4
    p0  p1  p2                   half = 2: p0 += p2
    p0  p1                       half = 1: p0 += p1
"""

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from mbn_cpu.channel_stats import FAR_SQUARE, LEAST, MOST
from mbn_cpu.kernels.numba_compilation import compiled, loop, pointer

_WIDTH = 256
"""The least number of values of a row, in loops without sums."""
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
"""The least number with all digits of float32."""
_FAR = 2.0**102
"""A bound of numbers that may be subtracted from any number of float32 without an overflow.

They are less than half of the last digit of the largest number.
"""
_FEW = 4
"""The number of rows that are added up before their sums are split into multiples of a unit and rests."""
_NEAR = 1 << 17
"""The most values of a chunk that is likely to be in a cache of one processor."""
_BLOCK, _PAGE = 64, 1024
"""Between these, the values of a row that is added by itself if it comes from memory.

The processor fetches memory ahead along one sequence of addresses, page by page. It does so for several rows if they
follow each other within a few cache lines, or if each has pages of its own.
"""
_SKIPPED = 64
"""The least number of channels of a cell for which a test of its weight is faster than a choice for each value."""


@loop
def shifted_sums(x, w, last, c, length, partials, shift, sums):
    """Write the weighted sums of x - shift and of its squares to ``sums``, (2, C)."""
    _channel_sums(None, x, w, last, c, length, partials, shift, sums)


@loop
def gradient_sums(dy, x, w, last, c, length, partials, shift, sums):
    """Write the sums of dy and of dy * (x - shift) to ``sums``, (2, C); values of weight 0 are left out."""
    _channel_sums(dy, x, w, last, c, length, partials, shift, sums)


@loop
def _channel_sums(dy, x, w, last, c, length, partials, shift, sums):
    """Write the sums of one of the two loops above: with a ``dy`` of None, the compiler drops the branch for arrays.

    The top of this file has a sketch of the three cases: rows are the first two, planes the third.
    """
    width, inner = partials * c, 1 if last else min(partials, length)
    total, products, center = np.zeros(width), np.zeros(width), _spread(shift, width, inner)
    # If a row may have values of several samples, the entire chunk is treated as one sample.
    sample = length * c if partials < length else x.size
    if last or partials >= length:
        if w.size:
            _add_weighted_rows(dy, x, w, last, c, length, width, sample, center, total, products)
        else:
            _add_rows(dy, x, width, sample, center, total, products)
    elif w.size:
        _add_weighted_planes(dy, x, w, c, length, partials, center, total, products)
    else:
        _add_planes(dy, x, c, length, partials, center, total, products)
    _collapse(total, partials, inner, sums[0])
    _collapse(products, partials, inner, sums[1])


@loop
def parted_sums(x, w, last, c, length, partials, shift, units, sums):
    """Write the sums of ``shifted_sums`` in parts to ``sums``, (4, C): of each, multiples of a unit, and the rest.

    ``units``, (2, C), has a power of two for each sum, from ``mbn_cpu.channel_stats.units``. The multiples add up
    exactly, and the rests are small. Without parts, one extreme value would round all values that are added after it;
    with parts it rounds only the few that are added to it before the sums are split.

    ``parts`` has a row of sums for each row of ``sums``. ``few`` are the two sums of a few rows.
    """
    width, inner = partials * c, 1 if last else min(partials, length)
    few, parts, center = np.zeros((2, width)), np.zeros((4, width)), _spread(shift, width, inner)
    # The same as in _channel_sums, for a few rows at a time; at the end each part is reduced by itself.
    total, squares = few
    of_total, of_squares = _spread(units[0], width, inner), _spread(units[1], width, inner)
    if last or partials >= length:
        sample = length * c if partials < length else x.size
        for first in range(0, x.size, sample):
            for b in range(first, first + sample, _FEW * width):
                rows = x[b : first + sample][: _FEW * width]
                if w.size:
                    _add_weighted_rows(
                        None, rows, w[b // c :], last, c, length, width, rows.size, center, total, squares
                    )
                else:
                    _add_rows(None, rows, width, rows.size, center, total, squares)
                _take_apart(total[: rows.size], of_total, parts[0], parts[1])
                _take_apart(squares[: rows.size], of_squares, parts[2], parts[3])
    else:
        for row in range(x.size // length):
            channel, position = row % c, row // c * length
            partial = channel * partials
            for start in range(0, length, _FEW * partials):
                values, k = x[row * length :][start:length][: _FEW * partials], center[partial:]
                if w.size:
                    _add_weighted_planes(
                        None, values, w[position + start :], 1, values.size, partials, k, total, squares
                    )
                else:
                    _add_planes(None, values, 1, values.size, partials, k, total, squares)
                _take_apart(total[:partials], of_total[partial:], parts[0][partial:], parts[1][partial:])
                _take_apart(squares[:partials], of_squares[partial:], parts[2][partial:], parts[3][partial:])
    for i in range(4):
        _collapse(parts[i], partials, inner, sums[i])


@loop
def _take_apart(sums, units, multiples, rests):
    """Add sums to ``multiples`` and ``rests``, split by their units, and set them to 0.

    A unit is larger than every sum. Adding it to a sum and subtracting it again rounds the sum to a multiple of the
    unit's last digit, and sums of such multiples need no more digits than float64 has.
    """
    for k in range(sums.size):
        multiple = (sums[k] + units[k]) - units[k]
        multiples[k] += multiple
        rests[k] += sums[k] - multiple
        sums[k] = 0


@loop
def normalize(x, w, y, last, c, length, center, scale, shift):
    """Write (x - center) * scale + shift to y, and 0 where the weight is 0; vectors are in the dtype of x and y."""
    # Rows of several samples or positions, with the vectors repeated to the length of a row.
    if last or length < _WIDTH:
        width, inner = _row(last, c, length)
        center, scale, shift = _spread(center, width, inner), _spread(scale, width, inner), _spread(shift, width, inner)
        if w.size:
            _normalize_counted_rows(x, w, y, last, c, length, center, scale, shift)
        else:
            _normalize_rows(x, y, width, center, scale, shift)
        return
    # Long sequences: a loop over each, with the scalars of its channel.
    for row in range(x.size // length):
        values, out = x[row * length :][:length], y[row * length :][:length]
        k, a, b = center[row % c], scale[row % c], shift[row % c]
        if w.size:
            weights = w[row // c * length :][:length]
            for i in range(length):
                value = (values[i] - k) * a + b
                out[i] = value if weights[i] != 0 else 0
        else:
            for i in range(length):
                out[i] = (values[i] - k) * a + b


@loop
def input_gradient(dy, x, w, dx, last, c, length, center, slope, average, scale):
    """Write scale * (dy - w * ((x - center) * slope + average)) to dx, and 0 where the weight is 0.

    It is computed in float64 and rounded once. If ``center`` is empty, mean and variance are constants: then dx is
    scale * dy, and x is not read.
    """
    if last or length < _WIDTH:
        width, inner = _row(last, c, length)
        scale = _spread(scale, width, inner)
        if not center.size:
            _scale_rows(dy, w, dx, last, c, length, scale)
            return
        center, slope, average = (
            _spread(center, width, inner),
            _spread(slope, width, inner),
            _spread(average, width, inner),
        )
        _project_rows(dy, x, w, dx, last, c, length, center, slope, average, scale)
        return
    for row in range(dy.size // length):
        first, channel = row * length, row % c
        gradient, out, s = dy[first:][:length], dx[first:][:length], scale[channel]
        weights = w[row // c * length :][:length]
        if not center.size:
            for i in range(length):
                out[i] = s * gradient[i]
        else:
            values, k, a, b = x[first:][:length], center[channel], slope[channel], average[channel]
            if w.size:
                for i in range(length):
                    out[i] = s * (gradient[i] - weights[i] * ((values[i] - k) * a + b))
            else:
                for i in range(length):
                    out[i] = s * (gradient[i] - ((values[i] - k) * a + b))
        for i in range(weights.size):
            out[i] = out[i] if weights[i] != 0 else 0


@compiled
def train(x, w, y, last, c, length, partials, weight, bias, mean, var, share, eps, correction, new, stats):
    """Compute a step of training: write the output to y, and return the number of values of a channel.

    ``new``, (2, C), becomes the new running mean and variance, and ``stats``, (3, C), the statistics of the batch: its
    first two rows add up to the mean, and the third is the biased variance. If a channel is beyond the range of
    float32, the result is negative and y is not written; the caller uses the passes instead.

    ``w`` has the weights as the layer's dtype has them, not in float64. ``weight``, ``bias``, and ``mean`` and ``var``
    together, the running statistics, are empty if absent. ``share`` is the weight of the batch in the running
    statistics, and ``correction`` is subtracted from the count for their variance.
    """
    count = moments(x, w, last, c, length, partials, stats)
    hi, lo, m2 = stats[0], stats[1], stats[2]
    advance(hi, lo, m2, count, w.size != 0, mean, var, share, correction, new, m2)
    return -1.0 if normalize_by(x, w, y, last, c, length, weight, bias, hi, lo, m2, eps) else count


@compiled
def moments(x, w, last, c, length, partials, stats):
    """Write the statistics of a batch to ``stats``, (3, C): high and low part of the mean, and m2; return the count.

    ``w`` is as of ``train``. The operations are those of ``numba_passes.moments``, and so are the bits.
    """
    weights, sums, cell, divisor = w.astype(np.float64), np.empty((2, c)), 0, float(x.size // c)
    count = divisor
    if w.size:
        cell, count = _heaviest(weights), _total(weights)
        divisor = count if count != 0 else 1.0
    # Sums around one value of each channel; if one of these is an outlier, again around the means.
    first = cell * c if last else cell // length * c * length + cell % length
    for channel in range(c):
        value = x[first + channel] if last else x[first + channel * length]
        stats[0, channel] = value if not w.size or weights[cell] > 0 else 0
    shifted_sums(x, weights, last, c, length, partials, stats[0], sums)
    if _is_far(sums, divisor):
        for channel in range(c):
            stats[0, channel] += sums[0, channel] / divisor
        shifted_sums(x, weights, last, c, length, partials, stats[0], sums)
    for channel in range(c):
        value, mean = stats[0, channel], sums[0, channel] / divisor
        hi = value + mean
        stats[0, channel], stats[1, channel] = hi, mean - (hi - value)  # as in mbn_cpu.channel_stats.added
        stats[2, channel] = sums[1, channel] - sums[0, channel] * mean
    return count


@compiled
def _heaviest(weights):
    """Return the index of the largest weight, the first of several."""
    found = 0
    for cell in range(weights.size):
        if weights[cell] > weights[found]:
            found = cell
    return found


@compiled
def _total(weights):
    """Return the sum of weights as a tree, as ``channel_stats.fold_rows`` does."""
    values, n = weights.copy(), weights.size
    while n > 1:
        half = (n + 1) // 2
        for k in range(n - half):
            values[k] += values[half + k]
        n = half
    return values[0]


# The fused steps of arrays that are given by their addresses, 0 for an absent one: a framework's arrays need no
# conversion then. All are in float32 and in one piece, x of ``size`` values. Other arguments are as of the steps above.


@compiled
def train_at(size, x, w, y, last, c, length, partials, weight, bias, mean, var, share, eps, correction, new, stats):
    """Compute ``train``."""
    arrays = _at(x, size), _at(w, size // c), _at(y, size)
    vectors = _at(weight, c), _at(bias, c), _at(mean, c), _at(var, c)
    return train(*arrays, last, c, length, partials, *vectors, share, eps, correction, new, stats)


@compiled
def normalize_at(size, x, w, y, last, c, length, weight, bias, mean, var, eps):
    """Compute ``normalize_by`` by running statistics."""
    arrays = _at(x, size), _at(w, size // c), _at(y, size)
    return normalize_by(
        *arrays, last, c, length, _at(weight, c), _at(bias, c), _at(mean, c), np.empty(0), _at(var, c), eps
    )


@compiled
def pull_back_at(size, dy, x, w, dx, last, c, length, partials, weight, hi, lo, var, count, eps, result):
    """Compute ``pull_back`` by statistics in arrays."""
    arrays = _at(dy, size), _at(x, size), _at(w, size // c), _at(dx, size)
    pull_back(*arrays, last, c, length, partials, _at(weight, c), hi, lo, var, count, eps, result)


@compiled
def _at(address, size):
    """Return the ``size`` numbers at an address as an array in float32, which is empty for an address of 0."""
    return carray(pointer(address), size if address != 0 else 0, np.float32)


@compiled
def merge(hi, lo, m2, count, other_hi, other_lo, more_m2, more):
    """Return the statistics of two batches together, (3, C), and whether all m2 have kept their digits.

    The operations are those of ``mbn_common.channel_stats``, whose bits other replicas may have.
    """
    total, is_in_range = count + more, True
    share, stats = more / (1.0 if total == 0 else total), np.empty((3, hi.size))
    for channel in range(hi.size):
        start = hi[channel]
        difference = (other_hi[channel] - start) + (other_lo[channel] - lo[channel])
        change = lo[channel] + difference * share
        mean = start + change
        squares = m2[channel] + (more_m2[channel] + difference * difference * (count * share))
        stats[0, channel], stats[1, channel], stats[2, channel] = mean, change - (mean - start), squares
        is_in_range &= (squares >= LEAST) & (squares < MOST)
    return stats, is_in_range


@compiled
def advance(hi, lo, m2, count, is_weighted, mean, var, share, correction, new, biased):
    """Write the new running statistics to ``new``, as of ``train``, and the biased variance to ``biased``, (C,).

    ``biased`` may be ``m2``. A weighted batch whose count is ``correction`` or less has no variance.
    """
    if is_weighted and count <= correction:
        share = 0.0
    for channel in range(mean.size):
        new[0, channel], new[1, channel] = mean[channel], var[channel]
        if share != 0:
            new[0, channel] = (1 - share) * mean[channel] + share * (hi[channel] + lo[channel])
            new[1, channel] = (1 - share) * var[channel] + share * (m2[channel] / (count - correction))
    for channel in range(m2.size):
        biased[channel] = m2[channel] / count if count > 0 else 0.0


@compiled
def normalize_by(x, w, y, last, c, length, weight, bias, hi, lo, var, eps):
    """Write the output by a mean of hi + lo and a variance to y, and return whether a channel is beyond the range.

    Vectors are (C,); ``lo``, ``weight`` and ``bias`` are empty if absent, and ``w`` is as of ``train``. If a channel is
    beyond the range of float32, y is not written.
    """
    # The line to normalise by, in the dtype of x: its center is the rounded mean, and its shift contains the rounding
    # error.
    center, scale, shift = np.empty(c, x.dtype), np.empty(c, x.dtype), np.empty(c, x.dtype)
    is_beyond = False
    for channel in range(c):
        mean, rest = np.float64(hi[channel]), lo[channel] if lo.size else 0.0
        factor = _invstd(np.float64(var[channel]), eps) * (weight[channel] if weight.size else 1.0)
        center[channel] = mean + rest
        scale[channel] = factor
        shift[channel] = (center[channel] - mean - rest) * factor + (bias[channel] if bias.size else 0.0)
        is_beyond |= _is_beyond(center[channel], factor, scale[channel], shift[channel])
    if not is_beyond:
        normalize(x, w.astype(np.float64), y, last, c, length, center, scale, shift)
    return is_beyond


@compiled
def pull_back(dy, x, w, dx, last, c, length, partials, weight, hi, lo, var, count, eps, result):
    """Write the gradient of x to dx, and those of bias and weight, the sums of dy and dy * xhat, to ``result``, (2, C).

    The mean is hi + lo, with ``lo`` empty for a plain vector. ``count`` is 0 if mean and variance are constants.
    ``weight`` is empty if absent, and ``w`` is as of ``train``.
    """
    sums = np.empty((2, c))
    grad_sums(dy, x, w, last, c, length, partials, hi, lo, var, eps, sums)
    grad_input(dy, x, w, dx, last, c, length, weight, hi, lo, var, count, eps, sums[0], sums[1])
    result[:] = sums


@compiled
def grad_sums(dy, x, w, last, c, length, partials, hi, lo, var, eps, sums):
    """Write the sums of dy and dy * xhat to ``sums``, (2, C); other arguments as of ``pull_back``."""
    gradient_sums(dy, x, w.astype(np.float64), last, c, length, partials, hi.astype(np.float64), sums)
    # The deviations were from hi: the sum of products is corrected by lo times the sum of dy.
    for channel in range(c):
        rest = lo[channel] if lo.size else 0.0
        sums[1, channel] = (sums[1, channel] - rest * sums[0, channel]) * _invstd(np.float64(var[channel]), eps)


@compiled
def grad_input(dy, x, w, dx, last, c, length, weight, hi, lo, var, count, eps, sum_dy, sum_dy_xhat):
    """Write the gradient of x to dx, given the sums of dy and dy * xhat; other arguments as of ``pull_back``."""
    center, scale, slope, average = hi.astype(np.float64), np.empty(c), np.empty(c), np.empty(c)
    for channel in range(c):
        invstd, rest = _invstd(np.float64(var[channel]), eps), lo[channel] if lo.size else 0.0
        scale[channel] = invstd * (weight[channel] if weight.size else 1.0)
        if count:
            slope[channel] = invstd * sum_dy_xhat[channel] / count
            average[channel] = sum_dy[channel] / count - rest * slope[channel]
    if not count:
        center = np.empty(0)
    input_gradient(dy, x, w.astype(np.float64), dx, last, c, length, center, slope, average, scale)


@compiled
def _is_far(sums, n):
    """Tell whether sums of n values, (2, C), are around a shift too far from a mean: ``channel_stats.is_far``."""
    far = False
    for channel in range(sums.shape[1]):
        total, squares = sums[0, channel], sums[1, channel]
        far |= squares > FAR_SQUARE * (squares - total * (total / n))
    return far


@compiled
def _is_beyond(center, factor, scale, shift):
    """Tell whether float32 cannot represent the line of a channel.

    ``factor`` is the scale in float64. A factor of 0 is exact, and NaN is in range, since it shows in the output.
    """
    lost = ((abs(scale) < _SMALLEST_NORMAL) & (factor != 0)) | (abs(scale) == np.inf)
    return lost | (abs(center) >= _FAR) | (abs(shift) >= _FAR)  # no branch, so that the loop over channels vectorises


@compiled
def _invstd(var, eps):
    """Return 1 / sqrt(var + eps), and 0 where var + eps is 0."""
    return 0.0 if var + eps == 0 else 1 / np.sqrt(var + eps)


@loop
def _row(last, c, length):
    """Return the width of a row of values for loops without sums, and the number of consecutive values of a channel.

    A row is one sample (with channels last, one position), or as many as fit into ``_WIDTH`` values.
    """
    plane, inner = (c, 1) if last else (c * length, length)
    return plane * max(1, _WIDTH // plane), inner


@loop
def _spread(vector, width, inner):
    """Return a vector repeated to a row of ``width`` values, in which groups of ``inner`` are of one channel."""
    row = np.empty(width, vector.dtype)
    k = 0
    for _ in range(width // (vector.size * inner)):
        for channel in range(vector.size):
            for _ in range(inner):
                row[k] = vector[channel]
                k += 1
    return row


@loop
def _collapse(row, partials, inner, out):
    """Write the sums of the channels to ``out``, (C,), from a row of sums.

    In the row, which is overwritten, groups of ``inner`` numbers are of one channel. The partial sums of a channel are
    added as a tree, the second half to the first, until one is left.
    """
    if inner == 1:  # rows of channels: the same trees, all channels at a time
        c, n = out.size, partials
        while n > 1:
            half = (n + 1) // 2
            first, second = row[: (n - half) * c], row[half * c : n * c]
            for k in range(first.size):
                first[k] += second[k]
            n = half
        out[:] = row[:c]
        return
    values = np.empty(partials)
    for channel in range(out.size):
        # Gather the channel's: a group of ``inner`` numbers of each channel, then the next group of each channel.
        for start in range(0, partials, inner):
            group, own = values[start:][:inner], row[start * out.size + channel * inner :][:inner]
            for k in range(group.size):
                group[k] = own[k]
        n = partials
        while n > 1:
            half = (n + 1) // 2
            for partial in range(half, n):
                values[partial - half] += values[partial]
            n = half
        out[channel] = values[0]


@loop
def _normalize_rows(x, y, width, center, scale, shift):
    """Normalise rows of ``width`` values without weights; center, scale and shift have ``width`` numbers."""
    full = x.size - x.size % width
    for b in range(0, full, width):
        values, out = x[b:][:width], y[b:][:width]
        for k in range(width):  # not values.size, so that the compiler knows the size of all five arrays
            out[k] = (values[k] - center[k]) * scale[k] + shift[k]
    for k in range(x.size - full):
        y[full + k] = (x[full + k] - center[k]) * scale[k] + shift[k]


@loop
def _add_rows(  # noqa: C901 - only one of the two branches is compiled
    dy, x, width, sample, center, total, products
):
    """Add rows of ``width`` values to the rows of sums, and at the end the incomplete row of each sample.

    ``sample`` is the number of values of a sample. ``center``, ``total`` and ``products`` have ``width`` numbers; the
    latter two are rows of sums.
    """
    samples, rows, rest = x.size // sample, sample // width, sample % width
    if rest == 0:  # the rows of all samples follow each other without a gap
        samples, rows, sample = 1, samples * rows, x.size
    is_alone = x.size > _NEAR and _BLOCK < width < _PAGE
    for n in range(samples):
        first = n * sample
        # Several rows at a time: the sums are read and written once for all of them, in the same order of additions.
        if dy is None:
            several = 0 if is_alone else rows - rows % 4
            for r in range(0, several, 4):
                b = first + r * width
                x0, x1 = x[b:][:width], x[b + width :][:width]
                x2, x3 = x[b + 2 * width :][:width], x[b + 3 * width :][:width]
                for k in range(width):
                    d0, d1, d2, d3 = x0[k] - center[k], x1[k] - center[k], x2[k] - center[k], x3[k] - center[k]
                    total[k] = (((total[k] + d0) + d1) + d2) + d3
                    products[k] = (((products[k] + d0 * d0) + d1 * d1) + d2 * d2) + d3 * d3
        else:
            several = 0 if is_alone else rows - rows % 2
            for r in range(0, several, 2):
                b = first + r * width
                g0, g1, x0, x1 = dy[b:][:width], dy[b + width :][:width], x[b:][:width], x[b + width :][:width]
                for k in range(width):
                    total[k] = (total[k] + g0[k]) + g1[k]
                    products[k] = (products[k] + g0[k] * (x0[k] - center[k])) + g1[k] * (x1[k] - center[k])
        for r in range(several, rows):
            _add_row(dy, x, first + r * width, width, center, total, products)
    if rest:
        for n in range(samples):
            _add_row(dy, x, (n + 1) * sample - rest, rest, center, total, products)


@loop
def _add_row(dy, x, first, size, center, total, products):
    """Add ``size`` values, from the index ``first`` on, to the first ``size`` numbers of the rows of sums."""
    row = x[first:][:size]
    if dy is None:
        for k in range(row.size):
            d = row[k] - center[k]
            total[k] += d
            products[k] += d * d
    else:
        gradient = dy[first:][:size]
        for k in range(row.size):
            total[k] += gradient[k]
            products[k] += gradient[k] * (row[k] - center[k])


@loop
def _add_planes(dy, x, c, length, partials, center, total, products):
    """Add the values of long sequences to the partial sums of their channels, and at the end the incomplete rows.

    ``center``, ``total`` and ``products`` are rows of sums, C x partials. The incomplete row of each sequence comes
    after the full rows of all sequences, as with channels last.
    """
    full = length - length % partials
    for begin, size in ((0, full), (full, length - full)):
        for row in range(x.size // length if size else 0):
            first, channel = row * length + begin, row % c * partials
            own = center[channel:][:partials], total[channel:][:partials], products[channel:][:partials]
            if dy is None:
                _add_rows(None, x[first:][:size], min(partials, size), size, *own)
            else:
                _add_rows(dy[first:][:size], x[first:][:size], min(partials, size), size, *own)


# The same loops with weights. A value of weight 0 may be NaN, so its terms are replaced by 0, not multiplied by it.


@loop
def _spread_weights(w, position, last, c, length, row):
    """Write the weight of each value of ``row``, a part of a chunk whose weights begin at the index ``position`` of w.

    With channels last each weight is repeated C times; else the weights of each sample are repeated C times.
    """
    if last:
        for start in range(0, row.size, c):
            weight, part = w[position + start // c], row[start:][:c]
            for i in range(c):
                part[i] = weight
        return
    for start in range(0, row.size, c * length):
        plane, weights = row[start:][: c * length], w[position + start // c :]
        for i in range(length):
            plane[i] = weights[i]
        done = length
        while done < plane.size:  # each copy doubles the filled part, so that the loops become long
            source, copy = plane[:done], plane[done:][:done]
            for i in range(copy.size):
                copy[i] = source[i]
            done += copy.size


@loop
def _add_weighted_sample(dy, x, weight, first, c, center, total, products):
    """Add the c values of one weight, from the index ``first`` on, to sums of the channels."""
    if weight == 0:
        return
    values = x[first:][:c]
    if dy is None:
        for k in range(c):
            d = values[k] - center[k]
            total[k] += weight * d
            products[k] += weight * (d * d)
    else:
        # A factor of 1 that the compiler does not know: the product is rounded before it is added, as where each value
        # has a choice between its product and 0.
        once, gradient = weight / weight, dy[first:][:c]
        for k in range(c):
            total[k] += gradient[k]
            products[k] += once * (gradient[k] * (values[k] - center[k]))


@loop
def _add_weighted_rows(dy, x, w, last, c, length, width, sample, center, total, products):
    """Add rows as ``_add_rows`` does, in the same order. Gradients of weight 0 are left out, others count once."""
    row, full = np.empty(width), sample - sample % width
    for begin, end in ((0, full), (full, sample)):
        for first in range(0, x.size, sample):
            for b in range(first + begin, first + end, width):
                values = x[b : first + end][:width]
                if last and c >= _SKIPPED:
                    for start in range(0, values.size, c):
                        own = center[start:][:c], total[start:][:c], products[start:][:c]
                        _add_weighted_sample(dy, x, w[(b + start) // c], b + start, c, *own)
                    continue
                weights = row[: values.size]
                _spread_weights(w, b // c, last, c, length, weights)
                if dy is None:
                    for k in range(values.size):
                        weight, d = weights[k], values[k] - center[k]
                        d = d if weight != 0 else 0.0
                        total[k] += weight * d
                        products[k] += weight * (d * d)
                else:
                    gradient = dy[b : first + end][:width]
                    for k in range(values.size):
                        g, d = gradient[k], values[k] - center[k]
                        total[k] += g if weights[k] != 0 else 0.0
                        products[k] += g * d if weights[k] != 0 else 0.0


@loop
def _add_weighted(dy, x, weights, width, center, total, products):
    """Add rows of ``width`` values with a weight each, and at the end an incomplete row; several rows at a time."""
    several = x.size - x.size % (4 * width)
    for b in range(0, several, 4 * width):
        x0, x1 = x[b:][:width], x[b + width :][:width]
        x2, x3 = x[b + 2 * width :][:width], x[b + 3 * width :][:width]
        w0, w1 = weights[b:][:width], weights[b + width :][:width]
        w2, w3 = weights[b + 2 * width :][:width], weights[b + 3 * width :][:width]
        if dy is None:
            for k in range(width):
                d0, d1, d2, d3 = x0[k] - center[k], x1[k] - center[k], x2[k] - center[k], x3[k] - center[k]
                d0, d1 = d0 if w0[k] != 0 else 0.0, d1 if w1[k] != 0 else 0.0
                d2, d3 = d2 if w2[k] != 0 else 0.0, d3 if w3[k] != 0 else 0.0
                total[k] = (((total[k] + w0[k] * d0) + w1[k] * d1) + w2[k] * d2) + w3[k] * d3
                products[k] = (((products[k] + w0[k] * (d0 * d0)) + w1[k] * (d1 * d1)) + w2[k] * (d2 * d2)) + w3[k] * (
                    d3 * d3
                )
        else:
            g0, g1 = dy[b:][:width], dy[b + width :][:width]
            g2, g3 = dy[b + 2 * width :][:width], dy[b + 3 * width :][:width]
            for k in range(width):
                p0, p1 = g0[k] * (x0[k] - center[k]), g1[k] * (x1[k] - center[k])
                p2, p3 = g2[k] * (x2[k] - center[k]), g3[k] * (x3[k] - center[k])
                total[k] = (
                    ((total[k] + (g0[k] if w0[k] != 0 else 0.0)) + (g1[k] if w1[k] != 0 else 0.0))
                    + (g2[k] if w2[k] != 0 else 0.0)
                ) + (g3[k] if w3[k] != 0 else 0.0)
                products[k] = (
                    ((products[k] + (p0 if w0[k] != 0 else 0.0)) + (p1 if w1[k] != 0 else 0.0))
                    + (p2 if w2[k] != 0 else 0.0)
                ) + (p3 if w3[k] != 0 else 0.0)
    for b in range(several, x.size, width):
        values, own = x[b:][:width], weights[b:][:width]
        if dy is None:
            for k in range(values.size):
                weight, d = own[k], values[k] - center[k]
                d = d if weight != 0 else 0.0
                total[k] += weight * d
                products[k] += weight * (d * d)
        else:
            gradient = dy[b:][:width]
            for k in range(values.size):
                g, d = gradient[k], values[k] - center[k]
                total[k] += g if own[k] != 0 else 0.0
                products[k] += g * d if own[k] != 0 else 0.0


@loop
def _add_weighted_planes(dy, x, w, c, length, partials, center, total, products):
    """Add values as ``_add_planes`` does, in the same order. Gradients of weight 0 are left out, others count once."""
    full = length - length % partials
    for begin, size in ((0, full), (full, length - full)):
        for row in range(x.size // length if size else 0):
            first, channel = row * length + begin, row % c * partials
            weights = w[row // c * length + begin :][:size]
            own = center[channel:][:partials], total[channel:][:partials], products[channel:][:partials]
            if dy is None:
                _add_weighted(None, x[first:][:size], weights, partials, *own)
            else:
                _add_weighted(dy[first:][:size], x[first:][:size], weights, partials, *own)


@loop
def _normalize_counted_rows(x, w, y, last, c, length, center, scale, shift):
    """Normalise rows as ``_normalize_rows`` does, and write 0 where the weight is 0."""
    if last and c >= _SKIPPED:
        for b in range(0, x.size, c):
            out = y[b:][:c]
            if w[b // c] == 0:
                out[:] = 0
            else:
                _normalize_rows(x[b:][:c], out, c, center, scale, shift)
        return
    width = center.size
    row = np.empty(width)
    for b in range(0, x.size, width):
        values, out = x[b:][:width], y[b:][:width]
        weights = row[: values.size]
        _spread_weights(w, b // c, last, c, length, weights)
        for k in range(values.size):
            value = (values[k] - center[k]) * scale[k] + shift[k]
            out[k] = value if weights[k] != 0 else 0


@loop
def _scale_rows(dy, w, dx, last, c, length, scale):
    """Write scale * dy row by row, and 0 where the weight is 0; ``scale`` has a number for each value of a row."""
    width = scale.size
    row = np.ones(width)
    for b in range(0, dy.size, width):
        gradient, out = dy[b:][:width], dx[b:][:width]
        weights = row[: gradient.size]
        if w.size:
            _spread_weights(w, b // c, last, c, length, weights)
        for k in range(gradient.size):
            value = scale[k] * gradient[k]
            out[k] = value if weights[k] != 0 else 0


@loop
def _project_rows(dy, x, w, dx, last, c, length, center, slope, average, scale):
    """Write the gradient of ``input_gradient`` row by row; the vectors have a number for each value of a row."""
    width = scale.size
    row = np.empty(width)
    for b in range(0, x.size, width):
        gradient, values, out = dy[b:][:width], x[b:][:width], dx[b:][:width]
        if w.size:
            weights = row[: values.size]
            _spread_weights(w, b // c, last, c, length, weights)
            for k in range(values.size):
                value = scale[k] * (gradient[k] - weights[k] * ((values[k] - center[k]) * slope[k] + average[k]))
                out[k] = value if weights[k] != 0 else 0
        else:
            for k in range(values.size):
                out[k] = scale[k] * (gradient[k] - ((values[k] - center[k]) * slope[k] + average[k]))
