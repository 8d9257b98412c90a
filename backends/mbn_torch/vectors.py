"""Arithmetic on the statistics of channels, (C,) vectors in float64.

It serves the kernels and the formulas alike, so everything here can be traced, vectorised and differentiated to any
order: nothing is written to, and no branch that is not taken turns a derivative into NaN.
"""

from typing import Any, NamedTuple, TypeAlias

import torch

from mbn.contract import Moments

WIDE = torch.float64


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors: what float64 input needs to keep its last digits."""

    hi: torch.Tensor
    lo: torch.Tensor


Mean: TypeAlias = Pair | torch.Tensor


def as_pair(mean: Mean) -> Pair:
    """Return a mean as a pair, whatever form it has."""
    return mean if isinstance(mean, Pair) else Pair(mean.to(WIDE), torch.zeros_like(mean, dtype=WIDE))


def parts(statistic: Mean | None) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors that a mean or variance consists of: none, where it is scaled, as arrays of the host are."""
    if isinstance(statistic, tuple):
        return statistic if isinstance(statistic, Pair) else ()
    return (statistic,)


class Line(NamedTuple):
    """Normalisation as ``(x - center) * scale + shift`` in the dtype that it is computed in; each (C,), or no shift.

    ``x - center`` is exact where x is near the mean, of which the center is all that its dtype holds; the rest of the
    mean is in the shift.
    """

    center: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None


def line(
    mean: Mean,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Line:
    """Return how to normalise in ``dtype``."""
    scale = invstd(var, eps)
    if weight is not None:
        scale = scale * weight
    if not isinstance(mean, Pair) and mean.dtype == dtype:  # nothing of it is lost
        return Line(mean, scale.to(dtype), None if bias is None else bias.to(dtype))
    hi, lo = as_pair(mean)
    center = (hi + lo).to(dtype)
    shift = (center - hi - lo) * scale
    if bias is not None:
        shift = shift + bias
    return Line(center, scale.to(dtype), shift.to(dtype))


def divisor(count: Any) -> Any:
    """Return what to divide sums by: the count, or 1 where that is 0 and so are the sums."""
    return count.masked_fill(count == 0, 1) if isinstance(count, torch.Tensor) else count


def invstd(var: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(var + eps), and 0 with derivatives of 0 where var + eps is 0."""
    spread = var.to(WIDE) + eps
    is_zero = spread == 0
    return spread.masked_fill(is_zero, 1).sqrt().reciprocal().masked_fill(is_zero, 0)


def merge(first: Moments, second: Moments) -> Moments:
    """Return the statistics of two batches together.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979,
    equations 2.1.
    """
    (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
    total = count + more
    share = more / divisor(total)
    difference = (other_hi - hi) + (other_lo - lo)
    change = lo + difference * share
    mean = hi + change
    rest = change - (mean - hi)  # what rounding took off
    return Moments(total, Pair(mean, rest), m2 + (more_m2 + difference * difference * (count * share)))


def variance(moments: Moments, correction: int) -> torch.Tensor:
    """Return m2 / (count - correction), and 0 where weights add up to less."""
    _, _, m2 = moments
    excess = moments.count - correction
    if not isinstance(excess, torch.Tensor):
        return m2 / excess
    is_missing = excess <= 0
    return (m2 / excess.masked_fill(is_missing, 1)).masked_fill(is_missing, 0)


def lerp(start: torch.Tensor, end: Mean, weight: float | torch.Tensor) -> torch.Tensor:
    """Return (1 - weight) * start + weight * end, computed in float64 and rounded once to the dtype of start.

    Statistics are no function of x to autograd: through them, each batch would hold on to the graphs of all before.
    """
    start = start.detach()
    end = end.hi.detach() + end.lo.detach() if isinstance(end, Pair) else end.detach()
    moved = ((1 - weight) * start.to(WIDE) + weight * end).to(start.dtype)
    # A batch that does not count leaves no trace, even of values that are not finite.
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 0, start, moved)
    return start.clone() if weight == 0 else moved


def step(
    momentum: float | None, num_batches_tracked: torch.Tensor | None, count: Any, correction: int
) -> float | torch.Tensor:
    """Return momentum or 1 / num_batches_tracked, and 0 where weights add up to ``correction`` or less."""
    weight = num_batches_tracked.to(WIDE).reciprocal() if momentum is None else momentum
    if not isinstance(count, torch.Tensor):
        return weight
    return (~(count <= correction)).to(WIDE) * weight  # a count of NaN is to be seen in the statistics


def heaviest(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the first of the values of x, (N, C, L), that weigh most, one for each channel; 0 where none weighs.

    Around it, no sum of squares is much larger than m2. It is taken at the same place in all channels, and no host
    waits for it.
    """
    x = x.detach()
    if weights is None:
        return x[0, :, 0].to(WIDE)
    flat = weights.flatten()
    place = flat.argmax(keepdim=True)
    values = x[place // x.shape[2], :, place % x.shape[2]][0]
    return torch.where(flat[place] > 0, values, 0).to(WIDE)


def lifted(x: torch.Tensor) -> torch.Tensor:
    """Return x, (N, C) or (N, C, L), as (N, C, L)."""
    return x if x.ndim == 3 else x[:, :, None]  # noqa: PLR2004


def lifted_weights(weights: torch.Tensor) -> torch.Tensor:
    """Return weights, (N,) or (N, L), in the shape that broadcasts against an x of (N, C, L)."""
    return weights.reshape(len(weights), 1, -1)
