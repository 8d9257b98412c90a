"""Semantics: the results of the layer, on numbers that a person can check."""

import numpy as np
import pytest

import mbn
from mbn.conformance.target import Target, assert_same, configured

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
SEQUENCES = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
NOISE = np.random.default_rng(7).normal(3, 2, (8, 4, 5)).astype(np.float32)


def test_training_matches_the_rows_example(target: Target) -> None:
    bn = target.layer(4, momentum=1)
    np.testing.assert_array_equal(target.numpy(bn.running_mean), np.zeros(4))
    np.testing.assert_array_equal(target.numpy(bn.running_var), np.ones(4))
    y = target.numpy(bn(target.array(ROWS)))
    np.testing.assert_allclose(y, np.repeat([[-1.2247], [0], [1.2247]], 4, axis=1), atol=5e-5)
    np.testing.assert_allclose(target.numpy(bn.running_mean), [4, 5, 6, 7], rtol=2.4e-7)
    np.testing.assert_allclose(target.numpy(bn.running_var), [16, 16, 16, 16], rtol=2.4e-7)


def test_training_matches_the_sequences_example(target: Target) -> None:
    bn = target.layer(4, eps=0.0, momentum=1.0)
    y = target.numpy(bn(target.array(SEQUENCES)))
    np.testing.assert_allclose(y[0, 0], [-1.3422, -1.2812, -1.2202, -1.1592, -1.0982], atol=5e-5)
    np.testing.assert_allclose(target.numpy(bn.running_mean), [22, 27, 32, 37], rtol=2.4e-7)
    np.testing.assert_allclose(target.numpy(bn.running_var), np.full(4, 287.857142857), rtol=2.4e-7)


def test_evaluation_matches_the_set_statistics_example(target: Target) -> None:
    bn = target.layer(4, eps=0.0, momentum=1.0)
    bn(target.array(SEQUENCES))
    bn.running_mean = 10
    bn.running_var = 1
    y = target.numpy(bn.eval()(target.array(SEQUENCES)))
    np.testing.assert_array_equal(y, SEQUENCES - 10)


def test_output_uses_the_biased_variance(target: Target) -> None:
    y = target.numpy(target.layer(1, eps=0.0)(target.array(np.array([[0], [2]], np.float32))))
    np.testing.assert_allclose(y, [[-1], [1]], rtol=1e-6)  # the unbiased variance would give -0.707 and 0.707


def test_running_var_is_unbiased(target: Target) -> None:
    bn = target.layer(1, momentum=1.0)
    bn(target.array(np.array([[0], [2]], np.float32)))
    np.testing.assert_allclose(target.numpy(bn.running_var), [2], rtol=2.4e-7)


def test_correction_0_makes_running_var_biased(target: Target) -> None:
    bn = target.layer(1, momentum=1.0, correction=0)
    bn(target.array(np.array([[0], [2]], np.float32)))
    np.testing.assert_allclose(target.numpy(bn.running_var), [1], rtol=2.4e-7)


def test_eps_is_added_to_the_variance(target: Target) -> None:
    y = target.numpy(target.layer(1, eps=3.0)(target.array(np.array([[0], [2]], np.float32))))
    np.testing.assert_allclose(y, [[-0.5], [0.5]], rtol=1e-6)  # sqrt(1 + 3) = 2; sqrt(1) + 3 would be 4


def test_momentum_weighs_the_new_value(target: Target) -> None:
    bn = target.layer(1, momentum=0.25)
    bn(target.array(np.array([[2], [4]], np.float32)))
    np.testing.assert_allclose(target.numpy(bn.running_mean), [0.25 * 3], rtol=2.4e-7)
    np.testing.assert_allclose(target.numpy(bn.running_var), [0.75 * 1 + 0.25 * 2], rtol=2.4e-7)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_momentum_0_keeps_the_statistics(target: Target, poison: float) -> None:
    bn = configured(target.layer(4, momentum=0.0), seed=5)
    before = target.snapshot(bn)
    x = NOISE.copy()
    x[2, 1, 3] = poison
    bn(target.array(x))
    bn.num_batches_tracked = int(before["num_batches_tracked"])
    assert_same(before, target.snapshot(bn))


