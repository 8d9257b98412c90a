"""Formulas on the statistics of channels, (C,) vectors in float64, in any namespace with the functions of NumPy.

The backends on NumPy, CuPy and Torch arrays make one ``Formulas`` each at import. No formula waits for a device:
branches depend on a count only where it is a Python float, a sum of weights, never on arrays. An integer count, the
number of values, has been checked and needs no branch; a compiler may even have a symbol for it.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Array, Moments

FAR, FARTHEST = 400, 1000
"""Exponents beyond which squares may leave the range of float64, and beyond which powers of two have no inverse."""
FAR_WEIGHT = 128
"""Weights are scaled if their exponent is beyond this or its negative: their sum is then far above a correction of 1,
or far below."""
TINY = float(np.finfo(np.float64).smallest_subnormal)


class Pair(NamedTuple):
    """A mean as the unevaluated sum of two float64 vectors, since float64 input needs its last digits."""

    hi: Array
    lo: Array


class Scaled(NamedTuple):
    """Statistics that float64 would hold with too few digits, or not at all: ``values * 2**exponent``."""

    values: Any
    """A mean as a pair, or a variance."""
    exponent: Array
    """The exponent of each channel's unit, an integer; nearly always 0."""


Mean: TypeAlias = Pair | Scaled | Array
Variance: TypeAlias = Scaled | Array


