"""Torch's arithmetic where nothing is recorded or traced.

Statistics are exact to float64, whatever x is, and the bits do not depend on the run, the memory order or the number
of threads: ``torch.sum`` promises none of this, so sums are elementwise additions in a fixed order. Work is done on
blocks that stay in the caches. What autograd has to see through is in the formulas.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch

from mbn.contract import Batch, Moments, Params, Stats
from mbn_torch.channel_stats import (
    FAR,
    WIDE,
    ConcreteKernels,
    Mean,
    Pair,
    Variance,
    as_pair,
    divisor,
    exponent_before,
    exponent_of,
    heaviest,
    in_units,
    lifted,
    lifted_weights,
    limited,
    line,
    power,
    scaled,
    separate,
    spread,
    units_of,
    weighed,
    widened,
)

CPU_BLOCK = 1 << 17
"""Values converted to float64 at a time: 1 MiB, small enough for the caches and large enough for a few threads."""

GPU_BLOCK = 1 << 24
"""The same on a GPU, 128 MiB: there, fewer launches count for more than less memory."""

CHUNK = 64
"""Blocks added one after another, which costs less memory traffic than a tree but lets rounding errors add up too."""

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class EagerKernels(ConcreteKernels):
    """Kernels made of Torch's operations."""

    def moments(self, batch: Batch) -> Moments:
        """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

        Sums of d = x - shift and of d², with one of the values of each channel for a shift, lose at most a factor N of
        float64's precision however far the shift is from the mean. That is plenty for narrower input. float64 input is
        summed again around its mean, which also gives the rest of the mean, in units in which no channel is out of
        range and in parts, so that one value that dwarfs the rest costs no digits.

        Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
        """
        x, weights = widened(batch.x, batch), batch.sample_weight
        values = lifted(x)
        shift = _one_of_three(values) if weights is None else heaviest(values, weights)
        count = x.numel() // x.shape[1] if weights is None else fold(_wide(weights).flatten())
        n = divisor(count)
        exponent = apart = None
        if x.dtype == WIDE:
            largest = _largest(values, shift, weights)
            exponent = units_of(largest)
            shift, largest = scaled(shift, -exponent), scaled(largest, -exponent)
            shift = shift + _shifted_sums(values, shift, exponent, weights)[0] / n
            apart = power(exponent_of(largest * n) + 4), power(exponent_of(largest * n * largest) + 5)
        total, squares = _shifted_sums(values, shift, exponent, weights, apart)
        return Moments(count, *in_units(shift, total / n, squares - total * total / n, exponent))

    def normalize(
        self, batch: Batch, stats: Stats, params: Params, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order.

        Computed as (x - K) * scale + shift with K the mean rounded to x's precision: x - K is exact where x is near the
        mean, and the rest of the mean goes into the shift. A scale out of range has a power of two taken off it, by
        which x and K are multiplied first.
        """
        x, weights, _ = batch
        mean, var, _ = stats
        weight, bias = params
        compute = torch.promote_types(x.dtype, torch.float32)  # float16 and bfloat16 are computed in float32
        columns: Iterator[Any] = (
            None if vector is None else vector[:, None] for vector in line(mean, var, weight, bias, eps, compute)
        )
        before, center, scale, shift = columns
        y = torch.empty_like(x) if out is None else out
        for block, part, mask in _blocks(lifted(x), lifted(y), _mask(weights, compute)):
            values = part if part.dtype == compute else torch.empty_like(part, dtype=compute)
            torch.mul(block, before, out=values).sub_(center).mul_(scale)
            if shift is not None:
                values.add_(shift)
            _clear(values, mask)
            if values is not part:
                part.copy_(values)
        return y

    def grad_sums(self, dy: torch.Tensor, batch: Batch, stats: Stats, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of dy and of dy * xhat for each channel, in float64."""
        x, weights, _ = batch
        mean, var, _ = stats
        origin = _origin(mean, var, eps, x.dtype)
        center, before = origin.center[:, None], origin.before

        def terms(dy: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            dy, d = _wide(dy), _wide(x)
            if before is not None:
                d.mul_(before[:, None])
            d.sub_(center)
            _clear(dy, mask)
            _clear(d, mask)
            return dy, d.mul_(dy)

        sum_dy, products = _sums(terms, lifted(dy), lifted(x), _mask(weights, WIDE))
        return sum_dy, (products - origin.rest * sum_dy) * origin.invstd

    def grad_input(
        self,
        dy: torch.Tensor,
        batch: Batch,
        stats: Stats,
        weight: torch.Tensor | None,
        eps: float,
        sums: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the gradient of x, in its dtype and memory order."""
        x, weights, _ = batch
        mean, var, count = stats
        origin = _origin(mean, var, eps, x.dtype)
        number, exponent = weighed(*origin.scale, weight)
        size = exponent + exponent_of(number)
        half = size - size.clamp(-FAR, FAR)  # of two factors, since one may be out of range
        scale, after = (vector[:, None] for vector in (limited(scaled(number, exponent - half), WIDE), power(half)))
        before = column = None
        if sums is not None:
            n = divisor(count)
            if weights is not None:  # a sum of dy divided by that of all weights may leave the range
                common = -exponent_of(n)
                n, column = scaled(n, common), lifted_weights(weights).to(WIDE) * power(common)
            mean_dy, slope = (total / n for total in sums)
            slope = slope * origin.invstd
            vectors = mean_dy, origin.center, slope, -origin.rest * slope
            mean_dy, center, slope, rest = (vector[:, None] for vector in vectors)
            before = None if origin.before is None else origin.before[:, None]
        dx = torch.empty_like(x)
        arrays = lifted(dx), lifted(dy), lifted(x), column, _mask(weights, WIDE)
        for out, dy_block, x_block, weights_block, mask in _blocks(*arrays):
            values = _wide(dy_block)
            if sums is not None:
                projection = _wide(x_block)
                if before is not None:
                    projection.mul_(before)
                projection.sub_(center).mul_(slope).add_(rest)
                if weights_block is not None:
                    projection.mul_(weights_block)
                # Before anything else, so that little is lost of a gradient with a large mean.
                values.sub_(mean_dy if weights_block is None else mean_dy * weights_block).sub_(projection)
            values.mul_(scale)
            if x.dtype == WIDE:
                values.mul_(after)
            _clear(values, mask)
            out.copy_(values)
        return dx


def _one_of_three(x: torch.Tensor) -> torch.Tensor:
    """Return the one in the middle of three values of each channel, so that an outlier is not what sums are around."""
    return torch.stack((x[0, :, 0], x[len(x) // 2, :, 0], x[-1, :, 0])).to(WIDE).median(0).values


class _Origin(NamedTuple):
    """The center that deviations of channels are taken from, and their factors, all in float64."""

    center: torch.Tensor
    rest: torch.Tensor
    """Of the mean, what is not in the center."""
    before: torch.Tensor | None
    """Of float64, powers of two that values are multiplied by first; center and rest have been."""
    invstd: torch.Tensor
    """The factor that normalises deviations from the center."""
    scale: tuple[torch.Tensor, torch.Tensor | int]
    """The same of those of values themselves, as a number and an exponent."""


def _origin(mean: Mean, var: Variance, eps: float, dtype: torch.dtype) -> _Origin:
    hi, lo, var, given = separate(mean, var)
    hi, lo = as_pair(hi if lo is None else Pair(hi, lo))
    unit = 0 if given is None else given
    scale = number, exponent = spread(var, unit, eps)
    center = hi + lo
    rest = (hi - center) + lo
    if dtype != WIDE:
        return _Origin(center, rest, None, number, scale)
    before = exponent_before(number, exponent, center, unit, WIDE)
    center, rest = scaled(center, before + unit), scaled(rest, before + unit)
    return _Origin(center, rest, power(before), limited(scaled(number, exponent - before), WIDE), scale)


def _largest(x: torch.Tensor, shift: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the largest deviation from a shift of each channel."""
    largest = torch.zeros_like(shift)
    for block, mask in _blocks(x, _mask(weights, WIDE)):
        d = _wide(block).sub_(shift[:, None])
        _clear(d, mask)
        largest = torch.maximum(largest, d.abs_().amax((0, 2)))
    return largest.clamp(max=torch.finfo(WIDE).max)  # a difference may be beyond it


def _shifted_sums(
    x: torch.Tensor,
    shift: torch.Tensor,
    exponent: torch.Tensor | None,
    weights: torch.Tensor | None,
    apart: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of x - shift and of its squares for each channel of x, (N, C, L), in float64.

    If there is an exponent, both x and the shift are in units of a power of two. ``apart`` are powers of two that take
    the terms of both sums apart. What is left of a term after one has been added to it and taken off is a multiple of
    its last digit, and no sum of such multiples is as large as it is, so they add up without a rounding.

    Source: Rump, Ogita and Oishi, Accurate Floating-Point Summation Part I, 2008, section 3.
    """
    shift = shift[:, None]
    factor = None if exponent is None else power(-exponent)[:, None]

    def deviations(x: torch.Tensor) -> torch.Tensor:
        d = _wide(x)
        return (d if factor is None else d.mul_(factor)).sub_(shift)

    def in_parts(*terms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if apart is None:
            return terms
        multiples = [(term + unit[:, None]).sub_(unit[:, None]) for term, unit in zip(terms, apart, strict=True)]
        return *multiples, *(term.sub_(multiple) for term, multiple in zip(terms, multiples, strict=True))

    if weights is None:

        def terms(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            d = deviations(x)
            return in_parts(d, d * d)

        sums = _sums(terms, x)
    else:

        def weighted(x: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            d = deviations(x)
            _clear(d, mask)
            once = d * weights
            return in_parts(once, d.mul_(once))

        sums = _sums(weighted, x, lifted_weights(weights).to(WIDE), _mask(weights, WIDE))
    return (sums[0], sums[1]) if apart is None else (sums[0] + sums[2], sums[1] + sums[3])


def _sums(terms: Callable[..., tuple[torch.Tensor, ...]], *arrays: Any) -> tuple[torch.Tensor, ...]:
    """Return the sums of all terms of arrays of (N, C, L) for each channel, in float64.

    ``terms`` gives those of a block, in tensors of its own.
    """
    rows = _rows(arrays[0])
    chunks = [_chunk_sums(terms, chunk, rows) for chunk in _split(CHUNK * rows, *arrays)]
    return fold(fold(torch.stack(chunks)).movedim(-1, 0)).unbind()


def _chunk_sums(terms: Callable[..., tuple[torch.Tensor, ...]], arrays: tuple[Any, ...], rows: int) -> torch.Tensor:
    """Return the sums of all terms over the first axis, (terms, C, L), adding up blocks of so many rows."""
    blocks = _split(rows, *arrays)
    sums = terms(*next(blocks))
    for block in blocks:  # the last may be smaller
        for total, term in zip(sums, terms(*block), strict=True):
            total[: len(term)].add_(term)
    return fold(torch.stack(sums, dim=1))


def fold(d: torch.Tensor) -> torch.Tensor:
    """Return the sum over the first axis by adding the second half to the first until one is left; d is used up."""
    n = len(d)
    while n > 1:
        half = n // 2
        d[:half].add_(d[half : 2 * half])
        if n % 2:
            d[half].copy_(d[n - 1])
        n -= half
    return d[0]


def _blocks(*arrays: Any) -> Iterator[tuple[Any, ...]]:
    return _split(_rows(arrays[0]), *arrays)


def _rows(x: torch.Tensor) -> int:
    """Return how many rows of x, (N, C, L), make a block."""
    block = CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK
    return max(1, block // (x.shape[1] * x.shape[2]))


def _split(rows: int, *arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Iterate over blocks of so many rows of all arrays; one that is None stays None."""
    if len(arrays[0]) <= rows:
        return iter([arrays])
    return zip(*(repeat(None) if array is None else array.split(rows) for array in arrays), strict=False)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x in float64, to be written to: faster than arithmetic of two dtypes."""
    return x.to(WIDE, copy=True)


def _mask(weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask for ``_clear``: all bits of an integer as wide as the dtype, or none where the weight is 0."""
    return None if weights is None else -(lifted_weights(weights) > 0).to(_BITS[dtype])


def _clear(values: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Set values to 0 where the mask is, NaN included: bit by bit, which takes a quarter of the time of a selection."""
    if mask is not None:
        values.view(mask.dtype).bitwise_and_(mask)


EAGER = EagerKernels()
