"""Arithmetic on the statistics of channels, (C,) vectors in float64.

All kernels use it, the traceable ones too. So every function can be traced, vectorised and differentiated to any order:
no tensor is written to, and the branch of a selection that is not taken gives no NaN in a derivative.
"""

import math
from typing import Any, NamedTuple

import torch

from mbn.contract import Batch, Kernels, Moments
from mbn_common.channel_stats import FAR, FARTHEST, Formulas, Mean, Pair, Scaled, Variance

WIDE = torch.float64

_NARROW_FAR = 100
"""The exponent above which a product may leave the range of float32; above ``FAR`` a square may leave float64's."""


def as_pair(mean: Pair | torch.Tensor) -> Pair:
    """Return a mean as a pair: the mean itself, or a vector with a low part of 0."""
    return mean if isinstance(mean, Pair) else Pair(mean.to(WIDE), torch.zeros_like(mean, dtype=WIDE))


def parts(statistic: Mean | Variance | None) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors of a mean or variance, its exponents last."""
    if isinstance(statistic, Scaled):
        return *parts(statistic.values), statistic.exponent
    return statistic if isinstance(statistic, Pair) else (statistic,)


def separate(mean: Any, var: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Return the mean's high and low part, the variance, and the exponents of their units.

    The low part is None for a plain vector, the exponents are None where all units are 1.
    """
    exponent = None
    if isinstance(var, Scaled):
        (mean, exponent), (var, _) = mean, var
    return (*mean, var, exponent) if isinstance(mean, Pair) else (mean, None, var, exponent)


def in_units(
    hi: torch.Tensor, lo: torch.Tensor, var: torch.Tensor, exponent: torch.Tensor | None
) -> tuple[Mean, Variance]:
    """Return a mean and a variance (or m2) from their parts: the inverse of ``separate``."""
    mean = Pair(hi, lo)
    if exponent is None:
        return mean, var
    exponent = exponent.to(torch.int32)  # np.ldexp takes int32 on every platform
    return Scaled(mean, exponent), Scaled(var, 2 * exponent)


class Line(NamedTuple):
    """Normalisation as ``(x * before - center) * scale + shift``; all are (C,) in the dtype of the arithmetic.

    The center is the mean rounded to that dtype, so the difference is exact where x is near the mean. The shift
    contains the rounding error of the center; it is None where there is neither such an error nor a bias. ``before`` is
    a power of two, nearly always 1.
    """

    before: torch.Tensor
    center: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None


