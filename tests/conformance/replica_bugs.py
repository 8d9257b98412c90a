"""Bugs planted in the exchange between replicas: ``python replica_bugs.py FOLDER BUG...`` tries for each its test."""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
from planted import Bug, conform

import mbn
from mbn.contract import Array, Kernels, Moments, Needs, Stats, summed
from mbn.replicas import Exchange
from mbn.step import compose, forward
from mbn_cpu.kernels.host import HostKernels


def replaces(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[[], None]]:
    """Return a decorator that makes a bug: the function replaces an attribute, which it gets first."""
    return lambda function: lambda: setattr(owner, name, _bound(function, getattr(owner, name)))


def _bound(function: Callable[..., Any], original: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: function(original, *arguments, **options)


@replaces(compose, "merged")
def mean_of_means(_: Any, kernels: Kernels, moments: Moments, dtype: str, replicas: Any) -> Moments:
    every = replicas.moments(kernels, moments, dtype)
    total = sum(one.count for one in every)
    return reduce(kernels.merge, [one._replace(count=total / len(every)) for one in every])._replace(count=total)


def local_count_in_bessel() -> None:
    """Correct the running variance by the count of the replica's own batch."""
    original, own = compose.merged, threading.local()

    def merged(kernels: Kernels, moments: Moments, *rest: Any) -> Moments:
        own.count = moments.count
        return original(kernels, moments, *rest)

    def advance(original: Any, state: Any, moments: Moments, settings: Any) -> Any:
        stats, _ = original(state, moments, settings)
        return stats, original(state, moments._replace(count=own.count), settings)[1]

    compose.merged, backend = merged, mbn.get_backend("numpy")
    for kernels in (backend.kernels, backend.step_kernels):
        kernels.advance = partial(advance, kernels.advance)


@replaces(HostKernels, "grad_input")
def local_count_in_dx(
    original: Any, self: Any, dy: Array, batch: Any, stats: Stats, weight: Any, eps: float, sums: Any
) -> Array:
    return original(self, dy, batch, stats._replace(count=batch.x.size // batch.x.shape[1]), weight, eps, sums)


@replaces(forward.checks, "batch")
def one_value_judged_locally(original: Any, *arguments: Any, training: bool) -> None:
    original(*arguments, training=True)


@replaces(compose, "summed")
def no_backward_exchange(_: Any, sums: tuple[Array, ...], replicas: Any) -> tuple[Array, ...]:
    return sums


@replaces(compose, "summed")
def average_instead_of_sum(_: Any, sums: tuple[Array, ...], replicas: Any) -> tuple[Array, ...]:
    every = replicas.sums(sums)
    return tuple(sum(parts) / len(every) for parts in zip(*every, strict=True))


@replaces(compose, "pullback")
def parameters_summed_twice(
    _: Any, kernels: Kernels, dy: Array, batch: Any, weight: Any, stats: Stats, *rest: Any
) -> Any:
    eps, _, replicas = rest
    sum_dy, sum_dy_xhat = every = summed(kernels.grad_sums(dy, batch, stats, eps), replicas)
    return kernels.grad_input(dy, batch, stats, weight, eps, every), sum_dy_xhat, sum_dy


def _rebound(bug: Callable[[], None]) -> Callable[[], None]:
    """Return a bug in the composition, which NumPy's backend has bound when it was made."""

    def plant() -> None:
        bug()
        backend = mbn.get_backend("numpy")
        backend.forward, backend.pullback = backend.bind(compose.forward, compose.pullback)

    return plant


@replaces(Exchange, "gather")
def float32_counts(original: Any, self: Any, values: Any, vectors: Sequence[Array], dtype: str) -> Any:
    return original(self, np.float64(np.float32(values)), vectors, dtype)


@replaces(HostKernels, "to_vectors")
def low_part_dropped(original: Any, self: Any, moments: Moments, dtype: str) -> tuple[Array, ...]:
    hi, lo, *rest = original(self, moments, dtype)
    return hi, 0 * lo, *rest


@replaces(Exchange, "moments")
def merged_in_the_order_of_arrival(original: Any, self: Any, *arguments: Any) -> list[Moments]:
    every = list(original(self, *arguments))
    return every[self.group.rank :] + every[: self.group.rank]


@replaces(mbn.BatchNorm1d, "_exchange")
def group_ignored(_: Any, self: Any, training: bool) -> Any:
    return nullcontext()


@replaces(mbn.BatchNorm1d, "_exchange")
def synchronized_in_evaluation(original: Any, self: Any, training: bool) -> Any:
    context = original(self, True)
    with context as replicas:
        if replicas is not None and not training:
            replicas.numbers(0)
    return original(self, training)


@replaces(forward, "_without_values")
def early_return_on_an_empty_shard(original: Any, *arguments: Any) -> Any:
    *rest, _ = arguments
    return original(*rest, None)


@replaces(Exchange, "_refuse")
def refusal_not_sent(_: Any, self: Any, error: Exception) -> None:
    """Leave the others waiting."""


@replaces(Exchange, "_raise_if_refused")
def refusal_swallowed(original: Any, self: Any, refused: Any) -> None:
    if np.any(refused):
        self._texts("")


@replaces(mbn.BatchNorm1d, "_run")
def state_stored_before_the_errors_of_others(original: Any, self: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return original(self, *arguments, **options)
    except mbn.ReplicaError:
        self.running_mean = 7.0
        raise


@replaces(Exchange, "gather")
def mask_lost(original: Any, self: Any, values: Any, vectors: Sequence[Array], dtype: str) -> Any:
    counts, rows = original(self, values, vectors, dtype)
    rows = rows.copy()
    rows[:, 0] = [
        round(value) + 1 if count is None and value else value for count, value in zip(counts, rows[:, 0], strict=True)
    ]
    return counts, rows


@replaces(Exchange, "expect")
def needs_not_told(_: Any, self: Any, needs: Needs) -> None:
    """Tell the others that this replica takes no part in the backward pass."""


AGREE = "test_replicas_agree_with_the_undivided_batch"
MASKED = "test_masked_replicas_agree"
BUGS = {
    "mean of means": Bug(_rebound(mean_of_means), AGREE),
    "local count in Bessel's correction": Bug(
        _rebound(local_count_in_bessel), "test_bessel_correction_counts_the_values_of_all_replicas"
    ),
    "local count in dx": Bug(local_count_in_dx, AGREE),
    "one value judged locally": Bug(
        one_value_judged_locally, "test_one_row_for_each_replica_has_a_variance", "ValueError"
    ),
    "no backward exchange": Bug(_rebound(no_backward_exchange), AGREE),
    "average instead of sum": Bug(_rebound(average_instead_of_sum), AGREE),
    "parameters summed twice": Bug(_rebound(parameters_summed_twice), AGREE),
    "float32 counts": Bug(float32_counts, "test_weights_beyond_the_integers_of_float32_count_exactly"),
    "low part of the mean dropped": Bug(low_part_dropped, "undivided_batch_at_a_large_mean"),
    "merged in the order of arrival": Bug(
        merged_in_the_order_of_arrival, "test_replicas_hold_the_same_bits_over_many_steps"
    ),
    "group ignored": Bug(group_ignored, AGREE),
    "synchronized in evaluation": Bug(synchronized_in_evaluation, "test_evaluation_and_frozen_layers_are_local"),
    "early return on an empty shard": Bug(early_return_on_an_empty_shard, AGREE, "TimeoutError"),
    "refusal not sent": Bug(refusal_not_sent, "test_refused_input_of_one_replica_raises_on_all"),
    "refusal swallowed": Bug(refusal_swallowed, "test_refused_input_of_one_replica_raises_on_all"),
    "state stored early": Bug(
        state_stored_before_the_errors_of_others, "test_refused_input_of_one_replica_raises_on_all"
    ),
    "mask lost": Bug(mask_lost, MASKED),
    "needs not told": Bug(needs_not_told, AGREE),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("numpy", {name: BUGS[name] for name in names}, Path(folder))
