"""Separate computations for channels whose numbers leave the range in which the passes compute.

Batch normalisation does not depend on units: x, its mean, its deviation and the root of eps may all be divided by one
power of two, and dy and dx by another. In a unit of its own each channel here has ordinary numbers; the exponents of
the units are kept separately until the end. All computations are NumPy's, in float64, on copies of these channels. They
replace the channels in the results of the passes; every other channel keeps its bits.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Batch, Moments, Stats
from mbn_cpu.channel_stats import (
    WIDE,
    Line,
    Mean,
    Pair,
    Scaled,
    Variance,
    as_pair,
    exponent_of,
    in_range,
    invstd,
    scaled,
)

Sums: TypeAlias = tuple[np.ndarray, np.ndarray]

_LEAST, _MOST = 2.0**-900, 2.0**900
"""Sums and factors of gradients between these have lost no digits."""
_FAR = 960
"""The exponent beyond which a difference, or a sum with a bias, may leave the range."""


class _Units(NamedTuple):
    """Channels in units: xhat is ``(x * 2**-exponent - center + rest) * scale * 2**(exponent + power)``."""

    center: np.ndarray
    rest: np.ndarray
    exponent: np.ndarray
    scale: np.ndarray
    """Between 1/2 and 2, or 0."""
    power: np.ndarray


def of_line(line: Line, mean: Mean, var: Variance, weight: np.ndarray | None, eps: float) -> np.ndarray | None:
    """Return the channels that a line would normalise wrongly, or None."""
    center, scale, shift = line
    reciprocal = 1 / scale
    # A fast test, which passes if all exponents are within half of the range.
    bound = np.dot(scale, scale) + np.dot(reciprocal, reciprocal) + np.dot(center, center) + np.dot(shift, shift)
    if bound < np.inf and not isinstance(var, Scaled):
        return None
    least, far = _LIMITS[scale.dtype.char]
    size = abs(scale)
    is_ordinary = (size >= least) & (size < np.inf) & (abs(center) < far) & (abs(shift) < far)
    is_ordinary |= _is_zero(var, weight, eps) & (abs(center) < far) & (abs(shift) < far)
    # Channels whose statistics are not finite stay as they are.
    return _channels(~is_ordinary & np.isfinite(sum(as_pair(mean))) & ~np.isnan(invstd(var, eps)), var)


def of_sums(sums: Sums, var: Variance, eps: float) -> np.ndarray | None:
    """Return the channels whose sums of gradients may have lost digits, or None."""
    sum_dy, sum_dy_xhat = sums
    products = abs(sum_dy_xhat) / invstd(var, eps)
    is_ordinary = (products >= _LEAST) & (products < _MOST) & (abs(sum_dy_xhat) < _MOST) & (abs(sum_dy) < _MOST)
    return _channels(~is_ordinary, var)


def of_factors(
    sums: Sums | None, var: Variance, weight: np.ndarray | None, eps: float, count: float | None
) -> np.ndarray | None:
    """Return the channels in which a factor of the gradient leaves the range, or None."""
    factor = invstd(var, eps)
    factors = [factor if weight is None else factor * weight]
    is_beyond = (factors[0] == 0) & ~_is_zero(var, weight, eps)
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        factors += [sum_dy, sum_dy_xhat, factor * sum_dy_xhat / count]
    for values in factors:
        size = abs(values)
        is_beyond |= ~(size < _MOST) | ((size < _LEAST) & (size > 0))
    return _channels(is_beyond, var)


def moments(kernel: Callable[..., Moments], x: np.ndarray, weights: np.ndarray | None, found: Moments) -> Moments:
    """Return the statistics of x in float64, given those of a kernel, ``found``; channels out of range are replaced."""
    count, mean, m2 = found
    is_ordinary = in_range(m2)
    if is_ordinary.all():
        return found
    channels = np.flatnonzero(~is_ordinary)
    part = _part(x, channels)
    exponent = _largest_exponent(part, weights)
    part = np.ldexp(part, -_along(exponent, x), out=part)
    _, pair, squares = kernel(part, weights)
    changed = (squares > 0) & (squares < np.inf)  # constant channels stay as they are, as do those that are not finite
    if not changed.any():
        return found
    channels = channels[changed]
    unit = np.zeros(len(m2), np.intc)
    unit[channels] = exponent[changed]
    for old, new in ((mean.hi, pair.hi), (mean.lo, pair.lo), (m2, squares)):
        old[channels] = new[changed]
    return Moments(count, Scaled(mean, unit), Scaled(m2, 2 * unit))


def normalize(
    x: np.ndarray,
    channels: np.ndarray,
    mean: Mean,
    var: Variance,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    weights: np.ndarray | None,
) -> np.ndarray:
    """Return the output of some channels, in float64."""
    units = _units(channels, mean, var, eps)
    part = _part(x, channels)
    scale, power = units.scale, units.power + units.exponent
    if weight is not None:
        digits, more = np.frexp(weight[channels].astype(WIDE))
        scale, power = scale * digits, power + more
    shift = np.zeros(len(channels)) if bias is None else bias[channels].astype(WIDE)
    # With a bias near the end of the range, an output may be in range although a term of it is not.
    lift = np.where(exponent_of(shift) > _FAR, 4, 0).astype(np.intc)
    shift = np.ldexp(units.rest * scale, power - lift) + np.ldexp(shift, -lift)
    d, exponent = np.frexp(_deviations(part, units, x))
    d *= _along(scale, x)
    y = np.ldexp(d, exponent + _along(power - lift, x))
    y += _along(shift, x)
    y = np.ldexp(y, _along(lift, x))
    return _where_counted(y, weights)


def grad_sums(
    kernel: Callable[..., Sums], dy: np.ndarray, batch: Batch, channels: np.ndarray, stats: Stats, eps: float
) -> Sums:
    """Return the sums of dy and of dy * xhat of some channels."""
    x, weights, _ = batch
    units = _units(channels, stats.mean, stats.var, eps)
    gradient, unit = _gradient(dy, channels, weights)
    sum_dy, sum_dy_xhat, power = _sums(kernel, gradient, _part(x, channels), units, weights)
    return np.ldexp(sum_dy, unit), np.ldexp(sum_dy_xhat, power + unit)


def grad_input(
    kernel: Callable[..., Sums],
    dy: np.ndarray,
    batch: Batch,
    channels: np.ndarray,
    stats: Stats,
    weight: np.ndarray | None,
    eps: float,
    sums: Sums | None,
) -> np.ndarray:
    """Return the gradient of some channels of x, in float64, given the sums of all channels.

    Sums that leave the range of float64 are computed again, in units; they are then those of this batch alone.
    """
    x, weights, _ = batch
    mean, var, count = stats
    units = _units(channels, mean, var, eps)
    gradient, unit = _gradient(dy, channels, weights)
    scale, power = units.scale, units.power + unit
    if count is not None:
        part = _part(x, channels)
        own_dy, own_dy_xhat, power_of_own = _sums(kernel, gradient.copy(), part.copy(), units, weights)
        sum_dy, sum_dy_xhat = (np.zeros(len(unit)),) * 2 if sums is None else (total[channels] for total in sums)
        sum_dy, of_sum_dy = _held(sum_dy, own_dy, np.zeros_like(unit), unit)
        sum_dy_xhat, of_sum = _held(sum_dy_xhat, own_dy_xhat, power_of_own, unit)
        xhat = _deviations(part, units, x)
        xhat += _along(units.rest, x)
        xhat *= _along(units.scale, x)
        xhat = np.ldexp(xhat, _along(units.power + units.exponent, x))
        xhat *= _along(np.ldexp(sum_dy_xhat / count, of_sum), x)
        xhat += _along(np.ldexp(sum_dy / count, of_sum_dy), x)
        gradient -= xhat if weights is None else xhat * np.expand_dims(weights, 1)
    if weight is not None:
        digits, more = np.frexp(weight[channels].astype(WIDE))
        scale, power = scale * digits, power + more
    gradient, exponent = np.frexp(gradient)
    gradient *= _along(scale, x)
    return _where_counted(np.ldexp(gradient, exponent + _along(power, x)), weights)


def _is_zero(var: Variance, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """Return a mask of the channels whose exact scale is 0."""
    var = np.ldexp(*var) if isinstance(var, Scaled) else var.astype(WIDE)
    is_zero: np.ndarray = (var + eps == 0) | np.isinf(var)
    return is_zero if weight is None else is_zero | (weight == 0)


def _channels(is_beyond: np.ndarray, var: Variance) -> np.ndarray | None:
    if isinstance(var, Scaled):
        is_beyond = is_beyond | (var.exponent != 0)
    return np.flatnonzero(is_beyond) if is_beyond.any() else None


def _units(channels: np.ndarray, mean: Mean, var: Variance, eps: float) -> _Units:
    if isinstance(mean, Scaled):
        (hi, lo), exponent = Pair(*(part[channels] for part in mean.values)), mean.exponent[channels]
    else:
        hi, lo = (part[channels] for part in as_pair(mean))
        exponent = np.where(exponent_of(hi) > _FAR, 4, 0).astype(np.intc)
        hi, lo = scaled(Pair(hi, lo), -exponent)
    center = hi + lo
    digits, power = np.frexp(var.values[channels] if isinstance(var, Scaled) else var[channels].astype(WIDE))
    if isinstance(var, Scaled):
        power = power + var.exponent[channels]
    of_eps = exponent_of(np.array(eps))
    unit = np.where(digits == 0, of_eps, power if eps == 0 else np.maximum(power, of_eps))
    unit += unit % 2
    spread = np.ldexp(digits, power - unit) + np.ldexp(eps, -unit)
    return _Units(center, (center - hi) - lo, exponent, invstd(spread, 0.0), -unit // 2)


def _sums(
    kernel: Callable[..., Sums], gradient: np.ndarray, part: np.ndarray, units: _Units, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sum of gradients, and digits and exponent of that of gradients * xhat; the arrays are overwritten."""
    d = _deviations(part, units, part)
    exponent = _largest_exponent(d, weights)
    d = np.ldexp(d, -_along(exponent, part), out=d)
    rest = np.ldexp(units.rest, -exponent)
    stats = Stats(Pair(np.zeros_like(rest), -rest), np.ones_like(rest), None)
    sum_dy, products = kernel(gradient, Batch(d, weights), stats, 0.0)
    return sum_dy, products * units.scale, exponent + units.exponent + units.power


