"""Kernels of Torch's own operations, for tensors that no other kernels support; autograd must not record them.

Statistics are exact to float64 for every dtype of x, and their bits do not vary between calls, memory orders or numbers
of threads. ``torch.sum`` guarantees none of this, so sums are elementwise additions in a fixed order. The kernels work
on blocks that fit the caches. ``traceable.py`` has the kernels that autograd can record.
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
"""Values of a block, 1 MiB in float64: small enough for the caches, large enough for a few threads."""

GPU_BLOCK = 1 << 24
"""Values of a block on a GPU, 128 MiB in float64: few launches matter more there than little memory."""

CHUNK = 64
"""Blocks added one after another: less memory traffic than a tree, but rounding errors accumulate within a chunk."""

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class EagerKernels(ConcreteKernels):
    """Kernels made of Torch's operations, computed in blocks of rows."""

    def moments(self, batch: Batch) -> Moments:
        """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

        The kernel sums d = x - shift and d², with one value of each channel as its shift. However far the shift is from
        the mean, this loses at most a factor N of float64's precision, which suffices for narrower input. float64 input
        is summed a second time around its mean, which also gives the low part of the mean. The second sums use units in
        which no channel leaves the range, and split each term in two, so that one value that dwarfs the others costs no
        digits.

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
        mean, and the shift contains the remainder of the mean. If the scale is out of range, a power of two is moved
        from it to x and K, which are multiplied by that power first.
        """
        x, weights, _ = batch
        mean, var, _ = stats
        weight, bias = params
        compute = torch.promote_types(x.dtype, torch.float32)  # float32 for float16 and bfloat16
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
        half = size - size.clamp(-FAR, FAR)  # split the scale into two factors, since one may be out of range
        scale, after = (vector[:, None] for vector in (limited(scaled(number, exponent - half), WIDE), power(half)))
        before = column = None
        if sums is not None:
            n = divisor(count)
            if weights is not None:  # scale count and weights alike: sum(dy) / count may leave the range
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
                # Subtract the mean first, so that a dy with a large mean loses few digits.
                values.sub_(mean_dy if weights_block is None else mean_dy * weights_block).sub_(projection)
            values.mul_(scale)
            if x.dtype == WIDE:
                values.mul_(after)
            _clear(values, mask)
            out.copy_(values)
        return dx


def _one_of_three(x: torch.Tensor) -> torch.Tensor:
    """Return the median of three values of each channel, the shift of its sums: it is unlikely to be an outlier."""
    return torch.stack((x[0, :, 0], x[len(x) // 2, :, 0], x[-1, :, 0])).to(WIDE).median(0).values


class _Origin(NamedTuple):
    """The center of the deviations of each channel, and the factors of the deviations, all in float64."""

    center: torch.Tensor
    rest: torch.Tensor
    """The mean minus the center."""
    before: torch.Tensor | None
    """Powers of two by which values of float64 are multiplied first; they are included in center and rest."""
    invstd: torch.Tensor
    """The factor that normalises the deviations; ``before`` is divided out."""
    scale: tuple[torch.Tensor, torch.Tensor | int]
    """1 / sqrt(var + eps), as a number and an exponent."""


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
    """Return the largest absolute deviation of each channel from its shift."""
    largest = torch.zeros_like(shift)
    for block, mask in _blocks(x, _mask(weights, WIDE)):
        d = _wide(block).sub_(shift[:, None])
        _clear(d, mask)
        largest = torch.maximum(largest, d.abs_().amax((0, 2)))
    return largest.clamp(max=torch.finfo(WIDE).max)  # a difference may overflow


def _shifted_sums(
    x: torch.Tensor,
    shift: torch.Tensor,
    exponent: torch.Tensor | None,
    weights: torch.Tensor | None,
    apart: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of x - shift and of its squares for each channel of x, (N, C, L), in float64.

    With an exponent, x is divided by 2**exponent, and the shift is given in the same unit. ``apart`` are two powers of
    two, one for the terms of each sum, larger than any sum of the terms. Adding such a power to a term and subtracting
    it again rounds the term to a multiple of the power's last digit. The multiples add up without a rounding error; the
    remainders of the terms are summed separately.

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
    """Return the sum of each term over the cells of arrays of (N, C, L), for each channel in float64.

    ``terms`` returns the terms of a block of rows, in new tensors.
    """
    rows = _rows(arrays[0])
    chunks = [_chunk_sums(terms, chunk, rows) for chunk in _split(CHUNK * rows, *arrays)]
    return fold(fold(torch.stack(chunks)).movedim(-1, 0)).unbind()


def _chunk_sums(terms: Callable[..., tuple[torch.Tensor, ...]], arrays: tuple[Any, ...], rows: int) -> torch.Tensor:
    """Return the sums of all terms over the rows of a chunk, (terms, C, L), adding blocks of ``rows`` rows."""
    blocks = _split(rows, *arrays)
    sums = terms(*next(blocks))
    for block in blocks:  # the last one may be smaller
        for total, term in zip(sums, terms(*block), strict=True):
            total[: len(term)].add_(term)
    return fold(torch.stack(sums, dim=1))


def fold(d: torch.Tensor) -> torch.Tensor:
    """Return the sum over the first axis, by adding the second half to the first until one is left; overwrites d."""
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
    """Return the number of rows of x, (N, C, L), in a block."""
    block = CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK
    return max(1, block // (x.shape[1] * x.shape[2]))


def _split(rows: int, *arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Iterate over blocks of ``rows`` rows of all arrays; None stays None."""
    if len(arrays[0]) <= rows:
        return iter([arrays])
    return zip(*(repeat(None) if array is None else array.split(rows) for array in arrays), strict=False)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return a new copy of x in float64: faster than arithmetic that mixes dtypes."""
    return x.to(WIDE, copy=True)


def _mask(weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask for ``_clear``: integers as wide as the dtype, with no bit set where the weight is 0, else all."""
    return None if weights is None else -(lifted_weights(weights) > 0).to(_BITS[dtype])


def _clear(values: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Set values, NaN included, to 0 where the mask is 0: a bitwise "and" takes a quarter of the time of ``where``."""
    if mask is not None:
        values.view(mask.dtype).bitwise_and_(mask)


EAGER = EagerKernels()