def line(
    mean: Mean, var: Variance, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> Line:
    """Return the factors of normalisation in ``dtype``."""
    hi, lo, var, given = separate(mean, var)
    unit = 0 if given is None else given
    number, exponent = weighed(*spread(var, unit, eps), weight)
    center = limited(hi if lo is None else hi + lo, dtype)
    before = exponent_before(number, exponent, center, unit, dtype)
    shift = None
    if lo is not None or hi.dtype != dtype:  # the center is rounded
        wide = center.to(WIDE)
        shift = scaled((wide - hi - (0 if lo is None else lo)) * number, exponent + unit)
        shift = shift.masked_fill(number == 0, 0)
    if bias is not None:
        shift = bias if shift is None else shift + bias
    return Line(
        power(before).masked_fill(number == 0, 0).to(dtype),
        scaled(center.to(WIDE), before + unit).masked_fill(number == 0, 0).to(dtype),
        limited(scaled(number, exponent - before), dtype),
        None if shift is None else shift.to(dtype),
    )


def spread(var: torch.Tensor, unit: torch.Tensor | int, eps: float) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Return 1 / sqrt(var + eps) as a number and an exponent; the variance is ``var * 2**(2 * unit)``."""
    if isinstance(unit, int):
        return invstd(var, eps), 0
    # Take the larger of the two units, in which neither var nor eps overflows.
    common = unit.clamp(min=max(math.frexp(eps)[1] // 2, -FARTHEST)).where(unit != 0, 0) if eps > 0 else unit
    little = scaled(scaled(torch.full_like(var, eps), -common), -common)
    return invstd(scaled(var, 2 * (unit - common)), little), -common


def weighed(
    number: torch.Tensor, exponent: torch.Tensor | int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``number * 2**exponent * weight`` as a number and an exponent, without overflow or underflow."""
    own = exponent_of(number)
    number, exponent = scaled(number, -own), own + exponent
    if weight is not None:
        weight = weight.to(WIDE)
        other = exponent_of(weight)
        number, exponent = number * scaled(weight, -other), exponent + other
    return number, exponent


def exponent_before(
    number: torch.Tensor,
    exponent: torch.Tensor | int,
    center: torch.Tensor,
    unit: torch.Tensor | int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the exponent of the power of two by which values and their center are multiplied before the subtraction.

    It is 0 unless the difference, or its product with the scale, ``number * 2**exponent``, might leave the range of the
    dtype. The center is ``center * 2**unit``.
    """
    far, top, least = (FAR, 1024, -1022) if dtype == WIDE else (_NARROW_FAR, 128, -149)
    size, other = exponent_of(number) + exponent, exponent_of(center.to(WIDE)) + unit
    is_near = (other < far) & (size.abs() <= far) & (unit == 0)
    return torch.minimum(size, top - 8 - other).clamp(least, top - 1).masked_fill(is_near, 0)


def exponent_of(values: torch.Tensor) -> torch.Tensor:
    """Return the exponents of float64 numbers, at least -FARTHEST so that 2**exponent has an inverse; 0 for 0."""
    values = values.detach()
    return (((values.view(torch.int64) >> 52) & 0x7FF) - 1023).clamp(-FARTHEST, 1023).masked_fill(values == 0, 0)


def units_of(largest: torch.Tensor) -> torch.Tensor:
    """Return the exponents of units in which squares of values up to these stay in range: nearly always 0."""
    exponent = exponent_of(largest).clamp(max=FARTHEST)
    return exponent.masked_fill(exponent.abs() <= FAR, 0)


def power(exponent: torch.Tensor) -> torch.Tensor:
    """Return powers of two in float64, subnormal ones included."""
    half = exponent >> 1
    return _ordinary_power(half) * _ordinary_power(exponent - half)


def scaled(values: torch.Tensor, exponent: torch.Tensor | int) -> torch.Tensor:
    """Return float64 numbers times 2**exponent; the power itself may be out of range."""
    if isinstance(exponent, int):
        return values * 2.0**exponent
    half = exponent >> 1
    return values * _ordinary_power(half) * _ordinary_power(exponent - half)


def _ordinary_power(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent.to(torch.int64).clamp(-1022, 1023) + 1023) << 52).view(WIDE)


def limited(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values in a dtype; larger ones become its largest number, since 0 times infinity would be NaN."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


def invstd(var: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """Return 1 / sqrt(var + eps), and 0 with derivatives of 0 where var + eps is 0."""
    total = var.to(WIDE) + eps
    is_zero = total == 0
    return total.masked_fill(is_zero, 1).sqrt().reciprocal().masked_fill(is_zero, 0)


def heaviest(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the values of x, (N, C, L), in the first cell of the largest weight, one per channel; 0 if all weigh 0.

    They are the shift of the sums: a sum of squares around them is not much larger than m2. The cell is the same for
    all channels, and the host does not wait for the device.
    """
    x = x.detach()
    if weights is None:
        return x[0, :, 0].to(WIDE)
    flat = weights.flatten()
    cell = flat.argmax(keepdim=True)
    values = x[cell // x.shape[2], :, cell % x.shape[2]][0]
    return torch.where(flat[cell] > 0, values, 0).to(WIDE)


def lifted(x: torch.Tensor) -> torch.Tensor:
    """Return x, (N, C) or (N, C, L), as (N, C, L)."""
    return x if x.ndim == 3 else x[:, :, None]


def lifted_weights(weights: torch.Tensor) -> torch.Tensor:
    """Return weights, (N,) or (N, L), in the shape that broadcasts against an x of (N, C, L)."""
    return weights.reshape(len(weights), 1, -1)


def widened(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return values as they are, or in float64 if the layer is: results must be as exact as its statistics."""
    return values.to(WIDE) if batch.dtype == "float64" else values


class TorchFormulas(Formulas):
    """The formulas on tensors, traced ones too: powers of two are made from bits, and statistics are detached."""

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(WIDE)

    def rounded(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.to(like.dtype)

    def constant(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def copied(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def exponent_of(self, x: torch.Tensor) -> torch.Tensor:
        return exponent_of(x)

    def scaled(self, x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
        return scaled(x, exponent)

    def as_exponent(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.int32)

    def sample_weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        sample_weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the sample weight of each unmasked cell, and 0 for masked ones.

        A traced weight below 0, or a length out of range, gives NaN: an error cannot depend on a traced value.
        """
        if mask is not None and lengths is None and sample_weight is None:
            result = mask.to(getattr(torch, dtype))
            return result if result.ndim == len(shape) else result[:, None].expand(shape)
        given = next(array for array in (mask, lengths, sample_weight) if array is not None)
        result = torch.ones((), dtype=getattr(torch, dtype), device=given.device)
        if sample_weight is not None:
            result = _fitted(sample_weight.detach().to(result.dtype), shape)
            result = result.masked_fill(result < 0, torch.nan)
            if dtype == "float64":
                result = self.summable(result)
        if mask is not None:
            result = torch.where(_fitted(mask, shape), result, 0)
        if lengths is not None:
            length = shape[-1]
            lengths = lengths.to(torch.int64)[:, None]
            result = torch.where(torch.arange(length, device=lengths.device) < lengths, result, 0)
            result = result.masked_fill((lengths < 0) | (lengths > length), torch.nan)
        return result.expand(shape)


def _fitted(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return (N,) or (N, L) values in a shape that broadcasts to that of the weights."""
    return values[:, None] if values.ndim < len(shape) else values


FORMULAS = TorchFormulas(torch, torch.Tensor)
divisor, variance = FORMULAS.divisor, FORMULAS.variance


class TorchKernels(Kernels):
    """The base of all kernels of tensors: the formulas on vectors."""

    merge, variance, step, lerp = FORMULAS.merge, FORMULAS.variance, FORMULAS.step, FORMULAS.lerp
    to_vectors, from_vectors = FORMULAS.to_vectors, FORMULAS.from_vectors
    sample_weights = FORMULAS.sample_weights


class ConcreteKernels(TorchKernels):
    """The base of kernels of untraced tensors. Branches may depend on values on the CPU; the host waits for no GPU."""

    def merge(self, first: Moments, second: Moments) -> Moments:
        """Return the moments of two batches together; scaled only if the merged m2 overflows float64."""
        merged = FORMULAS.merge(first, second)
        is_finite = isinstance(merged.m2, Scaled) or merged.m2.device.type != "cpu" or merged.m2.isfinite().all()
        return merged if is_finite else FORMULAS.merge_scaled(first, second)
