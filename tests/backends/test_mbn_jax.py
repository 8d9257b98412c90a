"""What JAX's kernels and border are required to do beyond what the conformance suite asks of every backend."""

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

import mbn
from mbn.conformance import derivatives, oracle, ulp
from mbn.state import Params, State

jax = pytest.importorskip("jax")
jnp = jax.numpy

from mbn_jax import pairs  # noqa: E402 - without JAX there is nothing to import
from mbn_jax.backend import JaxBackend, _batch_norm  # noqa: E402

OPTIONS = {"training": True, "momentum": 0.1, "eps": 1e-5, "correction": 1}
NOTHING = Params(None, None), State(None, None, None)


@pytest.fixture
def backend():
    return JaxBackend()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def new_state(num_features):
    return State(jnp.zeros(num_features), jnp.ones(num_features), jnp.asarray(0))


def exact(pair):
    return np.asarray(pair.hi, np.float64) + np.asarray(pair.lo, np.float64)


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


def test_products_stay_exact_where_their_sum_could_be_contracted(rng):
    a, b, c = wide_range(rng), wide_range(rng), wide_range(rng)

    @jax.jit
    def multiply_add(a, b, c):
        a, b, c = (pairs.as_pair(value, a.dtype) for value in (a, b, c))
        return pairs.add(pairs.multiply(a, b), c)

    truth = a.astype(np.float64) * b + c
    error = np.abs(exact(multiply_add(*map(jnp.asarray, (a, b, c)))) - truth)
    assert np.max(error / (np.abs(a.astype(np.float64) * b) + np.abs(c))) < 2.0**-44


def test_division_is_exact_to_a_pair(rng):
    a = wide_range(rng)
    quotient = jax.jit(lambda a: pairs.divide(pairs.as_pair(a, a.dtype), pairs.as_pair(49.0, a.dtype)))(a)
    np.testing.assert_allclose(exact(quotient), a.astype(np.float64) / 49, rtol=2.0**-44)


def test_constants_do_not_tempt_the_compiler(rng):
    a = rng.uniform(0.0, 1.0, 1000).astype(np.float32)

    @jax.jit
    def one_minus(a):
        return pairs.add(pairs.as_pair(1.0, a.dtype), pairs.as_pair(-a, a.dtype))

    np.testing.assert_array_equal(exact(one_minus(a)), 1 - a.astype(np.float64))


def test_floats_keep_what_float32_would_round_away():
    assert exact(pairs.as_pair(0.1, np.dtype("float32"))) == pytest.approx(0.1, rel=2.0**-47)


@pytest.mark.parametrize(
    "shape", [(2, 3), (37, 5), (64, 2), (65, 2), (4099, 3), (200_001, 1), (5, 3, 7), (2, 2, 70_001)]
)
@pytest.mark.parametrize("offset", [0, 1e6])
def test_moments_against_fsum(backend, rng, shape, offset):
    x = (offset + rng.standard_normal(shape)).astype(np.float32)
    count, mean, m2 = backend.moments(jnp.asarray(x))
    channels = np.moveaxis(x, 1, 0).reshape(shape[1], -1).astype(np.float64)
    assert count == channels.shape[1]
    means = np.array([math.fsum(channel) / count for channel in channels])
    sizes = np.mean(np.abs(channels), axis=1)
    assert np.max(np.abs(exact(mean) - means) / sizes) < 2.0**-40
    squares = [math.fsum((channel - mean) ** 2) for channel, mean in zip(channels, means, strict=True)]
    np.testing.assert_allclose(exact(m2), squares, rtol=2.0**-38)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 129, pairs.BLOCK - 1, 3 * pairs.BLOCK + 5])
@pytest.mark.parametrize("shape", [(-1, 1), (1, 1, -1)])
def test_every_value_is_summed_once(n, shape):
    x = jnp.arange(n, dtype=jnp.float32).reshape(shape)
    total = jax.jit(lambda x: pairs.channel_sums(lambda values: pairs.as_pair(values, x.dtype), x))(x)
    assert exact(total) == n * (n - 1) // 2


