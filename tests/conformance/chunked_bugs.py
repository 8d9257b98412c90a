"""Bugs planted in the work on lazy arrays: ``python chunked_bugs.py FOLDER BUG...`` tries for each its test."""

import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from planted import Bug, conform
from replica_bugs import replaces

from mbn.chunked import dask
from mbn.contract import Moments
from mbn.step import forward, population


@replaces(population, "_merged_blocks")
def mean_of_means(original: Any, backend: Any, a: Any, b: Any) -> Any:
    parts = [part for part in (a, b) if part is not None]
    total = sum(part.count for part in parts)
    return original(backend, *(part._replace(count=total / len(parts)) for part in [*parts, None][:2]))


@replaces(population, "_merged_blocks")
def last_block_forgotten(original: Any, backend: Any, a: Any, b: Any) -> Any:
    return original(backend, a, b if a is None or b is None or b.count >= a.count else None)


ARRIVALS = count()


@replaces(population, "_merged_blocks")
def merged_in_the_order_of_arrival(original: Any, backend: Any, a: Any, b: Any) -> Any:
    merged = original(backend, a, b)
    return merged if merged is None else merged._replace(m2=merged.m2 * (1 + 1e-6 * next(ARRIVALS)))


@replaces(population, "_moments_of_block")
def narrow_moments(original: Any, *arguments: Any) -> Any:
    moments: Moments | None = original(*arguments)
    return moments if moments is None else moments._replace(m2=moments.m2.astype(np.float32).astype(np.float64) * 1.001)


@replaces(dask, "reduced")
def channels_in_reverse_order(original: Any, *arguments: Any) -> Any:
    return original(*arguments)[::-1]


@replaces(forward, "_of_block")
def statistics_of_the_block(original: Any, *arguments: Any) -> Any:
    *others, block, weight, bias, mean, var, mask, sample_weight = arguments
    if block.shape[0] > 1 and block.ndim == 2:
        mean, var = block.mean(0, dtype=mean.dtype), block.var(0, dtype=var.dtype)
    return original(*others, block, weight, bias, mean, var, mask, sample_weight)


@replaces(forward, "_of_block")
def kernels_by_the_size_of_the_block(
    original: Any, backend: Any, device: Any, settings: Any, _: Any, *rest: Any
) -> Any:
    return original(backend, device, settings, None, *rest)


@replaces(forward, "_of_block")
def mask_ignored(original: Any, *arguments: Any) -> Any:
    *others, _, sample_weight = arguments
    return original(*others, None, sample_weight)


@replaces(dask, "_within")
def lengths_unchecked(_: Any, lengths: Any, limit: int) -> Any:
    return lengths


@replaces(forward.checks, "lazy")
def training_evaluates(_: Any, **options: bool) -> None:
    """Refuse nothing."""


@replaces(dask, "map_blocks")
def dtype_of_the_layer(original: Any, *arguments: Any) -> Any:
    return original(*arguments).astype(np.float32)


FIT = "test_fit_of_lazy_array_does_not_depend_on_blocks"
BITS = "test_lazy_output_has_the_bits_of_the_whole_call"
BUGS = {
    "mean of means": Bug(mean_of_means, FIT),
    "last block forgotten": Bug(last_block_forgotten, FIT),
    "merged in the order of arrival": Bug(
        merged_in_the_order_of_arrival, "test_fit_of_lazy_array_has_the_same_bits_on_every_scheduler"
    ),
    "narrow moments": Bug(narrow_moments, "test_fit_of_lazy_array_is_accurate_over_a_thousand_blocks"),
    "channels in reverse order": Bug(channels_in_reverse_order, FIT),
    "statistics of the block": Bug(statistics_of_the_block, BITS),
    "kernels by the size of the block": Bug(
        kernels_by_the_size_of_the_block, "test_large_lazy_output_has_the_bits_of_the_whole_call"
    ),
    "mask ignored": Bug(mask_ignored, "test_lazy_output_takes_masks"),
    "lengths unchecked": Bug(lengths_unchecked, "test_lazy_output_with_a_length_beyond_the_sequence_is_an_error"),
    "training evaluates": Bug(training_evaluates, "test_training_on_lazy_array_is_an_error"),
    "dtype of the layer": Bug(dtype_of_the_layer, BITS),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("numpy", {name: BUGS[name] for name in names}, Path(folder))
