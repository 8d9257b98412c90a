"""JAX's lowering for GPUs, without a GPU: its results on the CPU, and the operations that it is lowered to."""

import math

import numpy as np
import pytest
from jax_samples import jax, jnp

import mbn
from mbn_jax.kernels import gpu_sums, passes, primitives

SHAPES = [
    (1, 3),
    (2, 3),
    (31, 2),
    (32, 2),
    (33, 2),
    (961, 2),
    (962, 1),
    (30_785, 2),
    (5, 3, 7),
    (40, 2, 3),
    (3, 2, 1000),
]


@pytest.fixture(autouse=True)
def _in_64_bits():
    """Enable 64-bit numbers, as ``WidePrimitive`` does when it is lowered."""
    with primitives.enable_x64(True):
        yield


def channels_of(x):
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_is_summed_once(shape):
    x = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    one, other = jax.jit(gpu_sums.channel_sums)(x, -2 * x)
    np.testing.assert_array_equal(one, channels_of(x).sum(1))
    np.testing.assert_array_equal(other, -2 * channels_of(x).sum(1))


def moments_of(x, weights=None):
    """Return mean and variance by the kernel for GPUs, in float64."""
    parts = jax.jit(passes._moments_on_gpu)(x, weights)
    mean, rest, unit, var, var_rest, var_unit = (np.asarray(part, np.float64) for part in parts)
    return (mean + rest) * unit, (var + var_rest) * var_unit**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("outlier", [None, 1e9])
@pytest.mark.parametrize("far", [passes.FAR, 500])
def test_moments_agree_with_fsum(rng, monkeypatch, shape, offset, outlier, far):
    monkeypatch.setattr(passes, "FAR", far)
    x = (offset + rng.standard_normal(shape)).astype(np.float32)
    if outlier is not None:
        x[0] = outlier
    mean, var = moments_of(x)
    for c, channel in enumerate(channels_of(x).astype(np.float64)):
        exact = math.fsum(channel) / channel.size
        assert abs(mean[c] - exact) <= max(2.0**-40 * np.mean(abs(channel)), 2.0**-50 * np.max(abs(channel)))
        np.testing.assert_allclose(var[c] * channel.size, math.fsum((channel - exact) ** 2), rtol=2.0**-33)


@pytest.mark.parametrize("far", [passes.FAR, 500])
def test_constant_channels_have_no_variance(monkeypatch, far):
    monkeypatch.setattr(passes, "FAR", far)
    mean, var = moments_of(jnp.full((1100, 2, 3), 0.1, jnp.float32))
    np.testing.assert_array_equal(mean, np.float32(0.1))
    assert not np.any(var)


@pytest.mark.parametrize("outlier", [1e5, 1e12, 1e18])
def test_moments_with_a_huge_first_value_of_tiny_weight_are_accurate(rng, outlier):
    x, weights = rng.standard_normal((50, 1, 100)).astype(np.float32), np.ones((50, 1, 100), np.float32)
    x[0, 0, 0], weights[0, 0, 0] = outlier, 2.0**-60
    mean, var = moments_of(x, weights)
    wide, counts = x.astype(np.float64).ravel(), weights.astype(np.float64).ravel()
    exact = math.fsum(counts * wide) / math.fsum(counts)
    np.testing.assert_allclose(mean, exact, rtol=2.0**-38, atol=2.0**-36)
    np.testing.assert_allclose(var * math.fsum(counts), math.fsum(counts * (wide - exact) ** 2), rtol=2.0**-30)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("masked", [False, True])
def test_step_is_lowered_without_branches_transposes_or_scatters(platform, masked):
    bn = mbn.BatchNorm1d(8, backend="jax")
    x = jax.ShapeDtypeStruct((2048, 8, 1024), "float32")
    mask = {"mask": jax.ShapeDtypeStruct((2048, 1024), "bool")} if masked else {}

    def step(params, state, x, dy, **mask):
        def train(params, x):
            return bn.apply(params, state, x, training=True, **mask)

        y, pullback, state = jax.vjp(train, params, x, has_aux=True)
        return y, state, pullback(dy)

    traced = jax.jit(step).trace(bn.params, bn.state, x, x, **mask)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.reduce" in text
    for operation in ("case", "if", "while", "transpose", "scatter", "custom_call"):
        assert f"stablehlo.{operation}" not in text, operation