@pytest.mark.parametrize("n", [2, 3, 1001, 65_537])
def test_constant_channel_is_exactly_the_bias(backend, n):
    x = jnp.broadcast_to(jnp.asarray([0.1, 1e6 + 0.0625], jnp.float32), (n, 2))
    bias = jnp.asarray([0.3, -7.0], jnp.float32)
    y, _ = backend.batch_norm(x, Params(None, bias), State(None, None, None), **OPTIONS)
    np.testing.assert_array_equal(np.asarray(y), np.broadcast_to(np.asarray(bias), (n, 2)))


@pytest.mark.parametrize("outlier", [1e4, 1e8, 1e12])
def test_outlier_as_the_first_value(backend, rng, outlier):
    x = rng.standard_normal((1000, 3)).astype(np.float32)
    x[0] = outlier
    y, state = backend.batch_norm(jnp.asarray(x), NOTHING[0], new_state(3), **OPTIONS)
    truth = oracle.train(x, np.zeros(3), np.ones(3), momentum=0.1, eps=1e-5)
    for actual, expected in (
        (y, truth.y),
        (state.running_mean, truth.running_mean),
        (state.running_var, truth.running_var),
    ):
        assert ulp.error(np.asarray(actual), expected, "float32") <= 4


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_dtypes_are_rounded_once(backend, rng, dtype):
    x = (3 + rng.standard_normal((501, 7))).astype(dtype)
    y, state = backend.batch_norm(jnp.asarray(x), NOTHING[0], new_state(7), **OPTIONS)
    truth = oracle.train(x, np.zeros(7), np.ones(7), momentum=0.1, eps=1e-5)
    assert y.dtype == x.dtype
    assert ulp.error(np.asarray(y), truth.y, np.dtype(dtype).name) < 0.51
    assert ulp.error(np.asarray(state.running_mean), truth.running_mean, "float32") <= 1


def test_no_variance_and_no_eps_is_the_bias_and_nan_stays_nan(backend):
    x, mean, bias = jnp.ones((2, 2)), jnp.zeros(2), jnp.asarray([3.0, 4.0])
    y = backend.normalize(x, mean, jnp.asarray([0.0, jnp.nan]), None, bias, 0.0)
    np.testing.assert_array_equal(np.asarray(y), [[3, np.nan], [3, np.nan]])


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.0])
def test_lerp_rounds_about_once(backend, rng, weight):
    start, end = wide_range(rng), wide_range(rng)
    actual = np.asarray(backend.lerp(jnp.asarray(start), jnp.asarray(end), weight))
    truth = (1 - weight) * start.astype(np.float64) + weight * end.astype(np.float64)
    ulps = np.abs(actual - truth) / np.spacing(np.abs(truth.astype(np.float32)))
    assert np.max(ulps) < 0.5 + 1e-6


def test_lerp_takes_steps(backend):
    weight = backend.step(None, jnp.asarray(4), 8, 1)
    np.testing.assert_array_equal(backend.lerp(jnp.ones(2), jnp.full(2, 5.0), weight), [2, 2])


def test_dtypes_are_stable_and_nothing_is_compiled_twice(backend, rng):
    x, state = jnp.asarray(rng.standard_normal((8, 3)).astype(np.float32)), new_state(3)
    _, state = backend.batch_norm(x, NOTHING[0], state, **OPTIONS)
    compiled = _batch_norm._cache_size()
    for _ in range(3):
        _, after = backend.batch_norm(x, NOTHING[0], state, **OPTIONS)
        assert [(a.dtype, a.weak_type) for a in after] == [(b.dtype, b.weak_type) for b in state]
        state = after
    assert _batch_norm._cache_size() == compiled
    assert state.running_mean.dtype == jnp.float32
    assert state.num_batches_tracked == 4


