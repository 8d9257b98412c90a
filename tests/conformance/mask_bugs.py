"""Bugs in the effect of masks, lengths and sample weights."""

from typing import Any

import numpy as np
from toy import ToyKernels, column, like, over, spread

from mbn.contract import Array, Batch, Moments, Stats


class DeclaresMasksButIgnoresThem(ToyKernels):
    def sample_weights(self, shape: tuple[int, ...], dtype: str, *_: Any) -> Array:
        return np.ones(shape, dtype)


class MaskLeaksIntoStatistics(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        if weights is None:
            return super().moments(batch)
        w, d = spread(weights, x), x.astype(np.float64)
        count = weights.sum() * x.size / weights.size / x.shape[1]
        mean = (w * d).sum(axis=over(x)) / (count or 1)  # 0 * NaN is NaN
        return Moments(count, mean, (w * (d - column(mean, x)) ** 2).sum(axis=over(x)))


class MaskLeaksIntoGradients(ToyKernels):
    def grad_sums(self, dy: Array, batch: Batch, stats: Stats, eps: float) -> Any:
        x, weights, _ = batch
        xhat, _ = self.xhat(batch._replace(sample_weight=None), stats, eps)
        dy = (spread(weights, x) > 0) * dy.astype(np.float64)  # 0 * NaN is NaN
        return dy.sum(axis=over(x)), (dy * xhat).sum(axis=over(x))


class MaskedOutputIsTheBias(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, *rest: Any) -> Array:
        x, weights, _ = batch
        values = like(x, np.where(spread(weights, x), x, column(stats.mean, x)))
        return super().normalize(Batch(values), stats, *rest)


class MaskedGradientIsThatOfTheOutput(ToyKernels):
    def grad_input(self, dy: Array, batch: Batch, *rest: Any) -> Array:
        return np.where(spread(batch.sample_weight, batch.x), super().grad_input(dy, batch, *rest), dy)


class BesselCountsMaskedValues(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        self.cells = batch.x.size // batch.x.shape[1]
        return super().moments(batch)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (self.cells - 1) if correction else super().variance(moments, correction)


class BesselCountsEachWeightOnce(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        self.valid = x.size // x.shape[1] if weights is None else (weights > 0).sum()
        return super().moments(batch)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (self.valid - 1) if correction else super().variance(moments, correction)


class WeightsIgnoredInTheVariance(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        moments = super().moments(batch)
        w = np.sign(spread(weights, x))
        squares = w * (np.where(w, x, 0) - column(moments.mean, x)) ** 2
        return moments._replace(m2=squares.sum(axis=over(x)))


class WeightsInSumsOfDy(ToyKernels):
    def grad_sums(self, dy: Array, batch: Batch, *rest: Any) -> Any:
        x, weights, _ = batch
        dy = np.where(spread(weights, x), dy, 0) * spread(weights, x)
        return super().grad_sums(dy, batch, *rest)


class StatisticsOfNothingLearnt(ToyKernels):
    def step(self, momentum: float | None, num_batches_tracked: Any, *_: Any) -> Any:
        return 1 / num_batches_tracked if momentum is None else momentum


class LengthsOffByOne(ToyKernels):
    def sample_weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        return super().sample_weights(shape, dtype, mask, None if lengths is None else lengths + 1, sample_weight)


class WeightsOfTheCallerKept(ToyKernels):
    def sample_weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        if mask is lengths is None and sample_weight.shape == shape:
            return sample_weight
        return super().sample_weights(shape, dtype, mask, lengths, sample_weight)


BUGS = [
    (DeclaresMasksButIgnoresThem, "test_masked_values_reach_no_output_or_statistic"),
    (MaskLeaksIntoStatistics, "test_masked_values_reach_no_output_or_statistic"),
    (MaskLeaksIntoGradients, "test_pullback_with_masks"),
    (MaskedOutputIsTheBias, "test_masked_outputs_are_zero"),
    (MaskedGradientIsThatOfTheOutput, "test_pullback_with_masks"),
    (BesselCountsMaskedValues, "test_bessel_correction_counts_unmasked_values"),
    (BesselCountsEachWeightOnce, "test_bessel_correction_counts_sample_weights"),
    (WeightsIgnoredInTheVariance, "test_integer_weights_equal_repeated_rows"),
    (WeightsInSumsOfDy, "test_pullback_with_masks"),
    (StatisticsOfNothingLearnt, "test_fully_masked_batch_gives_zeros_and_keeps_the_statistics"),
    (LengthsOffByOne, "test_lengths_count_positions_from_the_start"),
    (WeightsOfTheCallerKept, "test_pullback_ignores_later_edits_of_sample_weight"),
]
"""Wrong backends, each with the test that must fail on it."""
