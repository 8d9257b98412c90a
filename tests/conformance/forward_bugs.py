"""Bugs in a forward pass: in what is computed, in which precision, and in what is kept."""

from typing import Any

import numpy as np
from toy import Toy, column, over, spread

from mbn.contract import Array, Moments
from mbn.state import Params, State


class BiasedRunningVariance(Toy):
    def batch_norm_residuals(self, *args: Any, correction: int, **settings: Any) -> Any:  # noqa: ARG002 - the bug
        return super().batch_norm_residuals(*args, correction=0, **settings)


class UnbiasedOutput(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, *rest: Any) -> Array:
        n = x.size // x.shape[1]
        return super().normalize(x, mean, var * n / max(n - 1, 1), *rest)


class EpsOutsideTheRoot(Toy):
    def xhat(self, x: Array, mean: Array, var: Array, eps: float, weights: Any) -> Any:
        return super().xhat(x, mean, (np.sqrt(var.astype(np.float64)) + eps) ** 2, 0.0, weights)


class MomentumInverted(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        return super().lerp(start, end, 1 - weight)


class NothingTimesNan(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        return super().lerp(start, end, weight) + weight * end.astype(start.dtype) * 0


class MomentumNoneIsATenth(Toy):
    def step(self, momentum: float | None, *rest: Any) -> Any:
        return super().step(0.1 if momentum is None else momentum, *rest)


class MeanOfSquaresMinusSquareOfMean(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        if weights is not None:
            return super().moments(x, weights)
        count, mean, _ = super().moments(x)
        squares = (x.astype(np.float32) ** 2).mean(axis=over(x))
        return Moments(count, mean, (squares - mean.astype(np.float32) ** 2) * count)


class NarrowSums(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        if weights is not None:
            return super().moments(x, weights)
        d = x.astype(np.float32)
        mean = d.mean(axis=over(x))
        return Moments(x.size // x.shape[1], mean, ((d - column(mean, x)) ** 2).sum(axis=over(x)))


class ScaleAndShift(Toy):
    def normalize(
        self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, eps: float, weights: Any = None
    ) -> Array:
        scale = ((1.0 if weight is None else weight) / np.sqrt(var + eps)).astype(np.float32)
        shift = ((0.0 if bias is None else bias) - mean * scale).astype(np.float32)
        y = (x * column(scale, x) + column(shift, x)).astype(x.dtype)
        return np.where(spread(weights, x), y, 0)


class HalfArithmetic(Toy):
    def normalize(self, x: Array, mean: Array, *rest: Any) -> Array:
        if x.dtype != np.float16:
            return super().normalize(x, mean, *rest)
        centred = x - column(mean, x).astype(np.float16)
        return super().normalize(centred, 0 * mean, *rest)


class InputMutated(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        y = super().normalize(x, *rest)
        if x.flags.writeable and x.size:
            x[0] = 0
        return y


class StateMutated(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        start[...] = super().lerp(start, end, weight)
        return start


class WrongDtypeOut(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        return super().normalize(x, *rest).astype(np.float64)


class StatisticsWidened(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        return super().lerp(start.astype(np.float64), end, weight)


class NarrowScale(Toy):
    def xhat(self, x: Array, mean: Array, var: Array, eps: float, weights: Any) -> Any:
        xhat, invstd = super().xhat(x, mean, var, eps, weights)
        with np.errstate(all="ignore"):
            narrow = invstd.astype(np.float32)
            return np.where(np.isfinite(column(narrow, x)), xhat, np.inf), narrow


class NarrowWeights(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        with np.errstate(all="ignore"):
            moments = super().moments(x, weights)
            return moments if weights is None else moments._replace(count=weights.sum(dtype=np.float32))


class StateUpdatedInEvaluation(Toy):
    def batch_norm_residuals(self, x: Array, params: Any, state: Any, *, training: bool, **settings: Any) -> Any:
        y, _, residuals = super().batch_norm_residuals(x, params, state, training=training, **settings)
        return y, super().batch_norm_residuals(x, params, state, training=True, **settings)[1], residuals


class BatchesNotCounted(Toy):
    def batch_norm_residuals(self, x: Array, params: Any, state: Any, **settings: Any) -> Any:
        y, new, residuals = super().batch_norm_residuals(x, params, state, **settings)
        return y, new._replace(num_batches_tracked=state.num_batches_tracked), residuals


class NanTakenForZeroVariance(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, *rest: Any) -> Array:
        return super().normalize(np.nan_to_num(x), np.nan_to_num(mean), np.nan_to_num(var), *rest)


class ZeroVarianceDivided(Toy):
    def xhat(self, x: Array, mean: Array, var: Array, eps: float, weights: Any) -> Any:
        _, invstd = super().xhat(x, mean, var, eps, weights)
        with np.errstate(all="ignore"):
            return np.where(spread(weights, x), x - column(mean, x), 0) * column(1 / np.sqrt(var + eps), x), invstd


class ChannelsOfALastAxis(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        return super().moments(x[..., :1] if x.ndim == 3 and weights is None else x, weights)


class MemoryOrderLost(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        return np.ascontiguousarray(super().normalize(x, *rest))


class RandomBits(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        y = super().normalize(x, *rest)
        noise = np.random.default_rng().choice(np.array([0, 1e-7]), y.shape)
        return (y * (1 + noise)).astype(y.dtype, order="K")


class DeclaresMoreThanItDoes(Toy):
    capabilities = Toy.capabilities._replace(dtypes=frozenset({"float16", "float32", "float64"}))

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        array = super().asarray(x, dtype, device)
        return array.astype(np.float32) if array.dtype == np.float64 else array


class AnyDeviceWillDo(Toy):
    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:  # noqa: ARG002 - the bug
        return super().asarray(x, dtype)


class CountWraps(Toy):
    def batch_norm_residuals(self, x: Array, params: Params, state: State, **options: Any) -> Any:
        y, after, residuals = super().batch_norm_residuals(x, params, state, **options)
        if options["training"] and state.num_batches_tracked is not None:
            after = after._replace(num_batches_tracked=np.asarray(state.num_batches_tracked) + 1)
        return y, after, residuals


class NegativeVarianceNotSeen(Toy):
    def within(self, values: Array, low: float, high: float) -> bool:
        return high == np.inf or super().within(values, low, high)


BUGS = [
    (CountWraps, "test_count_stays_at_its_limit"),
    (NegativeVarianceNotSeen, "test_assignment"),
    (BiasedRunningVariance, "test_running_var_is_unbiased"),
    (UnbiasedOutput, "test_output_uses_the_biased_variance"),
    (EpsOutsideTheRoot, "test_eps_is_added_to_the_variance"),
    (MomentumInverted, "test_momentum_weighs_the_new_value"),
    (NothingTimesNan, "test_a_weight_of_0_keeps_the_statistics"),
    (MomentumNoneIsATenth, "test_momentum_none_averages_all_batches"),
    (MeanOfSquaresMinusSquareOfMean, "test_float32_with_a_large_mean"),
    (NarrowSums, "test_float32_with_a_large_mean"),
    (ScaleAndShift, "test_float32_with_a_large_mean"),
    (HalfArithmetic, "test_halves_are_computed_in_float32"),
    (InputMutated, "test_nothing_given_is_written_to"),
    (StateMutated, "test_nothing_given_is_written_to"),
    (WrongDtypeOut, "test_output_has_the_dtype_of_the_input"),
    (StatisticsWidened, "test_statistics_keep_the_dtype_of_the_layer"),
    (NarrowScale, "test_training_on_values_of_any_size"),
    (NarrowWeights, "test_sample_weights_of_any_size"),
    (StateUpdatedInEvaluation, "test_evaluation_changes_nothing"),
    (BatchesNotCounted, "test_batches_are_counted_in_training_alone"),
    (NanTakenForZeroVariance, "test_nan_stays_in_its_channel"),
    (ZeroVarianceDivided, "test_zero_variance_and_eps_0_give_the_bias"),
    (ChannelsOfALastAxis, "test_sequences_example"),
    (MemoryOrderLost, "test_output_has_the_memory_order_of_the_input"),
    (RandomBits, "test_same_bits_on_every_run"),
    (DeclaresMoreThanItDoes, "test_output_has_the_dtype_of_the_input"),
    (AnyDeviceWillDo, "test_unknown_device_is_refused"),
]
"""Backends, and the tests that have to name what is wrong with them."""
