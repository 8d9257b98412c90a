"""Tests of JAX with two devices; test_mbn_jax_devices.py runs them in a process with two simulated devices."""

import math
import re
from functools import partial

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax_samples import assert_same, jax, jnp, new_layer, new_state

import mbn
from mbn.contract import Params, State
from mbn_jax.kernels import compiled_loops

SHARDED, SAME = PartitionSpec("data"), PartitionSpec()
LAYER = new_layer()
OF_FOUR = mbn.BatchNorm1d(4, backend="jax")

MASKINGS = {
    "(N, C)": {},
    "(N, C, L)": {},
    "mask": {"mask": np.arange(40).reshape(8, 5) % 3 > 0},
    "lengths": {"lengths": np.arange(8) % 6},
    "sample_weight": {"sample_weight": np.arange(8, dtype=np.float32)},
}


def sample(kind):
    shape = (8, 3) if kind == "(N, C)" else (8, 3, 5)
    given = MASKINGS[kind]
    return [
        jnp.asarray(value) for value in (np.random.default_rng(0).standard_normal(shape, np.float32), *given.values())
    ]


def loss(params, x, *values, kind, training):
    y, state = LAYER.apply(params, new_state(3), x, training=training, **dict(zip(MASKINGS[kind], values, strict=True)))
    return jnp.sum(y**3), state


def over_shards(function, out_specs, arguments):
    """Return the results of a shard_map of a function, with all arguments but the first split into two halves."""
    in_specs = SAME, *(SHARDED,) * (len(arguments) - 1)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))(*arguments)


def sharded(x, *spec):
    return jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(*spec)))


def halves(function, arguments):
    params, *rest = arguments
    return [function(params, *(value[half] for value in rest)) for half in (slice(0, 4), slice(4, 8))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MASKINGS)
class TestShardMap:
    def given(self, kind):
        return Params(jnp.asarray([1.0, 2, 3]), jnp.ones(3)), *sample(kind)

    def test_gradients_of_replicated_params_and_sharded_x(self, kind, training):
        def function(*given):
            return jax.grad(lambda *given: loss(*given, kind=kind, training=training)[0], (0, 1))(*given)

        (params, x), given = (SAME, SHARDED), self.given(kind)
        params, x = over_shards(function, (params, x), given)
        (first, first_x), (second, second_x) = halves(function, given)
        assert_same(params, jax.tree.map(jnp.add, first, second), 1e-4)
        assert_same(x, jnp.concatenate([first_x, second_x]), 1e-4)

    def test_second_derivatives_are_those_of_each_shard(self, kind, training):
        def slope(*given):
            return jnp.sum(jax.grad(lambda *given: loss(*given, kind=kind, training=training)[0], 1)(*given) ** 2)

        function, given = jax.grad(slope, 1), self.given(kind)
        assert_same(over_shards(function, SHARDED, given), jnp.concatenate(halves(function, given)), 1e-3)

    def test_directional_derivatives_are_those_of_each_shard(self, kind, training):
        def function(params, x, *values):
            return jax.jvp(lambda x: loss(params, x, *values, kind=kind, training=training)[0], (x,), (x,))[1][None]

        given = self.given(kind)
        assert_same(over_shards(function, SHARDED, given), jnp.concatenate(halves(function, given)), 1e-4)

    def test_state_of_a_sharded_batch_varies_over_devices(self, kind, training):
        def function(*given):
            return loss(*given, kind=kind, training=training)[1]

        given = self.given(kind)
        if not training:
            return assert_same(over_shards(function, SAME, given), new_state(3))
        with pytest.raises(ValueError, match="out_specs"):
            over_shards(function, SAME, given)
        state = over_shards(function, State(SHARDED, SHARDED, SAME), given)
        first, second = halves(function, given)
        assert_same(state[:2], jax.tree.map(lambda *both: jnp.concatenate(both), first[:2], second[:2]), 1e-6)
        return None


DEVICES = {
    "call": lambda layer, x: layer(x),
    "evaluation": lambda layer, x: layer.eval()(x),
    "vjp": lambda layer, x: layer.vjp(x),
    "apply": lambda layer, x: layer.apply(layer.params, layer.state, x, training=True),
    "fit": lambda layer, x: layer.fit([x], progress=False),
    "mask": lambda layer, x: layer(np.asarray(x), mask=sharded(jnp.ones(8, bool), "data")),
}


@pytest.mark.parametrize("name", DEVICES)
def test_layer_with_a_device_refuses_arrays_sharded_over_others(name):
    layer, x = new_layer(device="cpu:1"), sharded(sample("(N, C)")[0], "data")
    before = layer.state
    with pytest.raises(ValueError, match=r"(x|mask) is spread over .*, and the layer is on cpu:1 alone"):
        DEVICES[name](layer, x)
    assert layer.state is before
    assert DEVICES[name](new_layer(), x) is not None


SPECS = {"batch": ("data",), "channels": (None, "data"), "batch, (N, C, L)": ("data",), "length": (None, None, "data")}