def test_another_momentum_or_eps_compiles_nothing(backend):
    x, state = jnp.ones((8, 3)), new_state(3)
    backend.batch_norm(x, NOTHING[0], state, **OPTIONS)
    compiled = _batch_norm._cache_size()
    for momentum, eps in ((0.2, 1e-5), (0.1, 0.0), (1.0, 1.0)):
        backend.batch_norm(x, NOTHING[0], state, **OPTIONS | {"momentum": momentum, "eps": eps})
    assert _batch_norm._cache_size() == compiled


def test_layers_on_a_device_of_their_own_are_copied():
    bn = mbn.BatchNorm1d(3, backend="jax", device="cpu")
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):  # noqa: S301 - its own
        assert twin(jnp.ones((2, 3))).shape == (2, 3)


def test_cumulative_average(backend):
    state = new_state(1)
    for value in (1.0, 2.0, 6.0):
        x = jnp.full((4, 1), value)
        _, state = backend.batch_norm(x, NOTHING[0], state, **{**OPTIONS, "momentum": None})
    assert state.running_mean[0] == pytest.approx(3.0, rel=1e-6)


def test_traced_calls_give_the_same_bits_and_leak_nothing(backend, rng):
    x, state = jnp.asarray(rng.standard_normal((9, 3, 4)).astype(np.float32)), new_state(3)

    def train(x, state):
        return backend.batch_norm(x, NOTHING[0], state, **OPTIONS)

    with jax.checking_leaks():
        traced = jax.jit(train)(x, state)
        batched = jax.vmap(train, in_axes=(0, None))(x[None], state)
    for leaf, other, one in zip(*map(jax.tree.leaves, (train(x, state), traced, batched)), strict=True):
        np.testing.assert_array_equal(leaf, other)
        np.testing.assert_allclose(leaf, one[0], rtol=1e-6, atol=1e-6)


def test_gradient_is_finite_where_nothing_varies(backend):
    def loss(x):
        return jnp.sum(backend.batch_norm(x, *NOTHING, **{**OPTIONS, "eps": 0.0})[0])

    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((4, 2))), np.zeros((4, 2)))


# Transformations.


def new_layer(**options):
    return mbn.BatchNorm1d(3, backend="jax", **options)


def batches(rng, *shape):
    return jnp.asarray(rng.standard_normal((*shape, 8, 3)), jnp.float32)


def holds_values(tree):
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def assert_same(actual, expected, tolerance=0.0):
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def relative_error(actual, truth):
    return np.max(np.abs(np.asarray(actual, np.float64) - truth)) / np.max(np.abs(truth))


@jax.jit
def train_step(bn, x):
    y = bn(x)
    return bn, y


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_jitted_step_takes_and_returns_the_layer(rng, momentum):
    bn, twin = new_layer(momentum=momentum), new_layer(momentum=momentum)
    for count, x in enumerate(batches(rng, 4), 1):
        bn, y = train_step(bn, x)
        if count == 2:
            compiled = train_step._cache_size(), _batch_norm._cache_size()
        assert_same((bn, y), (twin, twin(x)))
    assert (train_step._cache_size(), _batch_norm._cache_size()) == compiled
    assert bn.num_batches_tracked == 4


def test_a_jitted_step_may_set_what_the_layer_holds(rng):
    @jax.jit
    def step(bn, x):
        bn(x)
        bn.weight = bn.weight * 2
        bn.bias = 3
        bn.running_mean = 0 * bn.running_mean
        bn.num_batches_tracked = bn.num_batches_tracked + 4
        return bn

    bn = step(mbn.BatchNorm1d(3, backend="jax"), jnp.asarray(rng.standard_normal((8, 3)), jnp.float32))
    assert (bn.weight.tolist(), bn.bias.tolist(), bn.running_mean.tolist()) == ([2] * 3, [3] * 3, [0] * 3)
    assert int(bn.num_batches_tracked) == 5


