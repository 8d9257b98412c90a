"""Bugs planted in the toy backend, one each, and runs of the suite against them.

``python toy_bugs.py FOLDER none`` runs the whole suite on the correct backend, which has to pass; ``python toy_bugs.py
FOLDER BUG...`` runs for each bug the test that has to name it. Reports go to the folder.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from planted import Bug, conform
from toy import Toy, ToyModule, column, like, over, spread

import mbn
from mbn.contract import Array, Backend, Moments


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


class DeclaresMasksButIgnoresThem(Toy):
    def weights(self, shape: tuple[int, ...], dtype: str, *_: Any) -> Array:
        return np.ones(shape, dtype)


class MaskLeaksIntoStatistics(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        if weights is None:
            return super().moments(x)
        w, d = spread(weights, x), x.astype(np.float64)
        count = weights.sum() * x.size / weights.size / x.shape[1]
        mean = (w * d).sum(axis=over(x)) / (count or 1)  # 0 * NaN is NaN
        return Moments(count, mean, (w * (d - column(mean, x)) ** 2).sum(axis=over(x)))


class MaskLeaksIntoGradients(Toy):
    def grad_sums(self, dy: Array, x: Array, mean: Array, var: Array, eps: float, weights: Any = None) -> Any:
        xhat, _ = self.xhat(x, mean, var, eps, None)
        dy = (spread(weights, x) > 0) * dy.astype(np.float64)  # 0 * NaN is NaN
        return dy.sum(axis=over(x)), (dy * xhat).sum(axis=over(x))


class MaskedOutputIsTheBias(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, *rest: Any) -> Array:
        *rest, weights = rest
        return super().normalize(like(x, np.where(spread(weights, x), x, column(mean, x))), mean, var, *rest)


class MaskedGradientIsThatOfTheOutput(Toy):
    def grad_input(self, dy: Array, x: Array, *rest: Any) -> Array:
        return np.where(spread(rest[-1], x), super().grad_input(dy, x, *rest), dy)


class BesselCountsMaskedValues(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        self.places = x.size // x.shape[1]
        return super().moments(x, weights)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (self.places - 1) if correction else super().variance(moments, correction)


class BesselCountsEachWeightOnce(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        self.valid = x.size // x.shape[1] if weights is None else (weights > 0).sum()
        return super().moments(x, weights)

    def variance(self, moments: Moments, correction: int) -> Array:
        return moments.m2 / (self.valid - 1) if correction else super().variance(moments, correction)


class WeightsIgnoredInTheVariance(Toy):
    def moments(self, x: Array, weights: Any = None) -> Moments:
        moments = super().moments(x, weights)
        w = np.sign(spread(weights, x))
        squares = w * (np.where(w, x, 0) - column(moments.mean, x)) ** 2
        return moments._replace(m2=squares.sum(axis=over(x)))


class WeightsInSumsOfDy(Toy):
    def grad_sums(self, dy: Array, x: Array, mean: Array, var: Array, eps: float, weights: Any = None) -> Any:
        dy = np.where(spread(weights, x), dy, 0) * spread(weights, x)
        return super().grad_sums(dy, x, mean, var, eps, weights)


class StatisticsOfNothingLearnt(Toy):
    def step(self, momentum: float | None, num_batches_tracked: Any, *_: Any) -> Any:
        return 1 / num_batches_tracked if momentum is None else momentum


class LengthsOffByOne(Toy):
    def weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        return super().weights(shape, dtype, mask, None if lengths is None else lengths + 1, sample_weight)


class WeightsOfTheCallerKept(Toy):
    def weights(self, shape: tuple[int, ...], dtype: str, mask: Any, lengths: Any, sample_weight: Any) -> Array:
        if mask is lengths is None and sample_weight.shape == shape:
            return sample_weight
        return super().weights(shape, dtype, mask, lengths, sample_weight)


class MeansMergedAlone(Toy):
    def merge(self, first: Moments, second: Moments) -> Moments:
        return super().merge(first, second)._replace(m2=first.m2 + second.m2)


class MeansMergedWithoutCounts(Toy):
    def merge(self, first: Moments, second: Moments) -> Moments:
        return super().merge(first, second)._replace(mean=(first.mean + second.mean) / 2)


class CountOfTheFirstBatch(Toy):
    def merge(self, first: Moments, second: Moments) -> Moments:
        return super().merge(first, second)._replace(count=first.count)


class NarrowMerge(Toy):
    def merge(self, first: Moments, second: Moments) -> Moments:
        narrow = (Moments(n, mean.astype(np.float32), m2.astype(np.float32)) for n, mean, m2 in (first, second))
        return super().merge(*narrow)


class MergedInPlace(Toy):
    def merge(self, first: Moments, second: Moments) -> Moments:
        count, mean, first.m2[...] = super().merge(first, second)
        return Moments(count, mean, first.m2)


class NothingMergedIsNan(Toy):
    def merge(self, first: Moments, second: Moments) -> Moments:
        merged = super().merge(first, second)
        return merged._replace(mean=merged.mean if merged.count else merged.mean * np.nan)


class WeightForgottenAroundZero(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, *rest: Any) -> Array:
        return super().normalize(x, mean, var, weight if mean.any() else None, *rest)


class BiasForgottenOfOneRow(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, *rest: Any) -> Array:
        return super().normalize(x, mean, var, weight, None if len(x) == 1 else bias, *rest)


class DeclaresAutogradAndHasNone(Toy):
    capabilities = Toy.capabilities._replace(autograd=True)


class DeclaresVmapAndHasNone(Toy):
    vmap = Backend.vmap


class VmapOfTheFirst(Toy):
    def vmap(self, function: Any) -> Any:
        first_alone = super().vmap(function)
        return lambda *arguments: first_alone(*(np.stack([values[0]] * len(values)) for values in arguments))


class DeclaresJitAndHasNone(Toy):
    jit = Backend.jit


class DeclaresCompileAndHasNone(Toy):
    compile = Backend.compile


def register(toy: type[Toy]) -> None:
    mbn.register_backend("toy", toy)


class StatisticsNotShared(Toy):
    def write(self, before: Any, after: Any) -> Any:  # noqa: ARG002 - the bug
        return after


class DeclaresModulesAndHasNone(Toy):
    def module(self, *_: Any) -> Any:
        return Backend.module(self, *_)


class ModuleInTrainingForEver(Toy):
    def module(self, *given: Any) -> Any:
        module = super().module(*given)
        module.eval = module.train
        return module


class ModuleBeginsInTraining(Toy):
    def module(self, *given: Any) -> Any:
        module = super().module(*given)
        module.train()
        return module


class ModuleIgnoresMasks(Toy):
    def module(self, *given: Any) -> Any:
        module = super().module(*given)
        return Unmasked(self, module.layer, lambda *_: None)


class Unmasked(ToyModule):
    def __call__(self, x: Any, **_: Any) -> Array:
        return super().__call__(x)


BUGS = {
    toy.__name__: Bug(partial(register, toy), named_by)
    for toy, named_by in [
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
        (StateUpdatedInEvaluation, "test_evaluation_changes_nothing"),
        (BatchesNotCounted, "test_batches_are_counted_in_training_alone"),
        (NanTakenForZeroVariance, "test_nan_stays_in_its_channel"),
        (ZeroVarianceDivided, "test_zero_variance_and_eps_0_give_the_bias"),
        (ChannelsOfALastAxis, "test_sequences_example"),
        (MemoryOrderLost, "test_output_has_the_memory_order_of_the_input"),
        (RandomBits, "test_same_bits_on_every_run"),
        (DeclaresMoreThanItDoes, "test_output_has_the_dtype_of_the_input"),
        (AnyDeviceWillDo, "test_unknown_device_is_refused"),
        (SumOfDyDropped, "test_gradients_add_up_to_nothing"),
        (SumOfDyXhatDropped, "test_gradients_add_up_to_nothing"),
        (UnbiasedGradient, "test_two_values_example"),
        (ConstantsDifferentiated, "test_pullback_is_the_gradient"),
        (InvstdForgottenInDweight, "test_two_values_example"),
        (NarrowSumsOfGradients, "test_float32_with_large_means"),
        (WrongDtypeOfDx, "test_pullback_is_the_gradient"),
        (MemoryOrderOfDy, "test_dx_has_the_memory_order_of_x"),
        (ResidualsUsedUp, "test_pullback_gives_the_same_again"),
        (ResidualsOfTheLastCall, "test_pullback_gives_the_same_again"),
        (NothingCopied, "test_pullback_gives_the_same_again"),
        (BatchesCountedTwice, "test_batches_are_counted_in_training_alone"),
        (PullbackCountsABatch, "test_vjp_is_a_call"),
        (NothingLearntWithAGradient, "test_vjp_is_a_call"),
        (DeclaresMasksButIgnoresThem, "test_masked_values_leak_nowhere"),
        (MaskLeaksIntoStatistics, "test_masked_values_leak_nowhere"),
        (MaskLeaksIntoGradients, "test_pullback_with_masks"),
        (MaskedOutputIsTheBias, "test_masked_outputs_are_zero"),
        (MaskedGradientIsThatOfTheOutput, "test_pullback_with_masks"),
        (BesselCountsMaskedValues, "test_bessel_counts_valid_values"),
        (BesselCountsEachWeightOnce, "test_bessel_counts_weights"),
        (WeightsIgnoredInTheVariance, "test_whole_weights_are_repetitions"),
        (WeightsInSumsOfDy, "test_pullback_with_masks"),
        (StatisticsOfNothingLearnt, "test_nothing_left"),
        (LengthsOffByOne, "test_lengths_count_from_the_start"),
        (WeightsOfTheCallerKept, "test_pullback_of_an_edited_mask"),
        (MeansMergedAlone, "test_batches_do_not_matter"),
        (MeansMergedWithoutCounts, "test_three_values_example"),
        (CountOfTheFirstBatch, "test_batches_do_not_matter"),
        (NarrowMerge, "test_a_thousand_unequal_batches"),
        (MergedInPlace, "test_weighted_batches_are_merged"),
        (NothingMergedIsNan, "test_weighted_batches_are_merged"),
        (WeightForgottenAroundZero, "test_scale_and_shift"),
        (BiasForgottenOfOneRow, "test_dense_layer"),
        (StatisticsNotShared, "test_module_and_layer_share_their_arrays"),
        (DeclaresModulesAndHasNone, "test_module_does_what_the_layer_does"),
        (ModuleInTrainingForEver, "test_module_does_what_the_layer_does"),
        (ModuleBeginsInTraining, "test_module_begins_in_the_mode_of_the_layer"),
        (ModuleIgnoresMasks, "test_masks_go_through_the_module"),
        (DeclaresAutogradAndHasNone, "test_gradient_is_that_of_the_pullback"),
        (DeclaresVmapAndHasNone, "test_vmap_is_a_loop"),
        (VmapOfTheFirst, "test_vmap_is_a_loop"),
        (DeclaresJitAndHasNone, "test_jit"),
        (DeclaresCompileAndHasNone, "test_compiled"),
    ]
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    known = BUGS | {"none": Bug(partial(register, Toy), "test")}
    conform("toy", {name: known[name] for name in names}, Path(folder))