def steps(params, x, masking, *, training):
    def total(params, x):
        y, state = OF_FOUR.apply(params, new_state(4), x, training=training, **masking)
        return jnp.sum(y**3), state

    def slope(x):
        return jnp.sum(jax.grad(lambda x: total(params, x)[0])(x) ** 2)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(params, x), jax.grad(slope)(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_explicit_mesh_axes_give_the_results_of_one_device(name, has_mask, training):
    spec, shape = SPECS[name], (8, 4, 6) if name in ("length", "batch, (N, C, L)") else (8, 4)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    mask = np.arange(x[:, 0].size).reshape(x[:, 0].shape) % 3 > 0 if has_mask else None
    params = Params(jnp.asarray([1.0, 2, 3, 4]), jnp.ones(4))
    function = jax.jit(partial(steps, training=training))
    expected = function(params, jnp.asarray(x), {"mask": mask})
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    on_mesh = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    layer, twin = mbn.BatchNorm1d(4, backend="jax").train(training), mbn.BatchNorm1d(4, backend="jax").train(training)
    assert_same(layer(on_mesh, mask=mask), twin(x, mask=mask), 1e-6)
    assert_same(layer.state, twin.state, 1e-6)
    with jax.set_mesh(mesh):
        actual = function(params, on_mesh, {"mask": mask})
    ((_, _), (_, slope)), _ = actual
    assert jax.typeof(slope).sharding.spec == jax.typeof(on_mesh).sharding.spec
    assert_same(actual[0], expected[0], 2e-4)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-3, atol=1e-3 * np.max(np.abs(expected[1])))


def test_each_shard_takes_the_compiled_loops_and_a_sharded_array_does_not(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(compiled_loops, "LEAST", [0, 0])
    (x,) = sample("(N, C)")

    def train(x):
        return LAYER.apply(LAYER.params, new_state(3), x, training=True)[0]

    mesh = Mesh(np.array(jax.devices()), ("data",))
    of_shards = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED))
    assert {name for name in compiled_loops.TARGETS if f'"{name}"' in of_shards.lower(x).compile().as_text()} == {
        "mbn_moments",
        "mbn_normalize",
    }
    expected = jnp.concatenate([train(x[:4]), train(x[4:])])
    assert_same(of_shards(x), expected, 1e-6)
    assert_same(jax.pmap(train)(x.reshape(2, 4, 3)).reshape(x.shape), expected, 1e-6)
    on_mesh = jax.jit(train).lower(sharded(x, "data")).compile()
    assert not any(f'"{name}"' in on_mesh.as_text() for name in compiled_loops.TARGETS)
    assert_same(on_mesh(sharded(x, "data")), train(x), 1e-6)


MOVED = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
"""A type, and the operation by which devices exchange it, in a compiled program."""

SHARDINGS = {
    "batch": ((64, 4), ("data",)),
    "batch, short L": ((256, 4, 3), ("data",)),
    "batch, long L": ((64, 4, 256), ("data",)),
    "length": ((64, 4, 256), (None, None, "data")),
    "channels": ((64, 4, 8), (None, "data")),
}


@pytest.mark.parametrize(
    ("sharding", "kind"),
    [
        ("batch", "none"),
        ("batch", "mask"),
        ("batch, short L", "none"),
        ("batch, short L", "sample_weight"),
        ("batch, long L", "mask"),
        ("length", "none"),
        ("length", "mask"),
        ("length", "lengths"),
        ("channels", "mask"),
    ],
)
def test_devices_exchange_no_more_than_vectors_of_channels(sharding, kind):
    (n, c, *length), spec = SHARDINGS[sharding]
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((n, c, *length))).astype(np.float32)
    given = {
        "none": {},
        "mask": {"mask": rng.random((n, *length)) > 0.3},
        "lengths": {"lengths": rng.integers(0, 1 + sum(length), n)},
        "sample_weight": {"sample_weight": rng.random(n).astype(np.float32)},
    }[kind]
    params = Params(jnp.asarray([1.0, 2, 3, 4]), jnp.ones(4))
    function = jax.jit(partial(steps, training=True))
    given = {name: jnp.asarray(value) for name, value in given.items()}
    expected = function(params, jnp.asarray(x), given)
    if kind == "mask":  # shard the mask as x
        given["mask"] = sharded(given["mask"], spec[0], *spec[2:])
    on_mesh = sharded(x, *spec)
    compiled = function.lower(params, on_mesh, given).compile()
    moved = [
        (operation, shape, math.prod(int(size) for size in shape.split(",") if size))
        for kinds, operation in re.findall(MOVED, compiled.as_text())
        for shape in re.findall(r"\w+\[([\d,]*)\]", kinds)
    ]
    assert moved
    assert not [each for each in moved if each[-1] > 8 * c]
    actual = compiled(params, on_mesh, given)
    assert_same(actual[0], expected[0], 2e-4)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-3, atol=1e-3 * np.max(np.abs(expected[1])))
