"""Bugs in what masks, lengths and weights do."""

from typing import Any

import numpy as np
from toy import Toy, column, like, over, spread

from mbn.contract import Array, Moments


class DeclaresMasksButIgnoresThem(Toy):
    def weights(self, shape: tuple[int, ...], dtype: str, *_: Any) -> Array:
        return np.ones(shape, dtype)


class MaskLeaksIntoStatistics(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        if weights is None:
            return super().moments(x)
        w, d = spread(weights, x), x.astype(np.float64)
        count = weights.sum() * x.size / weights.size / x.shape[1]
        mean = (w * d).sum(axis=over(x)) / (count or 1)  # 0 * NaN is NaN
        return Moments(count, mean, (w * (d - column(mean, x)) ** 2).sum(axis=over(x)))


class MaskLeaksIntoGradients(Toy):
    def grad_sums(self, dy: Array, x: Array, mean: Array, var: Array, eps: float, weights: Any = None) -> Any:
        xhat, _ = self.xhat(x, mean, var, eps, None)
        dy = (spread(weights, x) > 0) * dy.astype(np.float64)  # 0 * NaN is NaN
        return dy.sum(axis=over(x)), (dy * xhat).sum(axis=over(x))


class MaskedOutputIsTheBias(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, *rest: Any) -> Array:
        *rest, weights = rest
        return super().normalize(like(x, np.where(spread(weights, x), x, column(mean, x))), mean, var, *rest)


class MaskedGradientIsThatOfTheOutput(Toy):
    def grad_input(self, dy: Array, x: Array, *rest: Any) -> Array:
        return np.where(spread(rest[-1], x), super().grad_input(dy, x, *rest), dy)


class BesselCountsMaskedValues(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        self.places = x.size // x.shape[1]
        return super().moments(x, weights)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (self.places - 1) if correction else super().variance(moments, correction)


class BesselCountsEachWeightOnce(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        self.valid = x.size // x.shape[1] if weights is None else (weights > 0).sum()
        return super().moments(x, weights)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (self.valid - 1) if correction else super().variance(moments, correction)


class WeightsIgnoredInTheVariance(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        moments = super().moments(x, weights)
        w = np.sign(spread(weights, x))
        squares = w * (np.where(w, x, 0) - column(moments.mean, x)) ** 2
        return moments._replace(m2=squares.sum(axis=over(x)))


class WeightsInSumsOfDy(Toy):
    def grad_sums(self, dy: Array, x: Array, mean: Array, var: Array, eps: float, weights: Any = None) -> Any:
        dy = np.where(spread(weights, x), dy, 0) * spread(weights, x)
        return super().grad_sums(dy, x, mean, var, eps, weights)


class StatisticsOfNothingLearnt(Toy):
    def step(self, momentum: float | None, num_batches_tracked: Any, *_: Any) -> Any:
        return 1 / num_batches_tracked if momentum is None else momentum


class LengthsOffByOne(Toy):
    def weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        return super().weights(shape, dtype, mask, None if lengths is None else lengths + 1, sample_weight)


class WeightsOfTheCallerKept(Toy):
    def weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        if mask is lengths is None and sample_weight.shape == shape:
            return sample_weight
        return super().weights(shape, dtype, mask, lengths, sample_weight)


BUGS = [
    (DeclaresMasksButIgnoresThem, "test_masked_values_leak_nowhere"),
    (MaskLeaksIntoStatistics, "test_masked_values_leak_nowhere"),
    (MaskLeaksIntoGradients, "test_pullback_with_masks"),
    (MaskedOutputIsTheBias, "test_masked_outputs_are_zero"),
    (MaskedGradientIsThatOfTheOutput, "test_pullback_with_masks"),
    (BesselCountsMaskedValues, "test_bessel_counts_valid_values"),
    (BesselCountsEachWeightOnce, "test_bessel_counts_weights"),
    (WeightsIgnoredInTheVariance, "test_whole_weights_are_repetitions"),
    (WeightsInSumsOfDy, "test_pullback_with_masks"),
    (StatisticsOfNothingLearnt, "test_nothing_left"),
    (LengthsOffByOne, "test_lengths_count_from_the_start"),
    (WeightsOfTheCallerKept, "test_pullback_of_an_edited_mask"),
]
"""Backends, and the tests that have to name what is wrong with them."""
