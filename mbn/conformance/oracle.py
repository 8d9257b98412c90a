"""The exact results that the suite compares with.

The oracle is independent of the backends: it computes the definitions with about twice float64's precision, and never
calls a backend. Sums are exact (math.fsum), the statistics of a channel are decimals with enough digits for any
float64, and outputs are pairs of float64. Values are scaled by a power of two before they are squared, so no float64
overflows.
"""

import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import numpy as np

from mbn.conformance.ulp import Exact

_DIGITS = 800
"""No float64 has more digits; with fewer, the mean of a constant would not equal the constant."""

_SPLITTER = 2.0**27 + 1


class Step(NamedTuple):
    """The exact results of one training step."""

    y: Exact
    running_mean: Exact
    running_var: Exact


class _Moments(NamedTuple):
    """The statistics of one channel."""

    mean: Decimal
    m2: Decimal
    size: Decimal
    """The mean absolute value."""


def train(
    x: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    momentum: float,
    eps: float,
    correction: int = 1,
    weights: np.ndarray | None = None,
) -> Step:
    """Return the results of a training step on ``x``, (N, C) or (N, C, L), finite in every cell of nonzero weight.

    The given statistics are (C,); the new ones are those that a backend rounds and stores. ``weights``, (N,) or (N, L),
    are the sample weights, by default 1. If they add up to ``correction`` or less, there is no variance, and the
    statistics do not change.
    """
    return train_often(1, x, running_mean, running_var, weight, bias, momentum, eps, correction, weights)


def train_often(
    steps: int,
    x: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    momentum: float,
    eps: float,
    correction: int = 1,
    weights: np.ndarray | None = None,
) -> Step:
    """Return the last of several training steps on the same ``x``, with arguments as of :func:`train`."""
    counts = _counts(x, weights)
    counted = counts > 0
    old = list(zip(running_mean.tolist(), running_var.tolist(), strict=True))
    with localcontext(prec=_DIGITS):
        n = _sum(*_scaled(counts[counted]))
        moments = [_moments(values, counts[counted], n) for values in _channels(x)[:, counted]]
        step = Decimal(momentum) if n > correction else Decimal(0)
        unbiased = [channel.m2 / (n - correction) if step else Decimal(0) for channel in moments]
        y = _normalize(
            x,
            [channel.mean for channel in moments],
            [channel.m2 / n if n else Decimal(0) for channel in moments],
            weight,
            bias,
            eps,
            counted,
        )
        new = _stepped(old, step, moments, unbiased)
        for _ in range(steps - 1):  # a layer stores its statistics rounded
            stored = (exact.hi.astype(running_mean.dtype).tolist() for exact in new)
            new = _stepped(list(zip(*stored, strict=True)), step, moments, unbiased)
    return Step(y, *new)


def evaluate(
    x: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float,
    weights: np.ndarray | None = None,
) -> Exact:
    """Return the output of evaluation on ``x``, (N, C) or (N, C, L), finite in every cell of nonzero weight."""
    with localcontext(prec=_DIGITS):
        means = [Decimal(value) for value in running_mean.tolist()]
        variances = [Decimal(value) for value in running_var.tolist()]
        return _normalize(x, means, variances, weight, bias, eps, _counts(x, weights) > 0)