def test_layers_are_pytrees():
    bn = new_layer()
    paths, tree = jax.tree.flatten_with_path(bn)
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [
        ".params.weight",
        ".params.bias",
        ".state.running_mean",
        ".state.running_var",
        ".state.num_batches_tracked",
    ]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, bn)
    np.testing.assert_array_equal(doubled.running_var, 2 * bn.running_var)
    assert repr(jax.tree.unflatten(tree, [leaf for _, leaf in paths])) == repr(bn)
    assert jax.tree.structure(bn.eval()) != tree
    assert jax.tree.structure(bn.train()) == tree


def test_mode_and_settings_are_static(rng):
    bn, x = new_layer(), batches(rng)
    bn, _ = train_step(bn, x)
    after, y = train_step(bn.eval(), x)
    assert not after.training
    assert_same(y, bn(x))
    assert after.num_batches_tracked == 1


CLOSURES = {
    "jit": lambda bn, x: jax.jit(bn)(x),
    "jit with a mask": lambda bn, x: jax.jit(lambda x: bn(x, mask=x[:, 0] > 0))(x),
    "jit of vjp": lambda bn, x: jax.jit(lambda x: bn.vjp(x)[0])(x),
    "jit of grad": lambda bn, x: jax.jit(jax.grad(lambda x: bn(x).sum()))(x),
    "vmap": lambda bn, x: jax.vmap(bn)(x[None]),
    "scan": lambda bn, x: jax.lax.scan(lambda carry, x: (carry, bn(x)), 0, x[None]),
    "checkpoint": lambda bn, x: jax.checkpoint(bn)(x),
}


@pytest.mark.parametrize("closure", CLOSURES)
def test_training_layers_that_are_closed_over_are_refused(rng, closure):
    bn, x = new_layer(), batches(rng)
    before = bn.state
    with pytest.raises(RuntimeError) as caught:
        CLOSURES[closure](bn, x)
    assert "y, state = bn.apply(bn.params, bn.state, x, training=True)" in str(caught.value)
    assert "def step(bn, x):" in str(caught.value)
    assert bn.state is before
    bn(x)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("closure", ["jit", "vmap", "scan", "checkpoint"])
def test_so_are_those_that_belong_to_an_outer_trace_alone(rng, closure):
    @jax.jit
    def step(bn, x):
        before = bn.state
        with pytest.raises(RuntimeError, match="closed over"):
            CLOSURES[closure](bn, x)
        assert bn.state is before
        return bn, bn(x)

    bn, _ = step(new_layer(), batches(rng))
    assert bn.num_batches_tracked == 1
    assert holds_values(bn)


def test_a_layer_of_the_trace_may_be_closed_over_by_a_gradient_in_it(rng):
    @jax.jit
    def step(bn, x):
        return bn, *jax.value_and_grad(lambda x: jnp.sum(bn(x) ** 3))(x)

    x, twin = batches(rng), new_layer()
    bn, value, gradient = step(new_layer(), x)
    assert_same(value, jnp.sum(twin(x) ** 3), 1e-5)
    assert gradient.shape == x.shape
    assert_same(bn, twin)


EAGER = {
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(f(x) ** 3))(x),
    "grad of grad": lambda f, x: jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x) ** 3))(x) ** 2))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[0],
}


@pytest.mark.parametrize("transformation", EAGER)
def test_statistics_are_values_where_only_derivatives_are_traced(rng, transformation):
    bn, twin, x = new_layer(), new_layer(), batches(rng)
    options = {"mask": np.arange(8) > 2} if transformation == "grad" else {}
    EAGER[transformation](lambda x: bn(x, **options), x)
    twin(x, **options)
    assert holds_values(bn)
    assert_same(bn, twin)


def test_evaluation_may_be_closed_over(rng):
    bn, x = new_layer().eval(), batches(rng)
    assert_same(jax.jit(bn)(x), bn(x))


def test_layers_made_under_a_trace_hold_values(rng):
    @jax.jit
    def evaluate(x):
        bn = mbn.BatchNorm1d(None).eval()
        y = bn(x)
        assert holds_values(bn)
        assert holds_values(new_layer(device="cpu"))
        return y

    evaluate(batches(rng)).block_until_ready()


