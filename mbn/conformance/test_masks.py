"""Masks: masked cells reach no output or statistic, and sample weights count in the statistics, on every backend."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbn
from mbn.conformance import oracle, strategies
from mbn.conformance.target import Target, assert_same, configured, strides
from mbn.contract import layer_dtype, transposed

X = np.random.default_rng(14).normal(3, 2, (6, 3, 4)).astype(np.float32)
KINDS = strategies.maskings((6, 4))
MASKING = KINDS["mask and weights"]


@pytest.fixture(autouse=True)
def _requires_masks(target: Target) -> None:
    target.require("masks")


def assert_step(
    target: Target,
    bn: mbn.BatchNorm1d,
    before: dict[str, np.ndarray],
    y: Any,
    x: np.ndarray,
    weights: np.ndarray,
    momentum: float = 0.1,
) -> None:
    """Check the output of a training step, and the state after it."""
    held = {key: value for key, value in before.items() if key != "num_batches_tracked"}
    exact = oracle.train(x, **held, momentum=momentum, eps=bn.eps, correction=bn.correction, weights=weights)
    dtype = layer_dtype(x.dtype.name)
    target.assert_output(y, exact.y, x.dtype.name)
    target.assert_statistic(bn.running_mean, exact.running_mean, dtype)
    target.assert_statistic(bn.running_var, exact.running_var, dtype)
    assert int(bn.num_batches_tracked) == before["num_batches_tracked"] + 1


@pytest.mark.parametrize("correction", [1, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_training_step_is_accurate(target: Target, kind: str, correction: int) -> None:
    masking = KINDS[kind]
    bn = configured(target.layer(3, correction=correction), seed=1)
    before = target.snapshot(bn)
    y = bn(target.array(masking.poisoned(X)), **target.arrays(masking.arguments))
    assert_step(target, bn, before, y, X, masking.weights)


@pytest.mark.parametrize("kind", strategies.maskings((6,)))
def test_masked_training_step_of_rows_is_accurate(target: Target, kind: str) -> None:
    masking, x = strategies.maskings((6,))[kind], X[:, :, 0].copy()
    bn = configured(target.layer(3), seed=2)
    before = target.snapshot(bn)
    y = bn(target.array(masking.poisoned(x)), **target.arrays(masking.arguments))
    assert_step(target, bn, before, y, x, masking.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_evaluation_is_accurate(target: Target, kind: str) -> None:
    masking = KINDS[kind]
    bn = configured(target.layer(3), seed=3).eval()
    before = target.snapshot(bn)
    y = bn(target.array(masking.poisoned(X)), **target.arrays(masking.arguments))
    held = {key: value for key, value in before.items() if key != "num_batches_tracked"}
    target.assert_output(y, oracle.evaluate(X, **held, eps=bn.eps, weights=masking.weights), "float32")
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("training", [True, False])
def test_masked_values_reach_no_output_or_statistic(target: Target, poison: float, *, training: bool) -> None:
    masking = KINDS["mask"]
    x = masking.poisoned(X, poison)
    bn, clean = (configured(target.layer(3), seed=4).train(training) for _ in range(2))
    y = target.numpy(bn(target.array(x), **target.arrays(masking.arguments)))
    expected = target.numpy(clean(target.array(masking.poisoned(X, 0)), **target.arrays(masking.arguments)))
    np.testing.assert_array_equal(y, expected)
    assert_same(target.snapshot(clean), target.snapshot(bn))


@pytest.mark.parametrize("training", [True, False])
def test_masked_outputs_are_zero(target: Target, *, training: bool) -> None:
    masking = KINDS["mask"]
    bn = configured(target.layer(3), seed=5).train(training)
    y = target.numpy(bn(target.array(masking.poisoned(X)), **target.arrays(masking.arguments)))
    np.testing.assert_array_equal(y[~masking.counted(X)], 0)
    assert y[masking.counted(X)].all()


def test_training_is_accurate_where_the_first_values_are_masked(target: Target) -> None:
    # Algorithms with shifted sums subtract a first value from the others.
    x = (1e4 + X).astype(np.float32)
    mask = np.ones((6, 4), bool)
    mask[:2] = mask[2, :3] = False
    masking = strategies.Masking({"mask": mask}, mask.astype(float))
    for poison in (np.nan, 1e30):
        bn = configured(target.layer(3), seed=6)
        before = target.snapshot(bn)
        y = bn(target.array(masking.poisoned(x, poison)), mask=target.array(mask))
        assert_step(target, bn, before, y, x, masking.weights)


def test_masked_rows_equal_absent_rows(target: Target) -> None:
    kept = np.array([True, False, True, True, False, True])
    bn, compacted = (configured(target.layer(3), seed=7) for _ in range(2))
    before = target.snapshot(bn)
    y = target.numpy(bn(target.array(X), mask=target.array(kept)))
    y = target.array(y[kept])
    assert_step(target, bn, before, y, X[kept], np.ones((4, 4)))
    assert_step(target, compacted, before, compacted(target.array(X[kept])), X[kept], np.ones((4, 4)))


def test_integer_weights_equal_repeated_rows(target: Target) -> None:
    counts = np.array([2, 0, 1, 3, 1, 0])
    bn = configured(target.layer(3), seed=8)
    before = target.snapshot(bn)
    y = target.numpy(bn(target.array(X), sample_weight=target.array(counts)))
    repeated = np.repeat(X, counts, axis=0)
    assert_step(target, bn, before, target.array(np.repeat(y, counts, axis=0)), repeated, np.ones((7, 4)))


def test_bessel_correction_counts_unmasked_values(target: Target) -> None:
    bn = target.layer(1, momentum=1.0)
    bn(target.array(np.array([[0], [2], [np.nan]], np.float32)), mask=target.array(np.array([True, True, False])))
    np.testing.assert_allclose(target.numpy(bn.running_var), [2], rtol=2.4e-7)  # 2 / (2 - 1), not 2 / (3 - 1)


def test_bessel_correction_counts_sample_weights(target: Target) -> None:
    bn = target.layer(1, momentum=1.0)
    bn(target.array(np.array([[0], [3]], np.float32)), sample_weight=target.array(np.array([2, 1])))
    np.testing.assert_allclose(target.numpy(bn.running_mean), [1], rtol=2.4e-7)
    np.testing.assert_allclose(target.numpy(bn.running_var), [3], rtol=2.4e-7)  # 6 / (3 - 1), as for 0, 0, 3


def test_lengths_count_positions_from_the_start(target: Target) -> None:
    x = np.array([[[1, 2, 3]], [[4, 5, 6]]], np.float32)
    bn = target.layer(1, momentum=1.0, correction=0, eps=0.0)
    y = target.numpy(bn(target.array(x), lengths=target.array(np.array([1, 3]))))
    np.testing.assert_allclose(target.numpy(bn.running_mean), [4], rtol=2.4e-7)
    np.testing.assert_array_equal(y[0, 0, 1:], [0, 0])
    np.testing.assert_allclose(y[0, 0, 0], -3 / np.sqrt(3.5), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("arguments", [{"mask": np.zeros((6, 4), bool)}, {"lengths": np.zeros(6, int)}])
def test_fully_masked_batch_gives_zeros_and_keeps_the_statistics(
    target: Target, arguments: dict[str, np.ndarray], momentum: float | None
) -> None:
    bn = configured(target.layer(3, momentum=momentum), seed=9)
    before = target.snapshot(bn)
    for training in (True, False):
        for x in (X, np.full_like(X, np.nan)):
            bn.train(training)
            np.testing.assert_array_equal(target.numpy(bn(target.array(x), **target.arrays(arguments))), 0 * X)
    after = target.snapshot(bn)
    assert int(after.pop("num_batches_tracked")) == before.pop("num_batches_tracked") + 2  # as empty batches count
    assert_same(before, after)


@pytest.mark.parametrize("correction", [1, 0])
def test_one_unmasked_value_gives_the_bias(target: Target, correction: int) -> None:
    mask = np.zeros((6, 4), bool)
    mask[4, 1] = True
    bn = configured(target.layer(3, correction=correction), seed=10)
    before = target.snapshot(bn)
    y = bn(target.array(X), mask=target.array(mask))
    np.testing.assert_array_equal(target.numpy(y)[4, :, 1], before["bias"])
    assert_step(target, bn, before, y, X, mask.astype(float))
    assert np.array_equal(target.numpy(bn.running_mean), before["running_mean"]) == (correction == 1)


def test_one_unmasked_infinite_value_keeps_the_statistics(target: Target) -> None:
    mask = np.zeros((6, 4), bool)
    mask[4, 1] = True
    x = X.copy()
    x[4, :, 1] = np.inf
    bn = configured(target.layer(3), seed=10)
    before = target.snapshot(bn)
    bn(target.array(x), mask=target.array(mask))
    bn.num_batches_tracked = int(before["num_batches_tracked"])
    assert_same(before, target.snapshot(bn))


def test_weighted_constant_channel_gives_exactly_the_bias(target: Target) -> None:
    weights = KINDS["real weights"].weights
    bn = target.layer(3, eps=0.0, momentum=1.0)
    bn.bias = np.array([0.0, 0.5, -2.0])
    x = np.full((6, 3, 4), 0.1, np.float32)
    y = target.numpy(bn(target.array(x), sample_weight=target.array(weights.astype(np.float32))))
    np.testing.assert_array_equal(y, np.broadcast_to(np.array([0.0, 0.5, -2.0])[:, None], x.shape))
    np.testing.assert_array_equal(target.numpy(bn.running_mean), x[0, :, 0])
    np.testing.assert_array_equal(target.numpy(bn.running_var), np.zeros(3))


def test_momentum_none_averages_batches_of_any_weight(target: Target) -> None:
    bn = target.layer(3, momentum=None)
    means: list[np.ndarray] = []
    for kind in ("mask", "whole weights", "lengths"):
        masking = KINDS[kind]
        before = target.snapshot(bn)
        y = bn(target.array(X), **target.arrays(masking.arguments))
        assert_step(target, bn, before, y, X, masking.weights, momentum=1 / (len(means) + 1))
        w = masking.weights[:, None]
        means.append((w * X).sum((0, 2)) / w.sum())
    np.testing.assert_allclose(target.numpy(bn.running_mean), np.mean(means, axis=0), rtol=6e-7)


def test_call_apply_and_batch_norm_agree_on_masks(target: Target) -> None:
    arguments = target.arrays(MASKING.arguments)
    x = target.array(MASKING.poisoned(X))
    bn = configured(target.layer(3, momentum=0.3), seed=11)
    y, state = bn.apply(bn.params, bn.state, x, training=True, **arguments)
    vectors = bn.running_mean, bn.running_var, *bn.params
    result = mbn.functional.batch_norm(x, *vectors, training=True, momentum=0.3, **arguments, backend=target.backend)
    expected = target.numpy(bn(x, **arguments))
    for output in (y, result.output):
        np.testing.assert_array_equal(target.numpy(output), expected, strict=True)
    for statistics in (state, result):
        for name in ("running_mean", "running_var"):
            own = target.numpy(getattr(bn, name))
            np.testing.assert_array_equal(target.numpy(getattr(statistics, name)), own, strict=True)
    assert int(state.num_batches_tracked) == int(bn.num_batches_tracked)


@pytest.mark.parametrize("kind", ["all three", "whole weights"])
def test_mask_arguments_may_be_host_data_or_lists(target: Target, kind: str) -> None:
    masking = KINDS[kind]
    bn, from_host, from_lists = (configured(target.layer(3), seed=12) for _ in range(3))
    expected = target.numpy(bn(target.array(X), **target.arrays(masking.arguments)))
    lists = {name: values.tolist() for name, values in masking.arguments.items()}
    for other, arguments in ((from_host, masking.arguments), (from_lists, lists)):
        np.testing.assert_array_equal(target.numpy(other(X, **arguments)), expected, strict=True)
        assert_same(target.snapshot(bn), target.snapshot(other))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_integer_dtype_of_a_mask_argument_changes_no_bit(target: Target, dtype: str) -> None:
    lengths = KINDS["lengths"].arguments["lengths"]
    bn, other = target.layer(3), target.layer(3)
    expected = target.numpy(bn(target.array(X), lengths=lengths))
    np.testing.assert_array_equal(target.numpy(other(target.array(X), lengths=lengths.astype(dtype))), expected)


def test_masked_step_is_the_same_for_channels_last(target: Target) -> None:
    last, first = target.layer(3, axis=-1), target.layer(3)
    for kind in ("mask", "all three"):
        arguments = target.arrays(KINDS[kind].arguments)
        y = target.numpy(last(target.array(X.swapaxes(1, 2)), **arguments))
        np.testing.assert_array_equal(y.swapaxes(1, 2), target.numpy(first(target.array(X), **arguments)))
        assert_same(target.snapshot(first), target.snapshot(last))


def test_frozen_layer_with_a_mask_computes_as_in_evaluation(target: Target) -> None:
    arguments = target.arrays(MASKING.arguments)
    bn = configured(target.layer(3), seed=13)
    before = target.snapshot(bn)
    expected = target.numpy(bn.eval()(target.array(X), **arguments))
    np.testing.assert_array_equal(target.numpy(bn.freeze().train()(target.array(X), **arguments)), expected)
    assert_same(before, target.snapshot(bn))


def test_number_of_features_comes_from_the_first_input(target: Target) -> None:
    lazy, plain = target.layer(None), target.layer(3)
    y, expected = (target.numpy(bn(target.array(X), **target.arrays(MASKING.arguments))) for bn in (lazy, plain))
    np.testing.assert_array_equal(y, expected, strict=True)
    assert_same(target.snapshot(plain), target.snapshot(lazy))


def test_without_running_statistics_evaluation_uses_the_batch(target: Target) -> None:
    bn = target.layer(3, track_running_stats=False, affine=False)
    exact = oracle.train(X, np.zeros(3), np.ones(3), momentum=1.0, eps=1e-5, weights=MASKING.weights)
    for mode in (True, False):
        y = bn.train(mode)(target.array(X), **target.arrays(MASKING.arguments))
        target.assert_output(y, exact.y, "float32")


def test_empty_batch_with_a_mask_keeps_the_statistics_and_counts(target: Target) -> None:
    bn = configured(target.layer(3), seed=14)
    before = target.snapshot(bn)
    y = bn(target.array(X[:0]), mask=target.array(np.zeros((0, 4), bool)))
    assert tuple(y.shape) == (0, 3, 4)
    after = target.snapshot(bn)
    assert int(after.pop("num_batches_tracked")) == before.pop("num_batches_tracked") + 1
    assert_same(before, after)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_memory_layout_changes_no_bit_of_a_masked_step(target: Target, layout: str) -> None:
    laid_out = {
        name: strategies.laid_out(np.array(values), layout) for name, values in KINDS["all three"].arguments.items()
    }
    x = strategies.laid_out(X.copy(), layout)
    bn, contiguous = target.layer(3), target.layer(3)
    plain = {name: np.ascontiguousarray(values) for name, values in laid_out.items()}
    expected = target.numpy(contiguous(target.array(np.ascontiguousarray(x)), **target.arrays(plain)))
    np.testing.assert_array_equal(target.numpy(bn(x, **laid_out)), expected, strict=True)
    assert_same(target.snapshot(contiguous), target.snapshot(bn))


@pytest.mark.parametrize("training", [True, False])
def test_output_has_the_memory_order_of_the_input(target: Target, *, training: bool) -> None:
    target.require_memory_orders()
    bn = target.layer(3, axis=-1).train(training)
    plain = target.array(np.ascontiguousarray(X.swapaxes(1, 2)))  # (N, L, C)
    for x in (plain, transposed(target.array(X))):
        y = bn(x, **target.arrays(MASKING.arguments))
        assert strides(y) == strides(x)


def test_masked_results_agree_on_every_declared_device(target: Target) -> None:
    expected = target.numpy(target.layer(3)(target.array(X), **target.arrays(MASKING.arguments)))
    for device in target.capabilities.devices:
        there = Target(target.backend, device)
        bn, arguments = there.layer(3), there.arrays(MASKING.arguments)
        y, pullback = bn.vjp(there.array(X), **arguments)
        np.testing.assert_allclose(target.numpy(y), expected, rtol=0, atol=1e-6)
        assert target.backend.device(pullback(y)[0]) == target.backend.device(y)


def test_masked_call_does_not_write_to_its_arguments(target: Target) -> None:
    for make in (target.array, np.array):
        x = make(MASKING.poisoned(X))
        arguments = {name: make(values) for name, values in MASKING.arguments.items()}
        bn = target.layer(3)
        bn(x, **arguments)
        bn.eval()(x, **arguments)
        for given_array, values in zip(
            [x, *arguments.values()], [MASKING.poisoned(X), *MASKING.arguments.values()], strict=True
        ):
            host = target.numpy(given_array) if make == target.array else given_array
            np.testing.assert_array_equal(host, values, strict=True)


def test_masked_training_gives_the_same_bits_on_every_call(target: Target) -> None:
    first = target.layer(3)
    expected = target.numpy(first(target.array(X), **target.arrays(MASKING.arguments)))
    for _ in range(3):
        bn = target.layer(3)
        np.testing.assert_array_equal(target.numpy(bn(target.array(X), **target.arrays(MASKING.arguments))), expected)
        assert_same(target.snapshot(first), target.snapshot(bn))


@given(data=st.data())
def test_masked_training_is_accurate_on_drawn_batches(target: Target, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([X.shape[:2], X.shape]))
    batch = data.draw(strategies.batches(target.capabilities.dtypes, shape))
    seed = data.draw(st.integers(0, 99))
    kinds = strategies.maskings((shape[0], *shape[2:]), seed)
    masking = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    eps = data.draw(st.sampled_from(strategies.EPS))
    momentum = data.draw(st.sampled_from(strategies.MOMENTA))
    correction = data.draw(st.sampled_from([0, 1]))
    bn = target.layer(shape[1], eps=eps, momentum=momentum, correction=correction, dtype=batch.layer_dtype)
    before = target.snapshot(configured(bn, seed))
    x = masking.poisoned(batch.x, data.draw(st.sampled_from([np.nan, np.inf, 0.0, 6e4])))
    y = bn(target.array(x), **target.arrays(masking.arguments))
    assert_step(target, bn, before, y, batch.x, masking.weights, momentum)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_channels_with_weights_are_accurate_with_a_large_mean(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    generator = np.random.default_rng(15)
    x = (1e4 + generator.standard_normal((100_000, 2))).astype(dtype)
    weights = generator.uniform(0, 2, 100_000).astype(np.float32) * generator.choice([0, 1], 100_000)
    bn = target.layer(2, dtype=dtype)
    before = target.snapshot(bn)
    y = bn(target.array(x), sample_weight=target.array(weights.astype(np.float32)))
    assert_step(target, bn, before, y, x, weights)


def test_sample_weights_are_accurate_beside_a_large_mean(target: Target) -> None:
    target.require_dtype("float64")
    x, weights = 1e6 + 1e-6 * X.astype(np.float64), np.random.default_rng(18).uniform(1, 2, (6, 4))
    bn = target.layer(3, dtype="float64")
    before = target.snapshot(bn)
    y = bn(target.array(x), sample_weight=target.array(weights))
    assert_step(target, bn, before, y, x, weights)
