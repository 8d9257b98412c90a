"""Bugs planted in JAX's backend: in its handling of range, in its layout for GPUs, which is tried on the CPU, and in
the calls of compiled loops, which are made for arrays of every size.

``python jax_bugs.py FOLDER BUG...`` tries for each bug the test of the suite that must fail.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from planted import Bug, conform


def on_gpu(plant: Callable[[], None]) -> Callable[[], None]:
    """Return a function that selects the layout for GPUs and plants a bug.

    JAX is imported in the function, since a process that has imported JAX cannot fork.
    """

    def select_layout_and_plant() -> None:
        import jax_gpu_layout

        assert jax_gpu_layout.PRIMITIVES
        plant()

    return select_layout_and_plant


def in_loops(plant: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls the compiled loops for arrays of every size, and plants a bug."""

    def call_loops_and_plant() -> None:
        import jax_compiled_loops

        assert jax_compiled_loops.compiled_loops.LEAST == [0, 0]
        plant()

    return call_loops_and_plant


def in_64_bits(plant: Callable[[], None]) -> Callable[[], None]:
    """Return a function that enables 64-bit numbers and plants a bug."""

    def enable_and_plant() -> None:
        os.environ["JAX_ENABLE_X64"] = "1"
        plant()

    return enable_and_plant


def means_in_one_unit() -> None:
    from mbn_jax import channel_stats
    from mbn_jax.kernels import pairs, passes

    def as_they_are(value, dtype):
        return pairs.Scaled(
            pairs.as_pair(pairs.times(value.pair, value.unit), dtype), passes.jnp.ones_like(value.unit, dtype)
        )

    passes.in_own_units = channel_stats.in_own_units = as_they_are


def variances_in_one_unit() -> None:
    from mbn_jax import channel_stats
    from mbn_jax.kernels import pairs, passes

    def as_they_are(square, unit, dtype):
        return [*pairs.as_pair(pairs.times(pairs.times(square, unit), unit), dtype), passes.jnp.ones_like(unit, dtype)]

    passes.square_in_own_units = channel_stats.square_in_own_units = as_they_are


def one_factor() -> None:
    from mbn_jax import channel_stats
    from mbn_jax.kernels import primitives

    def product(invstd, weight):
        scale = channel_stats.plain(invstd) * (1 if weight is None else weight)
        return [channel_stats.jnp.ones_like(scale), scale]

    channel_stats._FACTORS = primitives.WidePrimitive("factors", product)


def factors_for_a_weight_of_1() -> None:
    from mbn_jax import channel_stats
    from mbn_jax.kernels import primitives

    own, where = channel_stats._factors, channel_stats.jnp.where

    def without_0(invstd, weight):
        first, second = own(invstd, where(weight == 0, 1, weight))
        return [first, where(weight == 0, 0, second)]

    channel_stats._FACTORS = primitives.WidePrimitive("factors", without_0)


def squares_as_found() -> None:
    from mbn_jax.kernels import passes

    passes._leaves_range = lambda squares, *_: passes.jnp.any(squares < 0)


def weights_as_they_are() -> None:
    from mbn_jax import channel_stats

    channel_stats._in_range = lambda weights, _: weights


def narrow_sums_in_evaluation() -> None:
    from mbn_jax.kernels import own_statistics

    own = own_statistics._sums

    def narrow(layout, dy, batch, factor):
        rest, *exact = own(layout, dy, batch, factor)
        if batch.count is not None:
            return rest, *exact
        dy = own_statistics.passes.unmasked(dy, batch.weights)
        sums = [own_statistics.channel_sum(v) for v in (dy, dy * own_statistics._standardize(batch))]
        return rest, sums, sums

    own_statistics._sums = narrow


def last_chunk_dropped() -> None:
    from mbn_jax.kernels import gpu_sums

    in_chunks = gpu_sums._in_chunks

    def full_chunks(x, axis):
        chunk = min(gpu_sums.CHUNK, x.shape[axis])
        full = x.shape[axis] // chunk * chunk
        return in_chunks(x.at[(slice(None),) * axis + (slice(full, None),)].set(0), axis)

    gpu_sums._in_chunks = full_chunks