def test_copies_outlive_a_donated_layer(rng):
    bn, x = new_layer(), batches(rng)
    saved = bn.state_dict()
    jax.jit(lambda bn, x: (bn, bn(x)), donate_argnums=0)(bn, x)
    assert np.all(np.asarray(saved["running_var"]) == 1)


def loss(params, state, x, weights=None):
    y, after = JaxBackend().batch_norm(x, params, state, **OPTIONS, weights=weights)
    return jnp.sum(y**3), after


gradient = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))

EACH = Params(0, 0), State(0, 0, None), 0, 0
SHARED = Params(None, None), State(None, None, None), None, None


@pytest.mark.parametrize(
    "one_each", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)], ids=["all", "params", "state", "x", "weights"]
)
def test_vmap_of_a_gradient_is_a_loop(rng, one_each):
    def pick(i, axes, tree):
        return jax.tree.map(
            lambda axis, leaf: leaf if axis is None or not leaf.ndim else leaf[i],
            axes,
            tree,
            is_leaf=lambda axis: axis is None,
        )

    weight, bias, mean = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(3))
    weights = jnp.asarray(rng.integers(0, 3, (2, 8)), jnp.float32)
    given = Params(weight, bias), State(mean, jnp.ones((2, 3)), jnp.asarray(3)), batches(rng, 2), weights
    axes = tuple(EACH[i] if i in one_each else SHARED[i] for i in range(4))
    given = tuple(given[i] if i in one_each else pick(0, EACH[i], given[i]) for i in range(4))
    each = [gradient(*(pick(i, *pair) for pair in zip(axes, given, strict=True))) for i in (0, 1)]
    assert_same(jax.vmap(gradient, axes)(*given), jax.tree.map(lambda *both: jnp.stack(both), *each), 1e-5)


def test_scan_carries_the_state(rng):
    params, x = Params(jnp.ones(3), jnp.zeros(3)), batches(rng, 3)

    @jax.jit
    def total(x, state):
        def step(state, x):
            value, state = loss(params, state, x)
            return state, value

        state, values = jax.lax.scan(step, state, x)
        return jnp.sum(values), state

    (_, state), dx = jax.value_and_grad(total, has_aux=True)(x, new_state(3))
    expected = new_state(3)
    for one, slope in zip(x, dx, strict=True):
        (_, expected), (_, expected_slope) = gradient(params, expected, one)
        assert_same(slope, expected_slope, 1e-5)
    assert_same(state, expected)


def test_scan_carries_the_layer(rng):
    x, twin = batches(rng, 3), new_layer()
    bn, y = jax.lax.scan(train_step, new_layer(), x)
    assert_same((bn, y), (twin, jnp.stack([twin(one) for one in x])))


def test_checkpoint_changes_nothing(rng):
    params, state, x = Params(jnp.ones(3), jnp.zeros(3)), new_state(3), batches(rng)
    again = jax.value_and_grad(jax.checkpoint(loss), (0, 2), has_aux=True)
    assert_same(again(params, state, x), gradient(params, state, x), 1e-6)


# Derivatives.


def directional(function, direction):
    return lambda x: jax.jvp(function, (x,), (direction,))[1]


