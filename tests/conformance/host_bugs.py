"""Bugs planted in NumPy's backend: they remove the extra computations for range and precision.

Results of ordinary values stay right. ``python host_bugs.py FOLDER BUG...`` tries for each bug the test of the suite
that must fail.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from planted import Bug, conform

from mbn import contract
from mbn.contract import Moments
from mbn.step import population
from mbn_common.channel_stats import Scaled
from mbn_cpu import channel_stats
from mbn_cpu.kernels import host, numpy_passes, numpy_steps, out_of_range


def nowhere(function: str) -> Callable[[], None]:
    """Return a function that makes ``function``, a search for channels out of range, find none."""
    return partial(setattr, out_of_range, function, lambda *_: None)


def statistics_as_found() -> None:
    out_of_range.moments = lambda _kernel, _x, _weights, found: found


def merged_as_they_come() -> None:
    def merge(first: Moments, second: Moments) -> Moments:
        is_scaled = isinstance(first.m2, Scaled) or isinstance(second.m2, Scaled)
        return (formulas.merge_scaled if is_scaled else formulas.merge_plain)(first, second)

    formulas = channel_stats.FORMULAS
    formulas.merge = merge


def weights_as_they_are() -> None:
    channel_stats.FORMULAS.summable = lambda weights: weights


def narrow_in_a_wide_layer() -> None:
    host._widened = lambda values, _: np.asarray(values)


def narrow_batches_fitted() -> None:
    population.Batch = lambda x, weights, _: contract.Batch(x, weights)


def summed_as_they_come() -> None:
    numpy_passes.units = lambda sums, _: np.zeros_like(sums)


def one_order_of_bytes() -> None:
    numpy_passes.is_wide = numpy_steps.is_wide = lambda x: x.dtype == np.float64


def summed_around_outliers() -> None:
    numpy_passes.is_far, numpy_steps.FAR_SQUARE = lambda *_: False, np.inf


BUGS = {
    "scale out of range": Bug(nowhere("of_line"), "test_training_is_accurate_on_values_of_any_size"),
    "weight out of range": Bug(nowhere("of_line"), "test_output_is_accurate_for_any_eps_and_weight"),
    "running statistics out of range": Bug(
        nowhere("of_line"), "test_evaluation_is_accurate_with_statistics_of_any_size"
    ),
    "squares out of range": Bug(statistics_as_found, "test_training_is_accurate_on_values_of_any_size"),
    "sums of gradients out of range": Bug(nowhere("of_sums"), "test_pullback_is_accurate_for_values_of_any_size"),
    "factors of gradients out of range": Bug(nowhere("of_factors"), "test_pullback_is_accurate_for_values_of_any_size"),
    "merge out of range": Bug(merged_as_they_come, "test_fit_is_accurate_for_values_of_any_size"),
    "weights out of range": Bug(
        weights_as_they_are, "test_training_is_accurate_with_sample_weights_of_any_size_in_float64"
    ),
    "summed once": Bug(narrow_in_a_wide_layer, "test_narrow_input_in_a_float64_layer_is_accurate"),
    "fitted narrowly": Bug(narrow_batches_fitted, "test_fit_of_narrow_batches_in_a_float64_layer_is_accurate"),
    "summed one after another": Bug(
        summed_as_they_come, "test_statistics_are_accurate_where_one_value_dwarfs_the_others"
    ),
    "summed around an outlier": Bug(summed_around_outliers, "test_constant_dy"),
    "one order of bytes": Bug(one_order_of_bytes, "test_byte_order_of"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("numpy", {name: BUGS[name] for name in names}, Path(folder))
