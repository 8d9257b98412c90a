"""JAX's switches, which belong to the user: every call works under each of them, and gives what it gives without."""

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

PLACES = {
    "all": {},
    "mask": {"mask": np.arange(20).reshape(4, 5) % 3 > 0},
    "lengths": {"lengths": [0, 2, 5, 1]},
    "sample_weight": {"sample_weight": np.arange(4.0, dtype=np.float16)},
}


def loss(x, params, layer, places, *, training=True):
    y, _ = layer.apply(params, layer.state, x, training=training, **places)
    return jnp.sum(y.astype(layer.weight.dtype) ** 3)


def slope(x, *arguments):
    return jnp.sum(jax.grad(loss)(x, *arguments).astype(jnp.float32) ** 2)


def call(layer, x, places):
    return layer(x, **places), layer


def flax_module(layer, x, places):
    nnx = pytest.importorskip("flax.nnx")
    return nnx.grad(lambda module, x: jnp.sum(module(x, **places).astype(jnp.float32) ** 3))(layer.as_module(), x)


def function(layer, x, places):
    state = layer.running_mean, layer.running_var
    result, pullback = mbn.functional.batch_norm_vjp(x, *state, *layer.params, training=True, **places)
    return result, pullback(x)


CALLS = {
    "training": call,
    "training, channels last": lambda layer, x, places: mbn.BatchNorm1d(
        3, axis=-1, dtype=layer.weight.dtype, backend="jax"
    )(jnp.moveaxis(x, 1, -1), **places),
    "no momentum": lambda layer, x, places: call(
        mbn.BatchNorm1d(3, momentum=None, dtype=layer.weight.dtype, backend="jax"), x, places
    ),
    "evaluation": lambda layer, x, places: call(layer.eval(), x, places),
    "vjp": lambda layer, x, places: layer.vjp(x, **places)[1](x),
    "vjp in evaluation": lambda layer, x, places: layer.eval().vjp(x, **places)[1](x),
    "grad": lambda layer, x, places: jax.grad(loss, (0, 1))(x, layer.params, layer, places),
    "grad in evaluation": lambda layer, x, places: jax.grad(lambda *given: loss(*given, training=False), (0, 1))(
        x, layer.params, layer, places
    ),
    "grad of grad": lambda layer, x, places: jax.grad(slope, (0, 1))(x, layer.params, layer, places),
    "jvp": lambda layer, x, places: jax.jvp(lambda x: loss(x, layer.params, layer, places), (x,), (x,)),
    "jit": lambda layer, x, places: jax.jit(lambda layer, x: call(layer, x, places))(layer, x),
    "vmap": lambda layer, x, places: jax.vmap(lambda x: jax.grad(loss)(x, layer.params, layer, places))(x[None]),
    "flax": flax_module,
    "functions": function,
    "fit": lambda layer, x, places: layer.fit([x, 2 * x], progress=False).state,
    "fold": lambda layer, x, places: layer.fold(),
}


def outcome(name, places, dtype, layer_dtype, switches):
    rng = np.random.default_rng(0)
    layer, x = new_layer(dtype=layer_dtype), jnp.asarray(rng.standard_normal((4, 3, 5)), dtype)
    with ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch())
        return CALLS[name](layer, x, PLACES[places])


def assert_no_difference(name, places, dtype, layer_dtype, switch):
    given = name, places, dtype, layer_dtype
    tolerance = {"float16": 1e-2, "bfloat16": 1e-1, "float32": 1e-5, "float64": 1e-12}[dtype]
    actual, expected = outcome(*given, SWITCHES[switch]), outcome(*given, [])
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert [leaf.dtype for leaf in actual] == [leaf.dtype for leaf in expected]
    largest = max(np.max(np.abs(np.asarray(leaf, np.float64)), initial=1) for leaf in expected)  # what cancels is less
    for one, other in zip(actual, expected, strict=True):
        values = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(*values, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_works_under_it(name, switch):
    assert_no_difference(name, "all", "float32", "float32", switch)


@pytest.mark.parametrize("places", ["mask", "lengths", "sample_weight"])
@pytest.mark.parametrize("name", ["training", "evaluation", "vjp", "grad", "grad of grad", "jvp"])
def test_so_does_every_call_with_weights(name, places):
    assert_no_difference(name, places, "float32", "float32", "all")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["training", "evaluation", "vjp", "grad", "fit"])
def test_so_do_narrow_inputs(name, dtype):
    assert_no_difference(name, "mask", dtype, "float32", "all")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["training", "evaluation", "vjp", "grad", "fit"])
def test_so_do_layers_of_float64(name, dtype):
    with enable_x64(True):
        assert_no_difference(name, "mask", dtype, "float64", "all")