@pytest.mark.parametrize(("shape", "weighted"), [((3, 2, 4), False), ((6, 2), True)])
def test_derivatives_to_third_order_in_every_mode(backend, rng, shape, weighted):
    x, u, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
    weight, bias = jnp.asarray([2.0, -0.5]), jnp.asarray([1.0, 0.0])
    weights = jnp.asarray(rng.integers(0, 3, (shape[0], *shape[2:])) / 2, jnp.float32) if weighted else None

    def output(x):
        return backend.batch_norm(x, Params(weight, bias), NOTHING[1], **OPTIONS, weights=weights)[0]

    def loss(x):
        return jnp.sum(dy * output(x) ** 2) / 2

    def twice(function):
        return jax.grad(lambda x: jnp.vdot(function(x), u))

    slope = jax.grad(loss)
    second = {"reverse": twice(slope), "mixed": directional(slope, u)}
    third = {
        "reverse": twice(twice(slope)),
        "mixed": directional(directional(slope, u), u),
        "reverse of mixed": twice(directional(slope, u)),
        "mixed of reverse": directional(twice(slope), u),
    }
    forwards = [output, directional(output, u)]
    forwards += [directional(forwards[-1], u)]
    forwards += [directional(forwards[-1], u)]
    host = [np.asarray(array, np.float64) for array in (x, u, dy, weight, bias)]
    truth = derivatives.along(
        *host, eps=1e-5, weights=None if weights is None else np.asarray(weights, np.float64), power=2
    )
    counted = 1 if weights is None else np.asarray(weights > 0).reshape(shape[0], 1, *shape[2:])
    actual = jax.jit(lambda x: [[f(x) for f in group] for group in (forwards, second.values(), third.values())])(x)
    for y, expected in zip(actual[0], truth, strict=True):
        assert relative_error(y, expected.y * counted) < 1e-6
    for order in (2, 3):
        for dx in actual[order - 1]:
            assert relative_error(dx, truth[order - 1].dx) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_many_values_far_from_zero(rng, weighted):
    shape = 100_000, 2
    x = (1e4 + rng.standard_normal(shape)).astype(np.float32)
    dy = (100 + rng.standard_normal(shape)).astype(np.float32)
    w = (rng.integers(0, 3, (100_000, 1)) / 2 if weighted else np.ones((100_000, 1))).astype(np.float32)

    @jax.jit
    def slopes(x, weight, weights):
        def loss(x, weight):
            return jnp.sum(
                dy * JaxBackend().batch_norm(x, Params(weight, None), NOTHING[1], **OPTIONS, weights=weights)[0]
            )

        return jax.grad(loss, (0, 1))(x, weight)

    weights = jnp.asarray(w[:, 0]) if weighted else None
    dx, dweight = slopes(jnp.asarray(x), jnp.ones(2), weights)
    x, n, dy = x - np.float64(1e4), np.sum(w, dtype=np.float64), np.where(w > 0, dy, np.float64(0))
    x -= (w * x).sum(axis=0) / n
    invstd = 1 / np.sqrt((w * x**2).sum(axis=0) / n + 1e-5)
    xhat = x * invstd
    truth = np.sum(dy * xhat, axis=0)
    assert relative_error(dweight, truth) < 3e-6
    assert relative_error(dx, invstd * (dy - w * np.sum(dy, axis=0) / n - w * xhat * truth / n)) < 3e-6


def test_evaluation_differentiates_by_the_running_statistics(backend, rng):
    x, dy = batches(rng, 2)
    mean, var, weight = (jnp.asarray(rng.uniform(0.5, 2.0, 3), jnp.float32) for _ in range(3))

    def loss(x, mean, var, weight):
        options = {**OPTIONS, "training": False}
        return jnp.sum(dy * backend.batch_norm(x, Params(weight, None), State(mean, var, None), **options)[0])

    slopes = jax.grad(loss, (0, 1, 2, 3))(x, mean, var, weight)
    x, dy, mean, var, weight = (np.asarray(array, np.float64) for array in (x, dy, mean, var, weight))
    invstd = 1 / np.sqrt(var + 1e-5)
    xhat = (x - mean) * invstd
    dx = weight * invstd * dy
    truth = dx, -dx.sum(axis=0), -(weight * dy * xhat).sum(axis=0) * invstd**2 / 2, (dy * xhat).sum(axis=0)
    for actual, expected in zip(slopes, truth, strict=True):
        assert relative_error(actual, expected) < 1e-6


