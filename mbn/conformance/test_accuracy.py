"""Accuracy: how far results may be from the truth, on numbers that tempt an algorithm to lose digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbn.conformance import oracle, strategies, ulp
from mbn.conformance.target import Target, configured
from mbn.contract import layer_dtype


@given(data=st.data())
def test_training_step(target: Target, data: st.DataObject) -> None:
    batch = data.draw(strategies.batches(target.capabilities.dtypes))
    eps = data.draw(st.sampled_from(strategies.EPS))
    momentum = data.draw(st.sampled_from(strategies.MOMENTA))
    correction = data.draw(st.sampled_from([0, 1]))
    bn = target.layer(batch.x.shape[1], eps=eps, momentum=momentum, correction=correction, dtype=batch.layer_dtype)
    held = target.snapshot(configured(bn, seed=data.draw(st.integers(0, 99))))
    del held["num_batches_tracked"]
    exact = oracle.train(batch.x, **held, momentum=momentum, eps=eps, correction=correction)
    target.assert_output(bn(target.array(batch.x)), exact.y, batch.dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, batch.layer_dtype)
    target.assert_statistic(bn.running_var, exact.running_var, batch.layer_dtype)


@given(data=st.data())
def test_evaluation(target: Target, data: st.DataObject) -> None:
    batch = data.draw(strategies.batches(target.capabilities.dtypes))
    eps = data.draw(st.sampled_from(strategies.EPS))
    affine = data.draw(st.booleans())
    bn = target.layer(batch.x.shape[1], eps=eps, affine=affine, dtype=batch.layer_dtype).eval()
    configured(bn, seed=data.draw(st.integers(0, 99)))
    bn.running_mean = target.numpy(bn.running_mean) + batch.x.astype(np.float64).mean()
    held = target.snapshot(bn)
    del held["num_batches_tracked"]
    exact = oracle.evaluate(batch.x, **held, eps=eps)
    target.assert_output(bn(target.array(batch.x)), exact, batch.dtype)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(4096, 64), (64, 16, 257), (2, 8)])
def test_float32_with_a_large_mean(target: Target, shape: tuple[int, ...], offset: float) -> None:
    x = (offset + np.random.default_rng(11).standard_normal(shape)).astype(np.float32)
    bn = target.layer(shape[1], momentum=1.0)
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    exact = oracle.train(x, zeros, ones, momentum=1.0, eps=1e-5)
    y = target.numpy(bn(target.array(x)))
    assert np.abs(y - exact.y.hi).max() <= 1e-6
    assert np.abs(target.numpy(bn.running_mean) / exact.running_mean.hi - 1).max() <= 2.4e-7
    assert np.abs(target.numpy(bn.running_var) / exact.running_var.hi - 1).max() <= 2.4e-7


@pytest.mark.parametrize(
    ("dtype", "constant"),
    [
        ("float16", 0.1),
        ("float16", 6e4),
        ("bfloat16", -1e10),
        ("float32", 0.1),
        ("float32", -1e10),
        ("float64", 0.1),
        ("float64", 1e10 / 3),
    ],
)
def test_constant_channel_gives_exactly_the_bias(target: Target, dtype: str, constant: float) -> None:
    target.require_dtype(dtype)
    bn = target.layer(3, momentum=1.0, dtype=layer_dtype(dtype))
    bn.bias = np.array([0.0, 0.5, -2.0])
    x = np.full((101, 3, 7), constant).astype(dtype)
    y = target.numpy(bn(target.array(x))).astype(np.float64)
    np.testing.assert_array_equal(y, np.broadcast_to(np.array([0.0, 0.5, -2.0])[:, None], x.shape))
    np.testing.assert_array_equal(target.numpy(bn.running_mean), x[0, :, 0].astype(layer_dtype(dtype)))
    np.testing.assert_array_equal(target.numpy(bn.running_var), np.zeros(3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_computed_in_float32(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = (100 + np.random.default_rng(4).standard_normal((512, 3))).astype(dtype)
    bn = target.layer(3, momentum=1.0)
    exact = oracle.train(x, np.zeros(3), np.ones(3), momentum=1.0, eps=1e-5)
    target.assert_output(bn(target.array(x)), exact.y, dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, "float32")
    target.assert_statistic(bn.running_var, exact.running_var, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_channels(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = (1e3 + np.random.default_rng(5).standard_normal((300_000, 2))).astype(dtype)
    bn = target.layer(2, momentum=1.0, dtype=dtype)
    exact = oracle.train(x, np.zeros(2), np.ones(2), momentum=1.0, eps=1e-5)
    target.assert_output(bn(target.array(x)), exact.y, dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, dtype)
    target.assert_statistic(bn.running_var, exact.running_var, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_first_value_far_from_the_rest(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = np.random.default_rng(6).standard_normal((4096, 3)).astype(dtype)
    x[0] = [1e6, -1e6, 1e3]
    bn = target.layer(3, momentum=1.0, dtype=dtype)
    exact = oracle.train(x, np.zeros(3), np.ones(3), momentum=1.0, eps=0.0)
    bn.eps = 0.0
    target.assert_output(bn(target.array(x)), exact.y, dtype)
    target.assert_statistic(bn.running_var, exact.running_var, dtype)
    assert ulp.error(target.numpy(bn.running_mean), exact.running_mean, dtype) <= ulp.STATISTICS_BOUNDS[dtype]


def test_same_bits_on_every_run(target: Target) -> None:
    x = np.random.default_rng(8).normal(10, 3, (1000, 33)).astype(np.float32)
    first = target.layer(33)
    expected = target.numpy(first(target.array(x)))
    for _ in range(3):
        bn = target.layer(33)
        np.testing.assert_array_equal(target.numpy(bn(target.array(x))), expected)
        np.testing.assert_array_equal(target.numpy(bn.running_var), target.numpy(first.running_var))
