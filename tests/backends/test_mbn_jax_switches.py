"""JAX's global switches: every call works under each of them and gives the same results as without."""

from contextlib import ExitStack

import numpy as np
import pytest
from jax_samples import jax, jnp, new_layer

import mbn
from mbn_jax.kernels.primitives import enable_x64

SWITCHES = {
    "no jit": [jax.disable_jit],
    "no promotion of ranks": [lambda: jax.numpy_rank_promotion("raise")],
    "no promotion of dtypes": [lambda: jax.numpy_dtype_promotion("strict")],
}
SWITCHES["all"] = [switch for switches in SWITCHES.values() for switch in switches]

MASKINGS = {
    "all": {},
    "mask": {"mask": np.arange(20).reshape(4, 5) % 3 > 0},
    "lengths": {"lengths": [0, 2, 5, 1]},
    "sample_weight": {"sample_weight": np.arange(4.0, dtype=np.float16)},
}


def loss(x, params, layer, masking, *, training=True):
    y, _ = layer.apply(params, layer.state, x, training=training, **masking)
    return jnp.sum(y.astype(layer.weight.dtype) ** 3)


def slope(x, *arguments):
    return jnp.sum(jax.grad(loss)(x, *arguments).astype(jnp.float32) ** 2)


def call(layer, x, masking):
    return layer(x, **masking), layer


def flax_module(layer, x, masking):
    nnx = pytest.importorskip("flax.nnx")
    return nnx.grad(lambda module, x: jnp.sum(module(x, **masking).astype(jnp.float32) ** 3))(layer.as_module(), x)


def function(layer, x, masking):
    state = layer.running_mean, layer.running_var
    result, pullback = mbn.functional.batch_norm_vjp(x, *state, *layer.params, training=True, **masking)
    return result, pullback(x)


CALLS = {
    "training": call,
    "training, channels last": lambda layer, x, masking: mbn.BatchNorm1d(
        3, axis=-1, dtype=layer.weight.dtype, backend="jax"
    )(jnp.moveaxis(x, 1, -1), **masking),
    "no momentum": lambda layer, x, masking: call(
        mbn.BatchNorm1d(3, momentum=None, dtype=layer.weight.dtype, backend="jax"), x, masking
    ),
    "evaluation": lambda layer, x, masking: call(layer.eval(), x, masking),
    "vjp": lambda layer, x, masking: layer.vjp(x, **masking)[1](x),
    "vjp in evaluation": lambda layer, x, masking: layer.eval().vjp(x, **masking)[1](x),
    "grad": lambda layer, x, masking: jax.grad(loss, (0, 1))(x, layer.params, layer, masking),
    "grad in evaluation": lambda layer, x, masking: jax.grad(lambda *given: loss(*given, training=False), (0, 1))(
        x, layer.params, layer, masking
    ),
    "grad of grad": lambda layer, x, masking: jax.grad(slope, (0, 1))(x, layer.params, layer, masking),
    "jvp": lambda layer, x, masking: jax.jvp(lambda x: loss(x, layer.params, layer, masking), (x,), (x,)),
    "jit": lambda layer, x, masking: jax.jit(lambda layer, x: call(layer, x, masking))(layer, x),
    "vmap": lambda layer, x, masking: jax.vmap(lambda x: jax.grad(loss)(x, layer.params, layer, masking))(x[None]),
    "flax": flax_module,
    "functions": function,
    "fit": lambda layer, x, masking: layer.fit([x, 2 * x], progress=False).state,
    "fold": lambda layer, x, masking: layer.fold(),
}


def outcome(name, masking, dtype, layer_dtype, switches):
    rng = np.random.default_rng(0)
    layer, x = new_layer(dtype=layer_dtype), jnp.asarray(rng.standard_normal((4, 3, 5)), dtype)
    with ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch())
        return CALLS[name](layer, x, MASKINGS[masking])


def assert_no_difference(name, masking, dtype, layer_dtype, switch):
    given = name, masking, dtype, layer_dtype
    tolerance = {"float16": 1e-2, "bfloat16": 1e-1, "float32": 1e-5, "float64": 1e-12}[dtype]
    actual, expected = outcome(*given, SWITCHES[switch]), outcome(*given, [])
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert [leaf.dtype for leaf in actual] == [leaf.dtype for leaf in expected]
    largest = max(np.max(np.abs(np.asarray(leaf, np.float64)), initial=1) for leaf in expected)  # others cancel
    for one, other in zip(actual, expected, strict=True):
        values = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(*values, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", CALLS)
def test_call_gives_the_same_results_under_a_switch(name, switch):
    assert_no_difference(name, "all", "float32", "float32", switch)


@pytest.mark.parametrize("masking", ["mask", "lengths", "sample_weight"])
@pytest.mark.parametrize("name", ["training", "evaluation", "vjp", "grad", "grad of grad", "jvp"])
def test_call_with_weights_gives_the_same_results_under_all_switches(name, masking):
    assert_no_difference(name, masking, "float32", "float32", "all")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["training", "evaluation", "vjp", "grad", "fit"])
def test_halves_give_the_same_results_under_all_switches(name, dtype):
    assert_no_difference(name, "mask", dtype, "float32", "all")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["training", "evaluation", "vjp", "grad", "fit"])
def test_float64_layer_gives_the_same_results_under_all_switches(name, dtype):
    with enable_x64(True):
        assert_no_difference(name, "mask", dtype, "float64", "all")
