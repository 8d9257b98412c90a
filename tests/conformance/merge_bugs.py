"""Bugs in statistics of several batches, and in what layers are folded to."""

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
    (MeansMergedAlone, "test_batches_do_not_matter"),
    (MeansMergedWithoutCounts, "test_three_values_example"),
    (CountOfTheFirstBatch, "test_batches_do_not_matter"),
    (NarrowMerge, "test_a_thousand_unequal_batches"),
    (MergedInPlace, "test_weighted_batches_are_merged"),
    (NothingMergedIsNan, "test_weighted_batches_are_merged"),
    (WeightForgottenAroundZero, "test_scale_and_shift"),
    (BiasForgottenOfOneRow, "test_dense_layer"),
]
"""Backends, and the tests that have to name what is wrong with them."""
