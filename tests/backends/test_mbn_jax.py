"""Requirements of JAX's kernels and border beyond those of the conformance suite."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from jax_samples import NOTHING, OPTIONS, backend, jax, jnp, new_state
from steps import step

import mbn
from mbn.conformance import oracle, ulp
from mbn.contract import Batch, Params, State, Stats
from mbn_jax.integration import compiled_step
from mbn_jax.kernels import channel_sums, pairs, passes, primitives


def exact(value):
    if isinstance(value, pairs.Square):
        return exact(value.pair) * np.asarray(value.unit, np.float64) ** 2
    if isinstance(value, pairs.Scaled):
        return exact(value.pair) * np.asarray(value.unit, np.float64)
    return np.asarray(value.hi, np.float64) + np.asarray(value.lo, np.float64)


def wide_range(rng, size=10_000):
    return (rng.standard_normal(size) * 2.0 ** rng.integers(-20, 20, size)).astype(np.float32)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_sum_is_exact(rng, compiled):
    a, b = wide_range(rng), wide_range(rng)
    two_sum = jax.jit(pairs.two_sum) if compiled else pairs.two_sum
    total, rest = two_sum(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(np.asarray(total), a + b)
    sums = [math.fsum(terms) for terms in zip(a.tolist(), b.tolist(), -np.asarray(total, np.float64), strict=True)]
    np.testing.assert_array_equal(np.asarray(rest), sums)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_prod_is_exact(rng, compiled):
    a, b = wide_range(rng), wide_range(rng)
    two_prod = jax.jit(pairs.two_prod) if compiled else pairs.two_prod
    np.testing.assert_array_equal(exact(two_prod(jnp.asarray(a), jnp.asarray(b))), a.astype(np.float64) * b)


def test_multiply_and_add_of_pairs_is_not_contracted(rng):
    a, b, c = wide_range(rng), wide_range(rng), wide_range(rng)

    @jax.jit
    def multiply_add(a, b, c):
        a, b, c = (pairs.as_pair(value, a.dtype) for value in (a, b, c))
        return pairs.add(pairs.multiply(a, b), c)

    truth = a.astype(np.float64) * b + c
    error = np.abs(exact(multiply_add(*map(jnp.asarray, (a, b, c)))) - truth)
    assert np.max(error / (np.abs(a.astype(np.float64) * b) + np.abs(c))) < 2.0**-44


def test_divide_is_accurate_to_a_pair(rng):
    a = wide_range(rng)
    quotient = jax.jit(lambda a: pairs.divide(pairs.as_pair(a, a.dtype), pairs.as_pair(49.0, a.dtype)))(a)
    np.testing.assert_allclose(exact(quotient), a.astype(np.float64) / 49, rtol=2.0**-44)


def test_add_of_pairs_with_a_constant_is_not_simplified(rng):
    a = rng.uniform(0.0, 1.0, 1000).astype(np.float32)

    @jax.jit
    def one_minus(a):
        return pairs.add(pairs.as_pair(1.0, a.dtype), pairs.as_pair(-a, a.dtype))

    np.testing.assert_array_equal(exact(one_minus(a)), 1 - a.astype(np.float64))


def test_as_pair_keeps_the_digits_of_a_python_float():
    assert exact(pairs.as_pair(0.1, np.dtype("float32"))) == pytest.approx(0.1, rel=2.0**-47)


@pytest.mark.parametrize(
    "shape", [(2, 3), (37, 5), (64, 2), (65, 2), (4099, 3), (200_001, 1), (5, 3, 7), (2, 2, 70_001)]
)
@pytest.mark.parametrize("offset", [0, 1e6])
def test_moments_agree_with_fsum(rng, shape, offset):
    x = (offset + rng.standard_normal(shape)).astype(np.float32)
    count, mean, m2 = backend.kernels.moments(Batch(jnp.asarray(x)))
    channels = np.moveaxis(x, 1, 0).reshape(shape[1], -1).astype(np.float64)
    assert count == channels.shape[1]
    means = np.array([math.fsum(channel) / count for channel in channels])
    sizes = np.mean(np.abs(channels), axis=1)
    assert np.max(np.abs(exact(mean) - means) / sizes) < 2.0**-40
    squares = [math.fsum((channel - mean) ** 2) for channel, mean in zip(channels, means, strict=True)]
    np.testing.assert_allclose(exact(m2) * count, squares, rtol=2.0**-38)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 64, 65, 129, 527, 528, 529, 65_535, 196_613])
@pytest.mark.parametrize("shape", [(-1, 1), (1, 1, -1)])
def test_every_value_is_summed_once(n, shape):
    x = jnp.arange(n, dtype=jnp.float32).reshape(shape)
    with primitives.enable_x64(True):
        (total,) = jax.jit(lambda x: channel_sums.channel_sums(channel_sums.rows(x).astype("float64")))(x)
    assert np.asarray(total) == n * (n - 1) // 2


@pytest.mark.parametrize("n", [2, 3, 1001, 65_537])
def test_constant_channel_is_exactly_the_bias(n):
    x = jnp.broadcast_to(jnp.asarray([0.1, 1e6 + 0.0625], jnp.float32), (n, 2))
    bias = jnp.asarray([0.3, -7.0], jnp.float32)
    y, _, _ = step(backend, x, Params(None, bias), State(None, None, None), **OPTIONS)
    np.testing.assert_array_equal(np.asarray(y), np.broadcast_to(np.asarray(bias), (n, 2)))


@pytest.mark.parametrize("outlier", [1e4, 1e8, 1e12])
def test_results_with_an_outlier_as_first_value_are_within_bounds(rng, outlier):
    x = rng.standard_normal((1000, 3)).astype(np.float32)
    x[0] = outlier
    y, state, _ = step(backend, jnp.asarray(x), NOTHING[0], new_state(3), **OPTIONS)
    truth = oracle.train(x, np.zeros(3), np.ones(3), momentum=0.1, eps=1e-5)
    for actual, expected in (
        (y, truth.y),
        (state.running_mean, truth.running_mean),
        (state.running_var, truth.running_var),
    ):
        assert ulp.error(np.asarray(actual), expected, "float32") <= 4


@pytest.mark.parametrize("outlier", [1e5, 1e12, 1e18])
@pytest.mark.parametrize(("n", "weighted"), [(passes.FAR + 3, False), (5000, True)])
def test_moments_with_a_huge_first_value_are_accurate(rng, n, weighted, outlier):
    x = rng.standard_normal((n, 1)).astype(np.float32)
    x[0] = outlier
    weights = np.ones(n, np.float32)
    if weighted:
        weights[0] = 2.0**-60  # it has almost no weight, and yet it is the first shift
    _, mean, m2 = backend.kernels.moments(Batch(jnp.asarray(x), jnp.asarray(weights) if weighted else None))
    wide, weights = x.astype(np.float64), weights.astype(np.float64)[:, None]
    expected = math.fsum((weights * wide).ravel()) / math.fsum(weights.ravel())
    np.testing.assert_allclose(exact(mean), expected, rtol=2.0**-38, atol=2.0**-36)
    expected = math.fsum((weights * (wide - expected) ** 2).ravel())
    np.testing.assert_allclose(exact(m2) * math.fsum(weights.ravel()), expected, rtol=2.0**-30)


@pytest.mark.parametrize("shape", [(60, 3, 7), (300, 5, 129), (4096, 64, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_bits_do_not_depend_on_the_channel_axis(rng, shape, masked):
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    mask = {"mask": rng.random((shape[0], shape[2])) < 0.9} if masked else {}

    def step(axis):
        bn = mbn.BatchNorm1d(shape[1], backend="jax", axis=axis)

        @jax.jit
        def run(params, x, dy):
            def train(params, x):
                return bn.apply(params, bn.state, x, training=True, **mask)

            y, pullback, state = jax.vjp(train, params, x, has_aux=True)
            return y, state, pullback(dy)

        given = (x, dy) if axis == 1 else (x.swapaxes(1, 2), dy.swapaxes(1, 2))
        y, state, (dparams, dx) = run(bn.params, *given)
        return [y, dx] if axis == 1 else [y.mT, dx.mT], state[:2], dparams

    for one, other in zip(*map(jax.tree.leaves, (step(1), step(-1))), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_dtypes_are_rounded_once(rng, dtype):
    x = (3 + rng.standard_normal((501, 7))).astype(dtype)
    y, state, _ = step(backend, jnp.asarray(x), NOTHING[0], new_state(7), **OPTIONS)
    truth = oracle.train(x, np.zeros(7), np.ones(7), momentum=0.1, eps=1e-5)
    assert y.dtype == x.dtype
    assert ulp.error(np.asarray(y), truth.y, np.dtype(dtype).name) < 0.51
    assert ulp.error(np.asarray(state.running_mean), truth.running_mean, "float32") <= 1


def test_normalize_gives_the_bias_for_zero_variance_and_eps():
    x, mean, bias = jnp.ones((2, 2)), jnp.zeros(2), jnp.asarray([3.0, 4.0])
    y = backend.kernels.normalize(Batch(x), Stats(mean, jnp.asarray([0.0, jnp.nan]), None), Params(None, bias), 0.0)
    np.testing.assert_array_equal(np.asarray(y), [[3, np.nan], [3, np.nan]])


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.0])
def test_lerp_has_about_one_rounding(rng, weight):
    start, end = wide_range(rng), wide_range(rng)
    actual = np.asarray(backend.kernels.lerp(jnp.asarray(start), jnp.asarray(end), weight))
    truth = (1 - weight) * start.astype(np.float64) + weight * end.astype(np.float64)
    ulps = np.abs(actual - truth) / np.spacing(np.abs(truth.astype(np.float32)))
    assert np.max(ulps) < 0.5 + 1e-6


def test_lerp_takes_the_step_of_a_cumulative_average():
    weight = backend.kernels.step(None, jnp.asarray(4), 8, 1)
    np.testing.assert_array_equal(backend.kernels.lerp(jnp.ones(2), jnp.full(2, 5.0), weight), [2, 2])


def test_repeated_steps_keep_dtypes_and_compile_once(rng):
    x, state = jnp.asarray(rng.standard_normal((8, 3)).astype(np.float32)), new_state(3)
    _, state, _ = step(backend, x, NOTHING[0], state, **OPTIONS)
    compiled = compiled_step._cache_size()
    for _ in range(3):
        _, after, _ = step(backend, x, NOTHING[0], state, **OPTIONS)
        assert [(a.dtype, a.weak_type) for a in after] == [(b.dtype, b.weak_type) for b in state]
        state = after
    assert compiled_step._cache_size() == compiled
    assert state.running_mean.dtype == jnp.float32
    assert state.num_batches_tracked == 4


def test_step_with_another_momentum_or_eps_is_not_compiled_again():
    x, state = jnp.ones((8, 3)), new_state(3)
    step(backend, x, NOTHING[0], state, **OPTIONS)
    compiled = compiled_step._cache_size()
    for momentum, eps in ((0.2, 1e-5), (0.1, 0.0), (1.0, 1.0)):
        step(backend, x, NOTHING[0], state, **OPTIONS | {"momentum": momentum, "eps": eps})
    assert compiled_step._cache_size() == compiled


def test_layer_on_a_given_device_can_be_copied_and_pickled():
    bn = mbn.BatchNorm1d(3, backend="jax", device="cpu")
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert twin(jnp.ones((2, 3))).shape == (2, 3)


def test_momentum_none_gives_the_cumulative_average():
    state = new_state(1)
    for value in (1.0, 2.0, 6.0):
        x = jnp.full((4, 1), value)
        _, state, _ = step(backend, x, NOTHING[0], state, **{**OPTIONS, "momentum": None})
    assert state.running_mean[0] == pytest.approx(3.0, rel=1e-6)


def test_traced_step_gives_the_same_bits_and_leaks_no_tracer(rng):
    x, state = jnp.asarray(rng.standard_normal((9, 3, 4)).astype(np.float32)), new_state(3)

    def train(x, state):
        return step(backend, x, NOTHING[0], state, **OPTIONS)

    with jax.checking_leaks():
        traced = jax.jit(train)(x, state)
        batched = jax.vmap(train, in_axes=(0, None))(x[None], state)
    for leaf, other, one in zip(*map(jax.tree.leaves, (train(x, state), traced, batched)), strict=True):
        np.testing.assert_array_equal(leaf, other)
        np.testing.assert_allclose(leaf, one[0], rtol=1e-6, atol=1e-6)


def test_gradient_of_constant_channels_is_zero():
    def loss(x):
        return jnp.sum(step(backend, x, *NOTHING, **{**OPTIONS, "eps": 0.0})[0])

    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((4, 2))), np.zeros((4, 2)))


def test_asarray_copies_host_data():
    host = np.ones(1 << 16, np.float32)
    for device in (None, "cpu"):
        array = backend.asarray(host, device=device)
        host[:] = 2
        assert np.all(np.asarray(array) == 1)
        host[:] = 1


def test_asarray_converts_dtypes():
    assert backend.asarray(np.asarray(3), "int64").dtype == jnp.int32
    assert backend.asarray([1.5, 2]).dtype == jnp.float32
    assert backend.asarray(np.ones(2), "bfloat16").dtype == jnp.bfloat16
    assert backend.asarray(jnp.ones(2), "float16").dtype == jnp.float16


@pytest.mark.parametrize(
    ("x", "dtype"), [(np.ones(2), None), (np.ones(2, np.float32), "float64"), (jnp.ones(2), "float64")]
)
def test_asarray_refuses_float64_and_names_the_switch(x, dtype):
    with pytest.raises(TypeError, match=r"JAX_ENABLE_X64=1.*jax\.config.*float32"):
        backend.asarray(x, dtype)


def test_device_is_named_and_is_none_where_uncommitted():
    cpu = jax.local_devices(backend="cpu")[0]
    for given in (cpu, "cpu", "cpu:0", *backend.capabilities.devices):
        assert backend.device(backend.asarray([1.0], device=given)) is not None
    assert backend.device(backend.asarray([1.0], device=cpu)) == "cpu:0"
    assert backend.device(backend.asarray([1.0])) is None
    assert jax.jit(lambda x: x + (backend.device(x) is None))(1.0) == 2


@pytest.mark.parametrize("device", ["abacus", "cpu:99", "cpu:-1", "cpu:first", 3])
def test_error_for_an_unknown_device_names_the_known_ones(device):
    with pytest.raises(ValueError, match="it has .*cpu"):
        backend.asarray([1.0], device=device)


def test_owns_traced_arrays():
    assert backend.owns(jnp.ones(1))
    assert not backend.owns(np.ones(1))
    jax.jit(lambda x: x if backend.owns(x) else None)(jnp.ones(1)).block_until_ready()


X64 = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from mbn.conformance import derivatives, oracle, ulp
from mbn.contract import Params, State
from mbn_jax.backend import JaxBackend
from steps import step

backend, rng, errors = JaxBackend(), np.random.default_rng(0), {}
for dtype in ("float64", "float32"):
    for offset in (0, 1e6):
        x = (offset + rng.standard_normal((1001, 3))).astype(dtype)
        state = State(*map(backend.asarray, (np.zeros(3), np.ones(3), np.asarray(0))))
        y, state, _ = step(backend, backend.asarray(x), Params(None, None), state, training=True)
        assert (y.dtype, state.running_var.dtype, state.num_batches_tracked.dtype) == (dtype, "float64", "int64")
        truth = oracle.train(x, np.zeros(3), np.ones(3), momentum=0.1, eps=1e-5)
        errors[f"{dtype} {offset}"] = [
            ulp.error(np.asarray(y), truth.y, dtype),
            float(np.max(np.abs(np.asarray(state.running_mean) / truth.running_mean.hi - 1))) if offset else 0.0,
            float(np.max(np.abs(np.asarray(state.running_var) / truth.running_var.hi - 1))),
        ]
assert "float64" in backend.capabilities.dtypes
slopes = {}
direction, dy = rng.standard_normal((2, 8, 3))
x = 100 + rng.standard_normal((8, 3))
for weights in (None, np.array([1, 2, 0, 0.5, 1, 1, 3, 0])):
    w = None if weights is None else backend.asarray(weights)

    def gradient(x):
        def loss(x):
            options = {"training": True, "momentum": 0.1, "eps": 1e-5, "correction": 1, "weights": w}
            y, _, _ = step(backend, x, Params(None, None), State(None, None, None), **options)
            return jnp.sum(dy * y)

        return jax.grad(loss)(x)

    def bend(x):
        return jax.grad(lambda x: jnp.vdot(jax.grad(lambda x: jnp.vdot(gradient(x), direction))(x), direction))(x)

    truth = derivatives.along(x, direction, dy, eps=1e-5, weights=weights, order=2)
    for order, function in ((0, gradient), (2, bend)):
        error = np.max(np.abs(np.asarray(jax.jit(function)(backend.asarray(x))) - truth[order].dx))
        slopes[f"{order + 1} {weights is None}"] = float(error / np.max(np.abs(truth[order].dx)))
print(json.dumps([errors, slopes]))
"""


