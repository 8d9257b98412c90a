"""Bugs in the statistics of several batches, and in folded layers."""

from typing import Any

import numpy as np
from toy import ToyKernels

from mbn.contract import Array, Batch, Moments, Params, Stats


class MeansMergedAlone(ToyKernels):
    def merge(self, first: Moments, second: Moments) -> Moments:
        return super().merge(first, second)._replace(m2=first.m2 + second.m2)


class MeansMergedWithoutCounts(ToyKernels):
    def merge(self, first: Moments, second: Moments) -> Moments:
        return super().merge(first, second)._replace(mean=(first.mean + second.mean) / 2)


class CountOfTheFirstBatch(ToyKernels):
    def merge(self, first: Moments, second: Moments) -> Moments:
        return super().merge(first, second)._replace(count=first.count)


class NarrowMerge(ToyKernels):
    def merge(self, first: Moments, second: Moments) -> Moments:
        narrow = (Moments(n, mean.astype(np.float32), m2.astype(np.float32)) for n, mean, m2 in (first, second))
        return super().merge(*narrow)


class MergedInPlace(ToyKernels):
    def merge(self, first: Moments, second: Moments) -> Moments:
        count, mean, first.m2[...] = super().merge(first, second)
        return Moments(count, mean, first.m2)


class NothingMergedIsNan(ToyKernels):
    def merge(self, first: Moments, second: Moments) -> Moments:
        merged = super().merge(first, second)
        return merged._replace(mean=merged.mean if merged.count else merged.mean * np.nan)


class WeightForgottenAroundZero(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, *rest: Any) -> Array:
        params = params if stats.mean.any() else params._replace(weight=None)
        return super().normalize(batch, stats, params, *rest)


class BiasForgottenOfOneRow(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, *rest: Any) -> Array:
        params = params._replace(bias=None) if len(batch.x) == 1 else params
        return super().normalize(batch, stats, params, *rest)


BUGS = [
    (MeansMergedAlone, "test_fit_does_not_depend_on_the_cut_into_batches"),
    (MeansMergedWithoutCounts, "test_fit_matches_the_three_values_example"),
    (CountOfTheFirstBatch, "test_fit_does_not_depend_on_the_cut_into_batches"),
    (NarrowMerge, "test_fit_is_accurate_over_a_thousand_unequal_batches"),
    (MergedInPlace, "test_merge_of_weighted_batches_is_accurate"),
    (NothingMergedIsNan, "test_merge_of_weighted_batches_is_accurate"),
    (WeightForgottenAroundZero, "test_fold_gives_accurate_scale_and_shift"),
    (BiasForgottenOfOneRow, "test_fold_linear_is_accurate"),
]
"""Wrong backends, each with the test that must fail on it."""
