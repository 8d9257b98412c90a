"""Bugs in a backward pass, and in the statistics that the forward pass keeps for it."""

from typing import Any

import numpy as np
from toy import Toy, ToyKernels, like, over, spread

from mbn.contract import Array, Batch, Stats


class SumOfDyDropped(ToyKernels):
    def grad_input(self, *args: Any) -> Array:
        *before, sums = args
        return super().grad_input(*before, sums and (0 * sums[0], sums[1]))


class SumOfDyXhatDropped(ToyKernels):
    def grad_input(self, *args: Any) -> Array:
        *before, sums = args
        return super().grad_input(*before, sums and (sums[0], 0 * sums[1]))


class UnbiasedGradient(ToyKernels):
    def grad_input(self, dy: Array, batch: Batch, stats: Stats, *rest: Any) -> Array:
        count = stats.count and max(stats.count - 1, 1)
        return super().grad_input(dy, batch, stats._replace(count=count), *rest)


class ConstantsDifferentiated(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        def differentiate(kernels: Any, dy: Array, batch: Batch, weight: Any, stats: Stats, *rest: Any) -> Any:
            count = batch.x.size / batch.x.shape[1]
            return pullback(kernels, dy, batch, weight, stats._replace(count=count), *rest)

        return forward, differentiate


class InvstdForgottenInDweight(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        def differentiate(
            kernels: Any, dy: Array, batch: Batch, weight: Any, stats: Stats, eps: float, *rest: Any
        ) -> Any:
            dx, dweight, dbias = pullback(kernels, dy, batch, weight, stats, eps, *rest)
            return dx, dweight * np.sqrt(stats.var + eps), dbias

        return forward, differentiate


class NarrowSumsOfGradients(ToyKernels):
    def grad_sums(self, dy: Array, batch: Batch, stats: Stats, eps: float) -> Any:
        x, weights, _ = batch
        xhat = self.xhat(batch, stats, eps)[0].astype(np.float32)
        dy = np.where(spread(weights, x), dy, 0).astype(np.float32)
        return dy.sum(axis=over(x)), (dy * xhat).sum(axis=over(x))


class NarrowGradientOfX(ToyKernels):
    def xhat(self, *args: Any) -> tuple[Array, Array]:
        xhat, invstd = super().xhat(*args)
        return xhat.astype(np.float32), invstd


class WrongDtypeOfDx(ToyKernels):
    def grad_input(self, *args: Any) -> Array:
        return super().grad_input(*args).astype(np.float64)


class MemoryOrderOfDy(ToyKernels):
    def grad_input(self, dy: Array, *rest: Any) -> Array:
        return like(dy, super().grad_input(dy, *rest))


class StatisticsUsedUp(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        def differentiate(kernels: Any, dy: Array, batch: Batch, weight: Any, stats: Stats, *rest: Any) -> Any:
            gradients = pullback(kernels, dy, batch, weight, stats, *rest)
            stats.var[...] = 1
            return gradients

        return forward, differentiate


class StatisticsOfTheLastCall(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        last: list[Stats] = []

        def step(*args: Any) -> Any:
            *result, stats = forward(*args)
            last[:] = [stats] if stats is not None else last
            return *result, stats

        def differentiate(kernels: Any, dy: Array, batch: Batch, weight: Any, _: Any, *rest: Any) -> Any:
            return pullback(kernels, dy, batch, weight, *last, *rest)

        return step, differentiate


class NothingCopied(Toy):
    def copy(self, x: Array) -> Array:
        return x


class BatchesCountedTwice(ToyKernels):
    def advance(self, *args: Any) -> Any:
        stats, after = super().advance(*args)
        if after.num_batches_tracked is not None:
            after = after._replace(num_batches_tracked=after.num_batches_tracked + 1)
        return stats, after


class PullbackCountsABatch(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        def step(*args: Any) -> Any:
            y, state, stats = forward(*args)
            self.state = state._replace(num_batches_tracked=np.array(state.num_batches_tracked))
            return y, self.state, stats

        def differentiate(*args: Any) -> Any:
            self.state.num_batches_tracked[...] += 1
            return pullback(*args)

        return step, differentiate


class NothingLearntWithAGradient(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        def step(kernels: Any, batch: Any, params: Any, state: Any, *rest: Any) -> Any:
            y, after, stats = forward(kernels, batch, params, state, *rest)
            *_, keep, _ = rest
            return y, state if keep else after, stats

        return step, pullback


BUGS = [
    (SumOfDyDropped, "test_dx_is_orthogonal_to_constants_and_to_x"),
    (SumOfDyXhatDropped, "test_dx_is_orthogonal_to_constants_and_to_x"),
    (UnbiasedGradient, "test_pullback_matches_the_two_values_example"),
    (ConstantsDifferentiated, "test_pullback_is_accurate"),
    (InvstdForgottenInDweight, "test_pullback_matches_the_two_values_example"),
    (NarrowSumsOfGradients, "test_float32_pullback_is_accurate_with_large_means"),
    (NarrowGradientOfX, "test_pullback_of_few_values_is_accurate_where_dy_nearly_cancels"),
    (WrongDtypeOfDx, "test_pullback_is_accurate"),
    (MemoryOrderOfDy, "test_dx_has_the_memory_order_of_x"),
    (StatisticsUsedUp, "test_pullback_gives_the_same_after_changes_of_the_layer"),
    (StatisticsOfTheLastCall, "test_pullback_gives_the_same_after_changes_of_the_layer"),
    (NothingCopied, "test_pullback_gives_the_same_after_changes_of_the_layer"),
    (BatchesCountedTwice, "test_batches_are_counted_in_training_alone"),
    (PullbackCountsABatch, "test_vjp_gives_the_output_and_state_of_a_call"),
    (NothingLearntWithAGradient, "test_vjp_gives_the_output_and_state_of_a_call"),
]
"""Wrong backends, each with the test that must fail on it."""
