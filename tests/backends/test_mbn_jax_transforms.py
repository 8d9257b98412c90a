"""JAX's transformations of layers and steps: jit, vmap, scan, checkpoint, and tracers that must not stay in a layer."""

import numpy as np
import pytest
from jax_samples import OPTIONS, assert_same, backend, batches, holds_values, jax, jnp, new_layer, new_state
from steps import step as step_of

import mbn
from mbn.contract import Params, State
from mbn_jax.integration import compiled_step


@jax.jit
def train_step(bn, x):
    y = bn(x)
    return bn, y


@pytest.mark.parametrize("momentum", [0.1, None])
def test_jitted_step_takes_and_returns_the_layer(rng, momentum):
    bn, twin = new_layer(momentum=momentum), new_layer(momentum=momentum)
    for count, x in enumerate(batches(rng, 4), 1):
        bn, y = train_step(bn, x)
        if count == 2:
            compiled = train_step._cache_size(), compiled_step._cache_size()
        assert_same((bn, y), (twin, twin(x)))
    assert (train_step._cache_size(), compiled_step._cache_size()) == compiled
    assert bn.num_batches_tracked == 4


def test_jitted_step_may_set_parameters_and_statistics(rng):
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


def test_layer_is_a_pytree():
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


def test_mode_is_static_under_jit(rng):
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
def test_closed_over_layer_is_refused_in_training(rng, closure):
    bn, x = new_layer(), batches(rng)
    before = bn.state
    with pytest.raises(RuntimeError) as caught:
        CLOSURES[closure](bn, x)
    assert "y, state = bn.apply(bn.params, bn.state, x, training=True)" in str(caught.value)
    assert "def step(bn, x):" in str(caught.value)
    assert bn.state is before
    bn(x)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("backend", [None, "jax"])
@pytest.mark.parametrize("pass_through", [train_step, lambda bn, x: jax.lax.scan(train_step, bn, x[None])])
def test_traced_layer_without_num_features_is_refused(rng, pass_through, backend):
    new_layer()  # registers layers as pytrees
    bn, x = mbn.BatchNorm1d(None, backend=backend), batches(rng)
    with pytest.raises(RuntimeError, match=r"without num_features or without a backend(.|\n)*call it once outside"):
        pass_through(bn, x)
    assert bn.num_features is None
    bn(x)
    bn, _ = pass_through(bn, x)
    assert bn.num_batches_tracked == 2


PASSED_THROUGH = {
    "jit": lambda bn, x: jax.jit(train_step)(bn, x)[0],
    "scan": lambda bn, x: jax.lax.scan(train_step, bn, x[None])[0],
    "fori_loop": lambda bn, x: jax.lax.fori_loop(0, 1, lambda _, bn: train_step(bn, x)[0], bn),
    "while_loop": lambda bn, x: jax.lax.while_loop(
        lambda bn: bn.num_batches_tracked < 1, lambda bn: train_step(bn, x)[0], bn
    ),
    "cond": lambda bn, x: jax.lax.cond(True, lambda bn: train_step(bn, x)[0], lambda bn: bn, bn),
}


@pytest.mark.parametrize("name", PASSED_THROUGH)
def test_unbound_layer_passes_through_transformations_as_a_bound_one(rng, name):
    twin, x = new_layer(), batches(rng)
    bn = PASSED_THROUGH[name](open_layer := mbn.BatchNorm1d(3), x)
    twin(x)
    assert (bn.backend, bn.num_batches_tracked) == ("jax", 1)
    assert open_layer.backend is None
    assert_same(bn.state, twin.state, 1e-6)


def test_grad_with_respect_to_a_layer_gives_its_parameter_gradients(rng):
    def loss(bn, x):
        return jnp.sum(bn(x) ** 3), bn

    bn, twin, x = new_layer(), new_layer(), batches(rng)
    gradient, bn = jax.grad(loss, has_aux=True, allow_int=True)(bn, x)
    y, pullback = twin.vjp(x)
    assert_same(gradient.params, pullback(3 * y**2)[1:], 1e-4)
    assert_same(bn, twin)
    assert holds_values(bn)


@pytest.mark.parametrize("closure", ["jit", "vmap", "scan", "checkpoint"])
def test_closed_over_layer_of_an_outer_trace_is_refused_in_training(rng, closure):
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


def test_gradient_within_a_jit_may_close_over_its_layer(rng):
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
def test_derivatives_without_jit_leave_no_tracers_in_the_layer(rng, transformation):
    bn, twin, x = new_layer(), new_layer(), batches(rng)
    options = {"mask": np.arange(8) > 2} if transformation == "grad" else {}
    EAGER[transformation](lambda x: bn(x, **options), x)
    twin(x, **options)
    assert holds_values(bn)
    assert_same(bn, twin)


def test_closed_over_layer_works_in_evaluation(rng):
    bn, x = new_layer().eval(), batches(rng)
    assert_same(jax.jit(bn)(x), bn(x))


def test_layer_made_under_a_trace_holds_values(rng):
    @jax.jit
    def evaluate(x):
        bn = mbn.BatchNorm1d(None).eval()
        y = bn(x)
        assert holds_values(bn)
        assert holds_values(new_layer(device="cpu"))
        return y

    evaluate(batches(rng)).block_until_ready()


def test_state_dict_outlives_a_donated_layer(rng):
    bn, x = new_layer(), batches(rng)
    saved = bn.state_dict()
    jax.jit(lambda bn, x: (bn, bn(x)), donate_argnums=0)(bn, x)
    assert np.all(np.asarray(saved["running_var"]) == 1)


def loss(params, state, x, weights=None):
    y, after, _ = step_of(backend, x, params, state, **OPTIONS, weights=weights)
    return jnp.sum(y**3), after


gradient = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))

EACH = Params(0, 0), State(0, 0, None), 0, 0
SHARED = Params(None, None), State(None, None, None), None, None


@pytest.mark.parametrize(
    "one_each", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)], ids=["all", "params", "state", "x", "weights"]
)
def test_vmap_of_a_gradient_equals_a_loop(rng, one_each):
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


def test_checkpoint_gives_the_same_gradient(rng):
    params, state, x = Params(jnp.ones(3), jnp.zeros(3)), new_state(3), batches(rng)
    again = jax.value_and_grad(jax.checkpoint(loss), (0, 2), has_aux=True)
    assert_same(again(params, state, x), gradient(params, state, x), 1e-6)