def test_momentum_none_averages_all_batches(target: Target) -> None:
    bn = target.layer(4, momentum=None)
    batches = np.random.default_rng(3).normal(5, 2, (4, 6, 4)).astype(np.float32)
    for batch in batches:
        bn(target.array(batch))
    exact = batches.astype(np.float64)
    np.testing.assert_allclose(target.numpy(bn.running_mean), exact.mean(axis=(0, 1)), rtol=6e-7)
    np.testing.assert_allclose(target.numpy(bn.running_var), exact.var(axis=1, ddof=1).mean(axis=0), rtol=6e-7)


def test_evaluation_uses_the_running_statistics(target: Target) -> None:
    bn = target.layer(1, eps=0.0).eval()
    bn.running_mean = 1
    bn.running_var = 4
    y = target.numpy(bn(target.array(np.array([[1], [5]], np.float32))))
    np.testing.assert_array_equal(y, [[0], [2]])


def test_evaluation_takes_one_value_per_channel(target: Target) -> None:
    y = target.numpy(target.layer(2, eps=0.0).eval()(target.array(np.array([[1, 5]], np.float32))))
    np.testing.assert_array_equal(y, [[1, 5]])


def test_weight_scales_and_bias_shifts(target: Target) -> None:
    bn = target.layer(2, eps=0.0).eval()
    bn.weight = np.array([2, 3])
    bn.bias = np.array([10, 20])
    y = target.numpy(bn(target.array(np.array([[1, 2]], np.float32))))
    np.testing.assert_array_equal(y, [[12, 26]])


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ({}, ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]),
        ({"bias": False}, ["weight", "running_mean", "running_var", "num_batches_tracked"]),
        ({"affine": False}, ["running_mean", "running_var", "num_batches_tracked"]),
        ({"track_running_stats": False}, ["weight", "bias"]),
    ],
)
def test_arguments_decide_which_entries_a_layer_has(
    target: Target, arguments: dict[str, bool], keys: list[str]
) -> None:
    bn = target.layer(4, **arguments)
    plain = target.layer(4)
    np.testing.assert_array_equal(
        target.numpy(bn(target.array(NOISE))), target.numpy(plain(target.array(NOISE))), strict=True
    )
    assert list(bn.state_dict()) == keys
    assert len(list(bn.parameters())) == len({"weight", "bias"} & set(keys))


def test_without_running_statistics_evaluation_uses_the_batch(target: Target) -> None:
    bn = target.layer(4, track_running_stats=False)
    in_training = target.numpy(bn(target.array(NOISE)))
    np.testing.assert_array_equal(target.numpy(bn.eval()(target.array(NOISE))), in_training)
    assert bn.running_mean is None
    assert bn.num_batches_tracked is None


def test_channels_last_computes_the_same_as_channels_first(target: Target) -> None:
    last, first = target.layer(4, axis=-1), target.layer(4)
    y = target.numpy(last(target.array(NOISE.swapaxes(1, 2))))
    np.testing.assert_array_equal(y.swapaxes(1, 2), target.numpy(first(target.array(NOISE))))
    assert_same(target.snapshot(first), target.snapshot(last))
    rows = NOISE[:, :, 0]
    np.testing.assert_array_equal(
        target.numpy(last.eval()(target.array(rows))), target.numpy(first.eval()(target.array(rows)))
    )


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (3, 4, 0)])
def test_empty_batch_keeps_the_statistics_and_counts(target: Target, shape: tuple[int, ...]) -> None:
    bn = configured(target.layer(4), seed=1)
    before = target.snapshot(bn)
    y = target.numpy(bn(target.array(np.zeros(shape, np.float32))))
    assert y.shape == shape
    assert y.dtype == np.float32
    assert int(bn.num_batches_tracked) == int(before["num_batches_tracked"]) + 1  # as torch counts
    bn.num_batches_tracked = int(before["num_batches_tracked"])
    assert_same(before, target.snapshot(bn))
    assert target.numpy(bn.eval()(target.array(np.zeros(shape, np.float32)))).shape == shape
    assert_same(before, target.snapshot(bn))


def test_batches_are_counted_in_training_alone(target: Target) -> None:
    bn = target.layer(4)
    for expected in (1, 2):
        bn(target.array(NOISE))
        assert int(bn.num_batches_tracked) == expected
    bn.eval()(target.array(NOISE))
    assert int(bn.num_batches_tracked) == 2