def test_verbs_differentiate_on_their_own(backend, rng):
    x, dy = batches(rng, 2)
    weights = jnp.asarray([1, 2, 0, 1, 1, 0.5, 1, 1], jnp.float32)

    def loss(x):
        moments = backend.moments(x, weights)
        mean, var = moments.mean, backend.variance(moments, 0)
        return jnp.sum(dy * backend.normalize(x, mean, var, None, None, 1e-5, weights))

    def whole(x):
        return jnp.sum(dy * backend.batch_norm(x, *NOTHING, **OPTIONS, weights=weights)[0])

    assert_same(jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(whole))(x), 2e-6)


def test_pullbacks_differentiate_by_what_they_hold(rng):
    x, dy = batches(rng, 2)
    weight = jnp.asarray([1.0, 2.0, 3.0])

    def by_hand(x, weight):
        _, pullback = mbn.functional.batch_norm_vjp(x, None, None, weight, training=True)
        return pullback(dy)[0][0]

    def by_jax(x, weight):
        return jax.vjp(lambda x: mbn.functional.batch_norm(x, None, None, weight, training=True).output, x)[1](dy)[0][0]

    assert_same(jax.jacrev(by_hand, (0, 1))(x, weight), jax.jacfwd(by_jax, (0, 1))(x, weight), 1e-6)


# Masks.


def test_masks_may_be_traced(rng):
    bn, x = new_layer(), jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float32)
    given = {
        "mask": jnp.asarray(rng.random((4, 5)) < 0.7),
        "lengths": jnp.asarray([5, 3, 0, 4]),
        "sample_weight": jnp.asarray([0.5, 2.0, 1.0, 3.0]),
    }
    step = jax.jit(lambda x, given: bn.apply(bn.params, bn.state, x, training=True, **given))
    assert_same(step(x, given), bn.apply(bn.params, bn.state, x, training=True, **given), 1e-6)
    step(x, {**given, "lengths": jnp.asarray([1, 1, 1, 1])})
    assert step._cache_size() == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_values_and_their_derivatives_touch_nothing(backend, rng, training, poison):
    x, u, dy = batches(rng, 3)
    weights = jnp.asarray([1, 0, 1, 1, 0, 1, 1, 1], jnp.float32)
    masked = weights[:, None] == 0

    @jax.jit
    def everything(x, u, dy):
        def output(x):
            options = {**OPTIONS, "training": training}
            return backend.batch_norm(x, Params(jnp.ones(3), None), new_state(3), **options, weights=weights)

        def slope(x):
            return jax.vjp(lambda x: output(x)[0] ** 2, x)[1](dy)[0]

        def clean(x):  # what follows a layer leaves out the same places
            return jnp.where(masked, 0, x)

        bent = jax.grad(lambda x: jnp.sum(clean(slope(x) ** 2)))
        return output(x), directional(lambda x: output(x)[0], u)(x), slope(x), directional(slope, u)(x), bent(x)

    leaky = (jnp.where(masked, poison, array) for array in (x, u, dy))
    assert_same(everything(*leaky), everything(*(jnp.where(masked, 0, array) for array in (x, u, dy))))


def test_a_batch_without_values_gives_zeros_and_moves_nothing(backend):
    state = State(jnp.full(3, 2.0), jnp.full(3, 3.0), jnp.asarray(1))

    @jax.jit
    def step(x, weights):
        def loss(x):
            y, after = backend.batch_norm(x, Params(jnp.ones(3), jnp.ones(3)), state, **OPTIONS, weights=weights)
            return jnp.sum(y**2), (y, after)

        return jax.value_and_grad(loss, has_aux=True)(x)

    (_, (y, after)), dx = step(jnp.full((8, 3), jnp.nan), jnp.zeros(8))
    assert not np.any(y)
    assert not np.any(dx)
    assert_same(after, state._replace(num_batches_tracked=2))


