"""Torch's arithmetic.

Statistics are exact to float64, whatever x is, and the bits do not depend on the run, the memory order or the number
of threads: ``torch.sum`` promises none of this, so sums are elementwise additions in a fixed order. Autograd has to see
through all of it, so nothing is written to that it needs.
"""

from typing import NamedTuple, TypeAlias

import torch

from mbn.contract import Moments

CPU_BLOCK = 1 << 17
"""Values converted to float64 at a time: 1 MiB, small enough for the caches and large enough for a few threads."""

GPU_BLOCK = 1 << 24
"""The same on a GPU, 128 MiB: there, fewer launches count for more than less memory."""

RUN = 64
"""Blocks added one after another, which costs less memory traffic than a tree but lets rounding errors add up too."""

WIDE = torch.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: torch.Tensor
    lo: torch.Tensor


Mean: TypeAlias = Pair | torch.Tensor


def moments(x: torch.Tensor) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    Sums of d = x - shift and of d², with the first value of each channel for a shift, lose at most a factor N of
    float64's precision however far the shift is from the mean, since the shift is one of the values. That is plenty
    for narrower input. float64 input is summed again around its mean, which also gives the rest of the mean. To
    autograd the shift is a constant, as the result does not depend on it.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    count = x.numel() // x.shape[1]
    if x.ndim == 2:  # noqa: PLR2004 - (N, C) is (N, C, 1)
        x = x[:, :, None]
    shift = x.detach()[0, :, 0].to(WIDE)
    if x.dtype == WIDE:
        total, _ = _shifted_sums(x.detach(), shift)
        shift = shift + total / count
    total, squares = _shifted_sums(x, shift)
    return Moments(count, Pair(shift, total / count), squares - total * total / count)


def normalize(
    x: torch.Tensor,
    mean: Mean,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order.

    Computed as (x - K) * scale + shift with K the mean rounded to x's precision: x - K is exact where x is near the
    mean, and the rest of the mean goes into the shift.
    """
    compute = torch.promote_types(x.dtype, torch.float32)  # float16 and bfloat16 are computed in float32
    spread = var.to(WIDE) + eps
    # An infinite spread gives a scale of 0, and a gradient of 0 where one through 1 / sqrt(0) would be NaN.
    scale = spread.masked_fill(spread == 0, torch.inf).sqrt().reciprocal()
    if weight is not None:
        scale = scale * weight
    hi, lo = mean if isinstance(mean, Pair) else (mean.to(WIDE), 0)
    rounded = (hi + lo).detach().to(compute)
    shift = (rounded - hi - lo) * scale
    if bias is not None:
        shift = shift + bias
    y = x - _column(rounded, x.ndim)
    # In place, which saves the time to allocate; autograd keeps a copy of the factors that it needs.
    y.mul_(_column(scale.to(compute), x.ndim)).add_(_column(shift.to(compute), x.ndim))
    return y.to(x.dtype)


@torch.no_grad()
def lerp(start: torch.Tensor, end: Mean, weight: float | torch.Tensor) -> torch.Tensor:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start.

    Statistics are no function of x to autograd: through them, each batch would hold on to the graphs of all before.
    """
    if isinstance(end, Pair):
        end = end.hi + end.lo
    return ((1 - weight) * start.to(WIDE) + weight * end).to(start.dtype)


def _shifted_sums(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of x - shift and of its squares for each channel of x, (N, C, L), in float64."""
    block = CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK
    rows = max(1, block // (x.shape[1] * x.shape[2]))
    runs = [_run_of_blocks(run, shift[:, None], rows) for run in x.split(RUN * rows)]
    total, squares = (_fold(_fold(torch.stack(sums)).T) for sums in zip(*runs, strict=True))
    return total, squares


def _run_of_blocks(x: torch.Tensor, shift: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over the first axis of x - shift and of its squares, adding up blocks of so many rows."""
    total = torch.zeros_like(x[:rows], dtype=WIDE)
    squares = torch.zeros_like(total)
    for block in x.split(rows):  # the last may be smaller
        d = block - shift
        total[: len(d)].add_(d)
        squares[: len(d)].add_(d * d)
    return _fold(total), _fold(squares)


def _fold(d: torch.Tensor) -> torch.Tensor:
    """Return the sum over the first axis by adding the second half to the first until one is left."""
    while len(d) > 1:
        half = len(d) // 2
        folded = d[:half] + d[half : 2 * half]
        d = torch.cat([folded, d[2 * half :]]) if len(d) % 2 else folded
    return d[0]


def _column(vector: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)