class Formulas:
    """The formulas in one namespace."""

    def __init__(self, namespace: Any, array: type[Any]) -> None:
        """Make the formulas of a namespace with the functions of NumPy; ``array`` is the class of its arrays."""
        self.xp, self._array = namespace, array

    # Operations that differ between namespaces.

    def wide(self, x: Array) -> Array:
        """Return an array in float64."""
        return x.astype(np.float64)

    def rounded(self, x: Array, like: Array) -> Array:
        """Return an array in the dtype of another."""
        return x.astype(like.dtype)

    def constant(self, x: Array) -> Array:
        """Return an array as a constant to differentiation."""
        return x

    def copied(self, x: Array) -> Array:
        """Return a copy."""
        return x.copy()

    def exponent_of(self, x: Array) -> Array:
        """Return integers e with ``abs(x) < 2**(e + 1)``, the least or nearly the least."""
        return self.xp.frexp(x)[1]

    def scaled(self, x: Array, exponent: Array) -> Array:
        """Return ``x * 2**exponent``."""
        return self.xp.ldexp(x, exponent)

    def as_exponent(self, x: Array) -> Array:
        """Return integers in the dtype of exponents."""
        return x.astype(np.int32)

    # The formulas.

    def merge(self, first: Moments, second: Moments) -> Moments:
        """Return the statistics of two batches together."""
        is_scaled = isinstance(first.m2, Scaled) or isinstance(second.m2, Scaled)
        return self.merge_scaled(first, second) if is_scaled else self.merge_plain(first, second)

    def merge_plain(self, first: Moments, second: Moments) -> Moments:
        """Return the statistics of two batches, which are not scaled, together.

        Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
        1979, equations 2.1.
        """
        (count, (hi, lo), m2), (more, (other_hi, other_lo), more_m2) = first, second
        total = count + more
        share = more / self.divisor(total)
        difference = (other_hi - hi) + (other_lo - lo)
        change = lo + difference * share
        mean = hi + change
        rest = change - (mean - hi)  # the rounding error of the mean
        return Moments(total, Pair(mean, rest), m2 + (more_m2 + difference * difference * (count * share)))

    def merge_scaled(self, first: Moments, second: Moments) -> Moments:
        """Return the statistics of two batches together; each channel is in a unit near its largest statistic."""
        xp, sizes, parts = self.xp, [], []
        for count, mean, m2 in (first, second):
            pair, exponent = mean if isinstance(mean, Scaled) else (mean, self.as_exponent(xp.zeros_like(mean.hi)))
            squares = m2.values if isinstance(m2, Scaled) else m2
            size = xp.maximum(abs(pair.hi), xp.sqrt(squares / self.divisor(count)))
            sizes.append(xp.where(size > 0, self.exponent_of(size) + exponent, -FARTHEST))
            parts.append((count, pair, squares, exponent))
        unit = xp.maximum(*sizes).clip(-FARTHEST, FARTHEST)
        unit = self.as_exponent(xp.where(abs(unit) <= FAR, 0, unit))
        total, mean, m2 = self.merge_plain(
            *(
                Moments(
                    count,
                    Pair(*(self.scaled(part, exponent - unit) for part in pair)),
                    self.scaled(squares, 2 * (exponent - unit)),
                )
                for count, pair, squares, exponent in parts
            )
        )
        return Moments(total, Scaled(mean, unit), Scaled(m2, 2 * unit))

    def to_vectors(self, moments: Moments, dtype: str) -> tuple[Array, ...]:
        """Return the high and low part of the mean, and m2; for a float64 layer the exponents of their units too."""
        _, mean, m2 = moments
        if not isinstance(m2, Scaled):
            return (*mean, m2) if dtype == "float32" else (*mean, m2, self.xp.zeros_like(m2))
        if dtype == "float64":
            return *mean.values, m2.values, mean.exponent
        # Statistics of float32 values are in float64's range without units.
        return *(self.scaled(part, mean.exponent) for part in mean.values), self.scaled(m2.values, m2.exponent)

    def from_vectors(self, count: Any, vectors: tuple[Array, ...]) -> Moments:
        """Return the statistics that ``to_vectors`` had; those of a float64 layer are scaled."""
        hi, lo, m2, *exponents = vectors
        if not exponents:
            return Moments(count, Pair(hi, lo), m2)
        exponent = self.as_exponent(exponents[0])
        return Moments(count, Scaled(Pair(hi, lo), exponent), Scaled(m2, 2 * exponent))

    def variance(self, moments: Moments, correction: int) -> Variance:
        """Return m2 / (count - correction), and 0 where weights add up to no more than the correction."""
        count, _, m2 = moments
        if isinstance(m2, Scaled):
            return Scaled(self.variance(moments._replace(m2=m2.values), correction), m2.exponent)
        excess = count - correction
        if not isinstance(excess, self._array):
            return self.xp.zeros_like(m2) if isinstance(excess, float) and excess <= 0 else m2 / excess
        is_missing = excess <= 0
        return self.xp.where(is_missing, 0, m2 / self.xp.where(is_missing, 1, excess))

    def step(self, momentum: float | None, num_batches_tracked: Array | None, count: Any, correction: int) -> Any:
        """Return momentum or 1 / num_batches_tracked, and 0 where weights add up to ``correction`` or less."""
        step = 1 / self.wide(num_batches_tracked) if momentum is None else momentum
        if not isinstance(count, self._array):
            return 0.0 if isinstance(count, float) and count <= correction else step
        return step * self.wide(~(count <= correction))  # with a count of NaN the statistics are NaN too

    def lerp(self, start: Array, end: Mean | Variance, step: float | Array) -> Array:
        """Return (1 - step) * start + step * end, computed in float64 and rounded once to the dtype of start.

        To differentiation it is a constant: otherwise each batch would keep the graphs of all earlier ones.
        """
        start, is_array = self.constant(start), isinstance(step, self._array)
        if not is_array and step == 0:
            return self.copied(start)
        end, exponent = end if isinstance(end, Scaled) else (end, None)
        end = self.constant(end.hi) + self.constant(end.lo) if isinstance(end, Pair) else self.constant(end)
        share = step * end
        if exponent is not None:
            share = self.scaled(share, exponent)
        moved = self.rounded((1 - step) * self.wide(start) + share, start)
        # A batch of weight 0 changes nothing, even if its statistics are not finite.
        return self.xp.where(step == 0, start, moved) if is_array else moved

    def sample_weights(
        self, shape: tuple[int, ...], dtype: str, mask: Array | None, lengths: Array | None, sample_weight: Array | None
    ) -> Array:
        """Return the sample weight (1 if None) where mask and lengths allow, else 0."""
        if lengths is None and (mask is None or sample_weight is None):
            only = sample_weight if mask is None else mask
            if only is not None and only.shape == shape and dtype == "float32":
                return only.astype(dtype, order="C")  # nothing but a copy is needed
        result = self.xp.ones(shape, dtype)
        if sample_weight is not None:
            result *= _row(sample_weight, len(shape))
            if dtype == "float64":
                result = self.summable(result)
        if mask is not None:
            result *= _row(mask, len(shape))
        if lengths is not None:
            result *= self.xp.arange(shape[1]) < lengths[:, None]
        return result

    def summable(self, weights: Array) -> Array:
        """Return weights in float64, times a power of two if their sums would leave its range without one.

        Means depend only on the ratios of weights; so do variances, corrected by 1 or not, as long as the sum of the
        weights stays far above 1, or far below. A weight that would underflow to 0 becomes the smallest number instead.
        """
        if 0 in weights.shape:
            return weights
        exponent = self.exponent_of(weights.max())
        near = self.scaled(weights, exponent.clip(-FAR_WEIGHT, FAR_WEIGHT) - exponent)
        return self.xp.where((weights > 0) & (near == 0), TINY, near)

    def divisor(self, count: Any) -> Any:
        """Return the divisor of sums: the count, or 1 where the count is 0 and so are the sums."""
        if isinstance(count, self._array):
            return self.xp.where(count == 0, 1, count)
        return count or 1.0 if isinstance(count, float) else count


def _row(values: Array, ndim: int) -> Array:
    """Return values for each sample in the shape that broadcasts against an array of ndim axes."""
    return values if values.ndim == ndim else values[:, None]