def test_weights_of_no_sense_give_nan_where_they_are_traced(backend):
    weights = jax.jit(lambda lengths, weight: backend.weights((2, 3), "float32", None, lengths, weight))
    actual = weights(jnp.asarray([2, 4]), jnp.asarray([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(actual, [[0.5, np.nan, 0.0], [np.nan] * 3])


def test_values_are_compared_as_long_as_they_have_any(backend):
    lengths, seen = jnp.asarray([0, 3]), []

    @jax.jit
    def trace(x):
        seen.extend((backend.within(x, 0, 4), backend.within(lengths, 0, 4)))
        return x

    trace(lengths)
    assert seen == [None, True]
    assert backend.within(lengths, 0, 3) is False
    assert backend.within(jnp.asarray([np.nan]), 0.0, np.inf) is False


def test_asarray_copies_host_data(backend):
    host = np.ones(1 << 16, np.float32)
    for device in (None, "cpu"):
        array = backend.asarray(host, device=device)
        host[:] = 2
        assert np.all(np.asarray(array) == 1)
        host[:] = 1


def test_asarray_dtypes(backend):
    assert backend.asarray(np.asarray(3), "int64").dtype == jnp.int32
    assert backend.asarray([1.5, 2]).dtype == jnp.float32
    assert backend.asarray(np.ones(2), "bfloat16").dtype == jnp.bfloat16
    assert backend.asarray(jnp.ones(2), "float16").dtype == jnp.float16


@pytest.mark.parametrize(
    ("x", "dtype"), [(np.ones(2), None), (np.ones(2, np.float32), "float64"), (jnp.ones(2), "float64")]
)
def test_float64_is_refused_with_the_way_out(backend, x, dtype):
    with pytest.raises(TypeError, match=r"JAX_ENABLE_X64=1.*jax\.config.*float32"):
        backend.asarray(x, dtype)


def test_devices(backend):
    cpu = jax.local_devices(backend="cpu")[0]
    for given in (cpu, "cpu", "cpu:0", *backend.capabilities.devices):
        assert backend.device(backend.asarray([1.0], device=given)) is not None
    assert backend.device(backend.asarray([1.0], device=cpu)) == "cpu:0"
    assert backend.device(backend.asarray([1.0])) is None
    assert jax.jit(lambda x: x + (backend.device(x) is None))(1.0) == 2


@pytest.mark.parametrize("device", ["abacus", "cpu:99", "cpu:-1", "cpu:first", 3])
def test_unknown_devices_are_refused_by_the_names_there_are(backend, device):
    with pytest.raises(ValueError, match="it has .*cpu"):
        backend.asarray([1.0], device=device)


def test_owns_traced_arrays(backend):
    assert backend.owns(jnp.ones(1))
    assert not backend.owns(np.ones(1))
    jax.jit(lambda x: x if backend.owns(x) else None)(jnp.ones(1)).block_until_ready()


X64 = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from mbn.conformance import derivatives, oracle, ulp
from mbn.state import Params, State
from mbn_jax.backend import JaxBackend

backend, rng, errors = JaxBackend(), np.random.default_rng(0), {}
for dtype in ("float64", "float32"):
    for offset in (0, 1e6):
        x = (offset + rng.standard_normal((1001, 3))).astype(dtype)
        state = State(*map(backend.asarray, (np.zeros(3), np.ones(3), np.asarray(0))))
        y, state = backend.batch_norm(
            backend.asarray(x), Params(None, None), state, training=True, momentum=0.1, eps=1e-5, correction=1
        )
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
            y, _ = backend.batch_norm(x, Params(None, None), State(None, None, None), **options)
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


def test_with_64_bit_numbers_everything_is_exact_to_float64():
    # A process of its own: the switch belongs to the user.
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", X64]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
    errors, slopes = json.loads(done.stdout)
    assert max(slopes.values()) < 1e-12, slopes
    for dtype_and_offset, (output, mean, var) in errors.items():
        assert output <= 4, dtype_and_offset
        # Statistics of float32 values are pairs of float32, in a float64 layer too.
        assert max(mean, var) < (1e-14 if dtype_and_offset.startswith("float64") else 2.0**-40), dtype_and_offset