@pytest.mark.parametrize("training", [True, False])
def test_zero_variance_and_eps_0_give_the_bias(target: Target, *, training: bool) -> None:
    bn = target.layer(2, eps=0.0).train(training)
    bn.bias = np.array([0.5, -2])
    if not training:
        bn.running_mean = 7
        bn.running_var = 0
    y = target.numpy(bn(target.array(np.full((3, 2), 5, np.float32))))
    np.testing.assert_array_equal(y, np.tile(np.array([0.5, -2], np.float32), (3, 1)))


def test_nan_stays_in_its_channel(target: Target) -> None:
    poisoned = NOISE.copy()
    poisoned[2, 1, 3] = np.nan
    bn, clean = target.layer(4), target.layer(4)
    y, expected = target.numpy(bn(target.array(poisoned))), target.numpy(clean(target.array(NOISE)))
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(target.numpy(bn.running_mean)[1])
    assert np.isnan(target.numpy(bn.running_var)[1])
    others = [0, 2, 3]
    np.testing.assert_array_equal(y[:, others], expected[:, others])


def test_frozen_layer_ignores_training_mode(target: Target) -> None:
    bn = configured(target.layer(4), seed=2)
    before = target.snapshot(bn)
    expected = target.numpy(bn.eval()(target.array(NOISE)))
    np.testing.assert_array_equal(target.numpy(bn.freeze().train()(target.array(NOISE))), expected)
    assert_same(before, target.snapshot(bn))
    bn.unfreeze()(target.array(NOISE))
    assert int(bn.num_batches_tracked) == int(before["num_batches_tracked"]) + 1


def test_number_of_features_comes_from_the_first_input(target: Target) -> None:
    lazy, plain = target.layer(None), target.layer(4)
    np.testing.assert_array_equal(
        target.numpy(lazy(target.array(NOISE))), target.numpy(plain(target.array(NOISE))), strict=True
    )
    assert lazy.num_features == 4
    assert_same(target.snapshot(plain), target.snapshot(lazy))


@pytest.mark.parametrize("training", [True, False])
def test_apply_equals_a_call_and_leaves_the_layer_unchanged(target: Target, *, training: bool) -> None:
    bn = configured(target.layer(4), seed=3).train(training)
    before = target.snapshot(bn)
    y, state = bn.apply(bn.params, bn.state, target.array(NOISE), training=training)
    assert_same(before, target.snapshot(bn))
    np.testing.assert_array_equal(target.numpy(y), target.numpy(bn(target.array(NOISE))), strict=True)
    for given, own in zip(state, bn.state, strict=True):
        np.testing.assert_array_equal(target.numpy(given), target.numpy(own), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_the_layer(target: Target, *, training: bool) -> None:
    bn = configured(target.layer(4, momentum=0.3, eps=1e-3), seed=4).train(training)
    arguments = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    result = mbn.functional.batch_norm(target.array(NOISE), *arguments, training, 0.3, 1e-3, backend=target.backend)
    np.testing.assert_array_equal(target.numpy(result.output), target.numpy(bn(target.array(NOISE))), strict=True)
    np.testing.assert_array_equal(target.numpy(result.running_mean), target.numpy(bn.running_mean), strict=True)
    np.testing.assert_array_equal(target.numpy(result.running_var), target.numpy(bn.running_var), strict=True)


def test_apply_accepts_host_data(target: Target) -> None:
    bn = configured(target.layer(4, momentum=None), seed=3)
    host = bn.state._replace(**{key: target.numpy(value) for key, value in bn.state._asdict().items()})
    y, state = bn.apply(bn.params, host._replace(num_batches_tracked=3), NOISE, training=True)
    np.testing.assert_array_equal(target.numpy(y), target.numpy(bn(target.array(NOISE))), strict=True)
    for given, own in zip(state, bn.state, strict=True):
        np.testing.assert_array_equal(target.numpy(given), target.numpy(own), strict=True)


def test_batch_norm_needs_no_statistics_in_training(target: Target) -> None:
    result = mbn.functional.batch_norm(target.array(NOISE), training=True, backend=target.backend)
    plain = target.layer(4, affine=False)
    np.testing.assert_array_equal(target.numpy(result.output), target.numpy(plain(target.array(NOISE))), strict=True)
    assert result.running_mean is None
    assert result.running_var is None