def _channels(x: np.ndarray) -> np.ndarray:
    """Return the values of each channel as a row of float64."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.float64)


def _counts(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the weight of each value in a row of ``_channels``."""
    return np.ones(x.size // x.shape[1]) if weights is None else weights.astype(np.float64).ravel()


def _scaled(values: np.ndarray) -> tuple[np.ndarray, Decimal]:
    """Return values divided by a power of two, so that they are between -1 and 1, and that power."""
    _, exponent = np.frexp(np.abs(values).max(initial=0.0))
    return np.ldexp(values, -exponent), Decimal(2) ** int(exponent)


def _sum(terms: np.ndarray, unit: Decimal) -> Decimal:
    """Return ``unit`` times a sum to twice float64's precision: fsum gives the rounded sum, then its rounding error."""
    numbers = terms.tolist()
    rounded = math.fsum(numbers)
    return (Decimal(rounded) + Decimal(math.fsum([*numbers, -rounded]))) * unit


def _moments(values: np.ndarray, counts: np.ndarray, n: Decimal) -> _Moments:
    """Return the statistics of values with weights ``counts``, whose sum is n."""
    if not n:
        return _Moments(*(Decimal(0),) * 3)
    (values, unit), (counts, count_unit) = _scaled(values), _scaled(counts)
    n /= count_unit
    # Sum around one of the values, so that the mean of a constant equals the constant for all weights.
    mean = Decimal(values[0]) + _weighted_sum(counts, *_two_sum(values, -values[0])) / n
    hi, lo = _difference(values, mean)
    square, rest = _product(hi, hi)
    size = Decimal(math.fsum(counts * abs(values))) / n
    m2 = _weighted_sum(counts, square, rest + 2 * hi * lo)
    return _Moments(mean * unit, m2 * unit**2 * count_unit, size * unit)


def _weighted_sum(counts: np.ndarray, hi: np.ndarray, lo: np.ndarray) -> Decimal:
    """Return the sum of counts * (hi + lo)."""
    product, rest = _product(counts, hi)
    return _sum(np.concatenate([product, rest + counts * lo]), Decimal(1))


def _stepped(
    old: list[tuple[float, float]], step: Decimal, moments: list[_Moments], unbiased: list[Decimal]
) -> tuple[Exact, Exact]:
    """Return the running means and variances after a step from old ones, per channel."""
    means = [_blend(step, mean, new.mean, new.size) for (mean, _), new in zip(old, moments, strict=True)]
    return _exact(means), _exact([_blend(step, var, new, new) for (_, var), new in zip(old, unbiased, strict=True)])


def _blend(step: Decimal, old: float, new: Decimal, size: Decimal) -> tuple[Decimal, Decimal]:
    """Return the weighted mean of old and new, and the size of its terms."""
    kept = (1 - step) * Decimal(old)
    return kept + step * new, abs(kept) + abs(step) * size


def _exact(figures: list[tuple[Decimal, Decimal]]) -> Exact:
    pairs = [_pair(value) for value, _ in figures]
    return Exact(
        np.array([hi for hi, _ in pairs]),
        np.array([lo for _, lo in pairs]),
        np.array([float(magnitude) for _, magnitude in figures]),
    )


def _normalize(
    x: np.ndarray,
    means: list[Decimal],
    variances: list[Decimal],
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    counted: np.ndarray,
) -> Exact:
    """Return the output; exactly 0 in cells of weight 0."""
    c = x.shape[1]
    weights = np.ones(c) if weight is None else weight.astype(np.float64)
    biases = np.zeros(c) if bias is None else bias.astype(np.float64)
    hi, lo, magnitude = (np.zeros((c, x.size // c)) for _ in range(3))
    for channel, values in enumerate(_channels(x)[:, counted]):
        spread = variances[channel] + Decimal(eps)
        scaled, unit = _scaled(np.append(values, float(means[channel])))
        factor = Decimal(float(weights[channel])) * unit / spread.sqrt() if spread else Decimal(0)
        exponent = round(factor.adjusted() * math.log2(10)) if factor else 0
        scale, scale_rest = _pair(factor / Decimal(2) ** exponent)
        d, d_rest = _difference(scaled[:-1], means[channel] / unit)
        product, product_rest = _product(d, np.array(scale))
        product_rest = np.ldexp(product_rest + (d * scale_rest + d_rest * scale), exponent)
        product = np.ldexp(product, exponent)
        total, total_rest = _two_sum(product, biases[channel])
        hi[channel, counted], lo[channel, counted] = _two_sum(total, total_rest + product_rest)
        magnitude[channel, counted] = np.maximum(abs(product), abs(weights[channel])) + abs(biases[channel])
    shape = (c, x.shape[0], *x.shape[2:])
    return Exact(*(np.moveaxis(values.reshape(shape), 0, 1) for values in (hi, lo, magnitude)))


def _pair(value: Decimal) -> tuple[float, float]:
    hi = float(value)
    return hi, float(value - Decimal(hi))


def _difference(values: np.ndarray, mean: Decimal) -> tuple[np.ndarray, np.ndarray]:
    """Return values - mean as a pair."""
    hi, lo = _pair(-mean)
    total, rest = _two_sum(values, hi)
    return _two_sum(total, rest + lo)


def _two_sum(a: np.ndarray, b: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return a + b and its rounding error, exactly (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a * b and its rounding error, exactly (Dekker, A floating-point technique, 1971)."""
    product = a * b
    (a_hi, a_lo), (b_hi, b_lo) = _split(a), _split(b)
    return product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo


def _split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hi = a * _SPLITTER - (a * _SPLITTER - a)
    return hi, a - hi
