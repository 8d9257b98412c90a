"""Bugs in a forward pass: in its results, its precision and the new state."""

from typing import Any

import numpy as np
from toy import Toy, ToyKernels, column, over, spread

from mbn.contract import Array, Batch, Moments, Params, Settings, State, Stats


class BiasedRunningVariance(ToyKernels):
    def advance(self, state: State, moments: Moments, settings: Settings) -> Any:
        return super().advance(state, moments, settings._replace(correction=0))


class UnbiasedOutput(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, *rest: Any) -> Array:
        n = batch.x.size // batch.x.shape[1]
        return super().normalize(batch, stats._replace(var=stats.var * n / max(n - 1, 1)), *rest)


class EpsOutsideTheRoot(ToyKernels):
    def xhat(self, batch: Batch, stats: Stats, eps: float) -> Any:
        var = (np.sqrt(stats.var.astype(np.float64)) + eps) ** 2
        return super().xhat(batch, stats._replace(var=var), 0.0)


class MomentumInverted(ToyKernels):
    def lerp(self, start: Array, end: Array, step: Any) -> Array:
        return super().lerp(start, end, 1 - step)


class NothingTimesNan(ToyKernels):
    def lerp(self, start: Array, end: Array, step: Any) -> Array:
        return super().lerp(start, end, step) + step * end.astype(start.dtype) * 0


class MomentumNoneIsATenth(ToyKernels):
    def step(self, momentum: float | None, *rest: Any) -> Any:
        return super().step(0.1 if momentum is None else momentum, *rest)


