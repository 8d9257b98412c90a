"""From masks, lengths and sample weights to the weights of values.

Eagerly they have been checked by the time they come here; under a trace nobody could, and what is no weight must not
pass for one.
"""

import torch

from mbn_cpu.vectors import FAR, TINY
from mbn_torch.tracing import is_traced


def weights(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Return the weights, of ``shape``: the sample weight where mask and lengths allow, else 0; NaN for no weight."""
    given = next(array for array in (mask, lengths, sample_weight) if array is not None)
    result = torch.ones((), dtype=dtype, device=given.device)
    if sample_weight is not None:
        result = _fitted(sample_weight.detach().to(dtype), shape)
        result = result.masked_fill(result < 0, torch.nan)
        if dtype == torch.float64:
            result = _summable(result)
    if mask is not None:
        result = torch.where(_fitted(mask, shape), result, 0)
    if lengths is not None:
        length = shape[-1]
        lengths = lengths.to(torch.int64)[:, None]
        result = torch.where(torch.arange(length, device=lengths.device) < lengths, result, 0)
        result = result.masked_fill((lengths < 0) | (lengths > length), torch.nan)
    return result.expand(shape)


def within(values: torch.Tensor, low: float, high: float) -> bool | None:
    """Tell whether ``low <= value < high`` holds for all values; None where there are none to be seen."""
    if is_traced(values):
        return None
    if not values.is_floating_point():
        values = values.to(torch.int64)
    return bool(((values >= low) & (values < high)).all())


def _summable(weights: torch.Tensor) -> torch.Tensor:
    """Return weights times a power of two, if they need one for their sums to be in range.

    As :func:`mbn_cpu.vectors.combine_weights` does it; no host waits for it, and no branch depends on it.
    """
    if 0 in weights.shape:
        return weights
    _, exponent = torch.frexp(weights.amax())
    power = torch.where(exponent > FAR, FAR - exponent, torch.where(exponent < -FAR, -FAR - exponent, 0))
    half = power // 2  # 2**power may be beyond the range
    near = weights * torch.exp2(half.to(weights.dtype)) * torch.exp2((power - half).to(weights.dtype))
    return torch.where((weights > 0) & (near == 0), TINY, near)


def _fitted(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return (N,) or (N, L) values in a shape that broadcasts to that of the weights."""
    return values[:, None] if values.ndim < len(shape) else values
