"""Bugs in a backward pass, and in what it finds of the forward pass."""

from typing import Any

import numpy as np
from toy import Toy, like, over, spread

from mbn.contract import Array


class SumOfDyDropped(Toy):
    def grad_input(self, *args: Any) -> Array:
        *before, sums, count, weights = args
        return super().grad_input(*before, sums and (0 * sums[0], sums[1]), count, weights)


class SumOfDyXhatDropped(Toy):
    def grad_input(self, *args: Any) -> Array:
        *before, sums, count, weights = args
        return super().grad_input(*before, sums and (sums[0], 0 * sums[1]), count, weights)


class UnbiasedGradient(Toy):
    def grad_input(self, *args: Any) -> Array:
        *before, count, weights = args
        return super().grad_input(*before, count and max(count - 1, 1), weights)


class ConstantsDifferentiated(Toy):
    def pullback(self, dy: Array, x: Array, weight: Any, residuals: Any, *rest: Any) -> Any:
        return super().pullback(dy, x, weight, residuals._replace(count=x.size / x.shape[1]), *rest)


class InvstdForgottenInDweight(Toy):
    def pullback(self, dy: Array, x: Array, weight: Any, residuals: Any, eps: float, *rest: Any) -> Any:
        dx, dweight, dbias = super().pullback(dy, x, weight, residuals, eps, *rest)
        return dx, dweight * np.sqrt(residuals.var + eps), dbias


class NarrowSumsOfGradients(Toy):
    def grad_sums(self, dy: Array, x: Array, mean: Array, var: Array, eps: float, weights: Any = None) -> Any:
        xhat = self.xhat(x, mean, var, eps, weights)[0].astype(np.float32)
        dy = np.where(spread(weights, x), dy, 0).astype(np.float32)
        return dy.sum(axis=over(x)), (dy * xhat).sum(axis=over(x))


class NarrowGradientOfX(Toy):
    def xhat(self, *args: Any) -> tuple[Array, Array]:
        xhat, invstd = super().xhat(*args)
        return xhat.astype(np.float32), invstd


class WrongDtypeOfDx(Toy):
    def grad_input(self, *args: Any) -> Array:
        return super().grad_input(*args).astype(np.float64)


class MemoryOrderOfDy(Toy):
    def grad_input(self, dy: Array, *rest: Any) -> Array:
        return like(dy, super().grad_input(dy, *rest))


class ResidualsUsedUp(Toy):
    def pullback(self, dy: Array, x: Array, weight: Any, residuals: Any, *rest: Any) -> Any:
        gradients = super().pullback(dy, x, weight, residuals, *rest)
        residuals.var[...] = 1
        return gradients


class ResidualsOfTheLastCall(Toy):
    def batch_norm_residuals(self, *args: Any, **settings: Any) -> Any:
        *result, self.last = super().batch_norm_residuals(*args, **settings)
        return *result, self.last

    def pullback(self, dy: Array, x: Array, weight: Any, residuals: Any, *rest: Any) -> Any:  # noqa: ARG002 - the bug
        return super().pullback(dy, x, weight, self.last, *rest)


class NothingCopied(Toy):
    def copy(self, x: Array) -> Array:
        return x


class BatchesCountedTwice(Toy):
    def batch_norm_residuals(self, x: Array, params: Any, state: Any, **settings: Any) -> Any:
        y, new, residuals = super().batch_norm_residuals(x, params, state, **settings)
        if settings["training"] and new.num_batches_tracked is not None:
            new = new._replace(num_batches_tracked=new.num_batches_tracked + 1)
        return y, new, residuals


class PullbackCountsABatch(Toy):
    def batch_norm_residuals(self, *args: Any, **settings: Any) -> Any:
        y, state, residuals = super().batch_norm_residuals(*args, **settings)
        self.state = state._replace(num_batches_tracked=np.array(state.num_batches_tracked))
        return y, self.state, residuals

    def pullback(self, *args: Any) -> Any:
        self.state.num_batches_tracked[...] += 1
        return super().pullback(*args)


class NothingLearntWithAGradient(Toy):
    def batch_norm(self, *args: Any, **settings: Any) -> Any:
        return super().batch_norm_residuals(*args, **settings)[:2]

    def batch_norm_residuals(self, x: Array, params: Any, state: Any, **settings: Any) -> Any:
        y, _, residuals = super().batch_norm_residuals(x, params, state, **settings)
        return y, state, residuals


BUGS = [
    (SumOfDyDropped, "test_gradients_add_up_to_nothing"),
    (SumOfDyXhatDropped, "test_gradients_add_up_to_nothing"),
    (UnbiasedGradient, "test_two_values_example"),
    (ConstantsDifferentiated, "test_pullback_is_the_gradient"),
    (InvstdForgottenInDweight, "test_two_values_example"),
    (NarrowSumsOfGradients, "test_float32_with_large_means"),
    (NarrowGradientOfX, "test_few_values_and_little_left_of_dy"),
    (WrongDtypeOfDx, "test_pullback_is_the_gradient"),
    (MemoryOrderOfDy, "test_dx_has_the_memory_order_of_x"),
    (ResidualsUsedUp, "test_pullback_gives_the_same_again"),
    (ResidualsOfTheLastCall, "test_pullback_gives_the_same_again"),
    (NothingCopied, "test_pullback_gives_the_same_again"),
    (BatchesCountedTwice, "test_batches_are_counted_in_training_alone"),
    (PullbackCountsABatch, "test_vjp_is_a_call"),
    (NothingLearntWithAGradient, "test_vjp_is_a_call"),
]
"""Backends, and the tests that have to name what is wrong with them."""