class MeanOfSquaresMinusSquareOfMean(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        count, mean, _ = found = super().moments(batch)
        if weights is not None:
            return found
        squares = (x.astype(np.float32) ** 2).mean(axis=over(x))
        return Moments(count, mean, (squares - mean.astype(np.float32) ** 2) * count)


class NarrowSums(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        if weights is not None:
            return super().moments(batch)
        d = x.astype(np.float32)
        mean = d.mean(axis=over(x))
        return Moments(x.size // x.shape[1], mean, ((d - column(mean, x)) ** 2).sum(axis=over(x)))


class ScaleAndShift(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        (x, weights, _), (mean, var, _), (weight, bias) = batch, stats, params
        scale = ((1.0 if weight is None else weight) / np.sqrt(var + eps)).astype(np.float32)
        shift = ((0.0 if bias is None else bias) - mean * scale).astype(np.float32)
        y = (x * column(scale, x) + column(shift, x)).astype(x.dtype)
        return np.where(spread(weights, x), y, 0)


class HalfArithmetic(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, *rest: Any) -> Array:
        x, mean = batch.x, stats.mean
        if x.dtype != np.float16:
            return super().normalize(batch, stats, *rest)
        centred = x - column(mean, x).astype(np.float16)
        return super().normalize(batch._replace(x=centred), stats._replace(mean=0 * mean), *rest)


class InputMutated(ToyKernels):
    def normalize(self, batch: Batch, *rest: Any) -> Array:
        y = super().normalize(batch, *rest)
        if batch.x.flags.writeable and batch.x.size:
            batch.x[0] = 0
        return y


class StateMutated(ToyKernels):
    def lerp(self, start: Array, end: Array, step: Any) -> Array:
        start[...] = super().lerp(start, end, step)
        return start


class WrongDtypeOut(ToyKernels):
    def normalize(self, *args: Any) -> Array:
        return super().normalize(*args).astype(np.float64)


class StatisticsWidened(ToyKernels):
    def lerp(self, start: Array, end: Array, step: Any) -> Array:
        return super().lerp(start.astype(np.float64), end, step)


class NarrowScale(ToyKernels):
    def xhat(self, batch: Batch, stats: Stats, eps: float) -> Any:
        xhat, invstd = super().xhat(batch, stats, eps)
        with np.errstate(all="ignore"):
            narrow = invstd.astype(np.float32)
            return np.where(np.isfinite(column(narrow, batch.x)), xhat, np.inf), narrow


class NarrowWeights(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        weights = batch.sample_weight
        with np.errstate(all="ignore"):
            moments = super().moments(batch)
            return moments if weights is None else moments._replace(count=weights.sum(dtype=np.float32))


class StateUpdatedInEvaluation(Toy):
    def bind(self, forward: Any, pullback: Any) -> Any:
        def step(kernels: Any, batch: Any, params: Any, state: Any, settings: Any, *rest: Any) -> Any:
            y, _, stats = forward(kernels, batch, params, state, settings, *rest)
            return y, forward(kernels, batch, params, state, settings, True)[1], stats

        return step, pullback


class BatchesNotCounted(ToyKernels):
    def advance(self, state: State, *rest: Any) -> Any:
        stats, after = super().advance(state, *rest)
        return stats, after._replace(num_batches_tracked=state.num_batches_tracked)


class NanTakenForZeroVariance(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, *rest: Any) -> Array:
        mean, var, count = stats
        stats = Stats(np.nan_to_num(mean), np.nan_to_num(var), count)
        return super().normalize(batch._replace(x=np.nan_to_num(batch.x)), stats, *rest)


class ZeroVarianceDivided(ToyKernels):
    def xhat(self, batch: Batch, stats: Stats, eps: float) -> Any:
        (x, weights, _), (mean, var, _) = batch, stats
        _, invstd = super().xhat(batch, stats, eps)
        with np.errstate(all="ignore"):
            return np.where(spread(weights, x), x - column(mean, x), 0) * column(1 / np.sqrt(var + eps), x), invstd


class ChannelsOfALastAxis(ToyKernels):
    def moments(self, batch: Batch) -> Moments:
        x, weights, _ = batch
        return super().moments(batch._replace(x=x[..., :1] if x.ndim == 3 and weights is None else x))


class MemoryOrderLost(ToyKernels):
    def normalize(self, *args: Any) -> Array:
        return np.ascontiguousarray(super().normalize(*args))


class RandomBits(ToyKernels):
    def normalize(self, *args: Any) -> Array:
        y = super().normalize(*args)
        noise = np.random.default_rng().choice(np.array([0, 1e-7]), y.shape)
        return (y * (1 + noise)).astype(y.dtype, order="K")


class DeclaresMoreThanItDoes(Toy):
    capabilities = Toy.capabilities._replace(dtypes=frozenset({"float16", "float32", "float64"}))

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        array = super().asarray(x, dtype, device)
        return array.astype(np.float32) if array.dtype == np.float64 else array


class AnyDeviceWillDo(Toy):
    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        return super().asarray(x, dtype)


class CountWraps(ToyKernels):
    def advance(self, state: State, *rest: Any) -> Any:
        stats, after = super().advance(state, *rest)
        if state.num_batches_tracked is not None:
            after = after._replace(num_batches_tracked=np.asarray(state.num_batches_tracked) + 1)
        return stats, after


class NegativeVarianceNotSeen(Toy):
    def within(self, values: Array, low: float, high: float) -> bool:
        return high == np.inf or super().within(values, low, high)


BUGS = [
    (CountWraps, "test_num_batches_tracked_stays_at_its_limit"),
    (NegativeVarianceNotSeen, "test_assignment_rejects_bad_value"),
    (BiasedRunningVariance, "test_running_var_is_unbiased"),
    (UnbiasedOutput, "test_output_uses_the_biased_variance"),
    (EpsOutsideTheRoot, "test_eps_is_added_to_the_variance"),
    (MomentumInverted, "test_momentum_weighs_the_new_value"),
    (NothingTimesNan, "test_momentum_0_keeps_the_statistics"),
    (MomentumNoneIsATenth, "test_momentum_none_averages_all_batches"),
    (MeanOfSquaresMinusSquareOfMean, "test_float32_is_accurate_with_a_large_mean"),
    (NarrowSums, "test_float32_is_accurate_with_a_large_mean"),
    (ScaleAndShift, "test_float32_is_accurate_with_a_large_mean"),
    (HalfArithmetic, "test_halves_are_computed_in_float32"),
    (InputMutated, "test_call_does_not_write_to_its_arguments"),
    (StateMutated, "test_call_does_not_write_to_its_arguments"),
    (WrongDtypeOut, "test_output_has_the_dtype_of_the_input"),
    (StatisticsWidened, "test_statistics_keep_the_dtype_of_the_layer"),
    (NarrowScale, "test_training_is_accurate_on_values_of_any_size"),
    (NarrowWeights, "test_training_is_accurate_with_sample_weights_of_any_size"),
    (StateUpdatedInEvaluation, "test_evaluation_keeps_the_state"),
    (BatchesNotCounted, "test_batches_are_counted_in_training_alone"),
    (NanTakenForZeroVariance, "test_nan_stays_in_its_channel"),
    (ZeroVarianceDivided, "test_zero_variance_and_eps_0_give_the_bias"),
    (ChannelsOfALastAxis, "test_training_matches_the_sequences_example"),
    (MemoryOrderLost, "test_output_has_the_memory_order_of_the_input"),
    (RandomBits, "test_training_gives_the_same_bits_on_every_call"),
    (DeclaresMoreThanItDoes, "test_output_has_the_dtype_of_the_input"),
    (AnyDeviceWillDo, "test_unknown_device_is_rejected"),
]
"""Wrong backends, each with the test that must fail on it."""