def _held(given: np.ndarray, own: np.ndarray, power: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums in units, as digits and exponents: ``own * 2**power`` where float64 does not hold them, else given.

    The sums that are given may be those of all replicas.
    """
    is_lost = ~_holds(given) & ~_holds(np.ldexp(own, power + unit)) & ~np.isnan(given)
    return np.where(is_lost, own, given), np.where(is_lost, power, -unit)


def _holds(sums: np.ndarray) -> np.ndarray:
    return (abs(sums) >= _LEAST) & (abs(sums) < _MOST)


def _deviations(part: np.ndarray, units: _Units, x: np.ndarray) -> np.ndarray:
    """Return x - center in units of channels, computed in ``part``."""
    part = np.ldexp(part, -_along(units.exponent, x), out=part)
    part -= _along(units.center, x)
    return part


def _gradient(dy: np.ndarray, channels: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return some channels of a gradient in units in which no value is larger than 1, and the units as exponents."""
    gradient = _where_counted(_part(dy, channels), weights)
    unit = _largest_exponent(gradient, weights)
    return np.ldexp(gradient, -_along(unit, dy), out=gradient), unit


def _part(x: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Return a copy of some channels in float64."""
    return np.ascontiguousarray(x[:, channels], WIDE)


def _largest_exponent(part: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the exponent of the largest value of each channel, without values of weight 0."""
    size = _where_counted(abs(part), weights)
    return exponent_of(size.max(axis=(0, 2)[: part.ndim - 1]))


def _where_counted(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return values if weights is None else np.where(np.expand_dims(weights, 1) != 0, values, 0)


def _along(vector: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return a (C,) vector in the shape that broadcasts against x."""
    return vector if x.ndim == 2 else vector[:, None]


_LIMITS = {
    "f": (float(np.finfo(np.float32).smallest_normal), 2.0**102),
    "d": (float(np.finfo(WIDE).smallest_normal), 2.0**970),
}
"""By the dtype of the computation: the least number with all digits, and a bound of numbers whose differences never
overflow."""