def deviations_from_nothing() -> None:
    from mbn_jax.kernels import passes

    passes._first_few = lambda x: passes.jnp.zeros(x.shape[1], "float64")


def channels_mixed_up() -> None:
    from mbn_jax.kernels import layouts, passes

    passes.GPU = layouts.GPU._replace(broadcast=lambda vector, ndim: layouts.GPU.broadcast(vector[::-1], ndim))


def factors_in_any_order() -> None:
    from mbn_jax.kernels import passes

    passes._multiplied = lambda values, first, second: values * first * second


def weights_left_out_of_loops() -> None:
    from mbn_jax.kernels import compiled_loops

    call = compiled_loops.Loops._call
    compiled_loops.Loops._call = lambda loops, number, result, operands, weights: call(
        loops, number, result, operands, None
    )


def loops_beyond_the_range() -> None:
    from mbn_jax.kernels import passes

    passes._are_ordinary = lambda first, weights: passes.jnp.all(first > 0)


def loops_for_invalid_weights() -> None:
    from mbn_jax.kernels import passes

    passes._are_ordinary = lambda first, weights: passes.jnp.all(first == 1)


def memory_in_another_order() -> None:
    from mbn_jax.kernels import compiled_loops

    compiled_loops.Loops.in_order = lambda loops, x: x.reshape(
        (x.shape[0], *x.shape[:0:-1]) if loops.has_channels_last else x.shape
    )


def mean_rounded_to_its_center() -> None:
    from mbn_jax.kernels import compiled_loops

    sums = compiled_loops.Loops.grad_sums

    def without_drift(loops, *operands):
        drift, *others = sums(loops, *operands)
        return [0 * drift, *others]

    compiled_loops.Loops.grad_sums = without_drift


BUGS = {
    "units of means": Bug(means_in_one_unit, "test_output_is_accurate_for_any_eps_and_weight[jax-float32-1e-33"),
    "units of variances": Bug(
        variances_in_one_unit, "test_output_is_accurate_for_any_eps_and_weight[jax-float32-1e-20"
    ),
    "one factor": Bug(one_factor, "test_output_is_accurate_for_any_eps_and_weight[jax-float32-1e-20"),
    "infinity times 0": Bug(
        in_64_bits(factors_for_a_weight_of_1), "test_pullback_is_accurate_for_weight_0_and_small_values[jax-float64"
    ),
    "factors in any order": Bug(factors_in_any_order, "test_dx_is_accurate_for_small_dy_and_large_variance"),
    "squares out of range": Bug(
        in_64_bits(squares_as_found), "test_output_is_accurate_for_any_eps_and_weight[jax-float64-1e+200"
    ),
    "weights out of range": Bug(weights_as_they_are, "test_training_is_accurate_with_sample_weights_of_any_size"),
    "sums in evaluation": Bug(narrow_sums_in_evaluation, "test_pullback_of_evaluation_is_accurate_where_sums_cancel"),
    "dropped": Bug(on_gpu(last_chunk_dropped), "test_long_channels"),
    "cancelled": Bug(on_gpu(deviations_from_nothing), "test_float32_is_accurate_with_a_large_mean"),
    "mixed up": Bug(on_gpu(channels_mixed_up), "test_training_is_accurate_where_the_first_values_are_masked"),
    "loops without weights": Bug(in_loops(weights_left_out_of_loops), "test_masked_training_step_is_accurate"),
    "loops beyond the range": Bug(
        in_loops(loops_beyond_the_range), "test_output_is_accurate_for_any_eps_and_weight[jax-float32-1e-33"
    ),
    "loops for invalid weights": Bug(
        in_loops(loops_for_invalid_weights), "test_invalid_traced_mask_arguments_give_nan"
    ),
    "another order": Bug(in_loops(memory_in_another_order), "test_running_statistics_have_no_derivative"),
    "no drift": Bug(in_loops(mean_rounded_to_its_center), "test_float32_pullback_is_accurate_with_large_means"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("jax", {name: BUGS[name] for name in names}, Path(folder))