def test_results_with_64_bit_numbers_are_accurate_to_float64():
    # In another process, since the switch is global.
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", X64]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors, slopes = json.loads(done.stdout)
    assert max(slopes.values()) < 1e-12, slopes
    for dtype_and_offset, (output, mean, var) in errors.items():
        assert output <= 4, dtype_and_offset
        # Statistics of float32 values are pairs of float32, in a float64 layer too.
        assert max(mean, var) < (1e-14 if dtype_and_offset.startswith("float64") else 2.0**-40), dtype_and_offset


def test_from_dlpack_shares_memory_or_refuses():
    torch = pytest.importorskip("torch", reason="another framework's arrays come by DLPack")
    tensor = torch.arange(96.0).reshape(8, 12)
    for given in (tensor, tensor.T, tensor.bfloat16(), tensor > 3):
        array = backend.from_dlpack(given)
        assert array.unsafe_buffer_pointer() == given.data_ptr()
        np.testing.assert_array_equal(np.asarray(array, np.float32), given.float().numpy())
        np.testing.assert_array_equal(jax.jit(lambda x: x + 0 * x)(array), array)
    assert backend.from_dlpack(tensor.long()).dtype == jnp.int32
    with pytest.raises(TypeError, match="JAX has no float64"):
        backend.from_dlpack(tensor.double())
    with pytest.raises(RuntimeError, match="compact"):
        backend.from_dlpack(tensor[::2])
    _, traced = jax.jit(lambda x: (x, backend.from_dlpack(tensor)))(1.0)
    np.testing.assert_array_equal(traced, tensor.numpy())


def test_from_dlpack_refuses_unaligned_memory(monkeypatch):
    torch = pytest.importorskip("torch", reason="another framework's arrays come by DLPack")
    monkeypatch.setattr(type(jnp.zeros(4)), "unsafe_buffer_pointer", lambda view: 4 + 0 * view.ndim)
    with pytest.raises(BufferError, match="multiple of 16 bytes"):
        backend.from_dlpack(torch.zeros(4))


def test_subnormal_standard_deviation_gives_no_nan():
    x = jnp.asarray(3e-37 * (1 + 1e-4 * np.random.default_rng(3).standard_normal((17, 2))), jnp.float32)
    y = mbn.BatchNorm1d(2, eps=0.0, backend="jax")(x)
    assert jnp.isfinite(y).all()
