"""Kernels of differentiable operations, for calls that Torch records, traces or vectorises.

Their derivatives of every order, in reverse, forward and mixed mode, must be right. So each kernel composes
differentiable operations in float64, and replaces a value of weight 0 before any operation reads it: no derivative
multiplies it by 0, which would give NaN for an infinite value. No tensor is written to and no branch depends on a
value, so every kernel can be traced.
"""

from typing import Any

import torch

from mbn.contract import Batch, Moments, Params, Stats
from mbn_torch.channel_stats import (
    FAR,
    WIDE,
    Mean,
    Scaled,
    TorchKernels,
    as_pair,
    divisor,
    exponent_of,
    heaviest,
    in_units,
    invstd,
    lifted,
    lifted_weights,
    power,
    scaled,
    separate,
    spread,
    units_of,
    weighed,
)
from mbn_torch.private import is_scripted


class TraceableKernels(TorchKernels):
    """Kernels that every transformation of Torch can trace."""

    def moments(self, batch: Batch) -> Moments:
        """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

        A first sum, around one of the values, gives an approximate mean; the second sums are around that mean, in units
        in which no channel leaves the range. Mean and units are constants to autograd, since the result does not depend
        on them.
        """
        x, weights, _ = batch
        x = lifted(x)
        shift = heaviest(x, weights)
        values = _counted(x, shift, weights)
        constants = values.detach()
        unit = None
        factor: torch.Tensor | int = 1
        if not is_scripted():  # exporters have no operation that reads the bits of a number
            unit = units_of(torch.maximum(constants.amax((0, 2)), -constants.amin((0, 2))))
            factor, shift = power(-unit)[:, None], scaled(shift, -unit)
        weights = None if weights is None else _constant(weights)
        count = x.shape[0] * x.shape[2] if weights is None else weights.sum()
        n = divisor(count)
        center = shift + _total(constants * factor - shift[:, None], weights) / n
        d = values * factor - center[:, None]
        total, squares = _total(d, weights), _total(d.square(), weights)
        lo = total / n
        return Moments(count, *in_units(center, lo, squares - total * lo, unit))

    def normalize(
        self, batch: Batch, stats: Stats, params: Params, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype."""
        x, weights, _ = batch
        mean, var, _ = stats
        weight, bias = params
        y = _xhat(x, mean, var, eps, weights)
        if weight is not None:
            y = y * weight[:, None]
        if bias is not None:
            y = y + bias[:, None]
        y = _like(x, y, weights)
        return y if out is None else out.copy_(y)

    def grad_sums(self, dy: torch.Tensor, batch: Batch, stats: Stats, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of dy and of dy * xhat for each channel, in float64."""
        x, weights, _ = batch
        mean, var, _ = stats
        dy = _counted(lifted(dy), None, weights)
        return _total(dy, None), _total(dy * _xhat(x, mean, var, eps, weights), None)

    def grad_input(
        self,
        dy: torch.Tensor,
        batch: Batch,
        stats: Stats,
        weight: torch.Tensor | None,
        eps: float,
        sums: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the gradient of x, in its dtype."""
        x, weights, _ = batch
        mean, var, count = stats
        dx = _counted(lifted(dy), None, weights)
        if sums is not None:
            mean_dy, slope = (total[:, None] / divisor(count) for total in sums)
            projection = slope * _xhat(x, mean, var, eps, weights)
            if weights is not None:
                mean_dy, projection = _constant(weights) * mean_dy, _constant(weights) * projection
            dx = dx - mean_dy - projection
        _, _, var, unit = separate(mean, var)
        if unit is None:
            scale = invstd(var, eps) if weight is None else invstd(var, eps) * weight
            return _like(x, dx * scale[:, None], weights)
        number, exponent = weighed(*spread(var, unit, eps), weight)
        size = exponent + exponent_of(number)
        half = size - size.clamp(-FAR, FAR)  # split the scale into two factors, since one may be out of range
        return _like(x, dx * scaled(number, exponent - half)[:, None] * power(half)[:, None], weights)


def _xhat(x: torch.Tensor, mean: Mean, var: Any, eps: float, weights: torch.Tensor | None) -> torch.Tensor:
    """Return (x - mean) / sqrt(var + eps) as (N, C, L) in float64."""
    if isinstance(mean, Scaled):
        (hi, lo), unit = mean
        d: torch.Tensor = (
            _counted(lifted(x), scaled(hi, unit), weights) * power(-unit)[:, None] - hi[:, None] - lo[:, None]
        )
        number, exponent = spread(var.values, unit, eps)
        return d * scaled(number, exponent + unit)[:, None]
    hi, lo = as_pair(mean)
    d = _counted(lifted(x), hi, weights) - hi[:, None] - lo[:, None]
    return d * invstd(var, eps)[:, None]


def _total(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the weighted sum of each channel, over one axis at a time: over both, Torch would add row after row."""
    values = values if weights is None else weights * values
    return (values[:, :, 0] if values.shape[2] == 1 else values.sum(2)).sum(0)


def _counted(x: torch.Tensor, other: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor:
    """Return x, (N, C, L), in float64, with values of weight 0 replaced by 0, or by a (C,) vector's number."""
    x = x.to(WIDE)
    if weights is None:
        return x
    return torch.where(lifted_weights(weights) > 0, x, 0 if other is None else other[:, None])


def _like(x: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return values, (N, C, L), in the shape and dtype of x, with 0 where the weight is 0."""
    if weights is not None:
        weights = _constant(weights)
        values = torch.where(weights > 0, values, 0 * weights)  # an invalid weight, NaN, gives NaN
    return values.reshape(x.shape).to(x.dtype)


def _constant(weights: torch.Tensor) -> torch.Tensor:
    return lifted_weights(weights.detach()).to(WIDE)


TRACEABLE = TraceableKernels()
