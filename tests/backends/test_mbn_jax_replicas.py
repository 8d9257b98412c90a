"""Replicas of a JAX layer along a named axis: of vmap here, of devices and processes in processes of their own."""

import copy
import os
import pickle
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax_replica_samples import AXIS, C, assert_close, bound, derivatives, halves, layer, sample, step, undivided
from jax_samples import assert_same, jax, jnp

import mbn
from mbn.conformance.thread_group import ThreadGroup

HERE = Path(__file__).parent


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}


@pytest.mark.slow
@pytest.mark.processes
def test_cases_on_two_devices_pass() -> None:
    # In another process, since the number of devices is fixed for a process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "replicas_on_two_devices.py"]
    flags = environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    done = subprocess.run(command, env=flags, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_agree_with_the_undivided_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "jax_replica_process.py", str(rank), address, tmp_path / str(rank)],
            env=environment(XLA_FLAGS="--xla_force_host_platform_device_count=1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 240
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()  # of the new state


@pytest.mark.parametrize("kind", ["mask", "all masked", "bfloat16"])
def test_replicas_of_vmap_agree_with_the_undivided_batch(kind: str) -> None:
    bn, batch = layer(AXIS), sample(kind)
    run = jax.vmap(partial(step, bn), in_axes=(None, 0), out_axes=(0, 0, None), axis_name=AXIS)
    arrays, dparams, state = jax.jit(run)(bn.params, halves(batch))
    whole = jax.tree.map(lambda array: array.reshape(batch.x.shape), arrays)
    assert_close((whole, jax.tree.map(lambda rows: rows.sum(0), dparams), state), undivided(batch), bound(kind))


@pytest.mark.slow
def test_derivatives_of_three_orders_along_vmap_agree_with_the_undivided_batch() -> None:
    batch = sample("mask")
    run, alone = (partial(derivatives, layer(group), layer(group).params) for group in (AXIS, None))
    shared = jax.jit(jax.vmap(run, axis_name=AXIS))(halves(batch))
    assert_close(shared, [halves(array) for array in jax.jit(alone)(batch)], 3e-6)


def test_replicas_over_two_nested_axes_agree_with_the_undivided_batch() -> None:
    bn, batch = layer(("outer", "inner")), sample("rows")
    run = partial(step, bn, bn.params)
    for name in reversed(bn.group):
        run = jax.vmap(run, out_axes=(0, 0, None), axis_name=name)
    (y, dx), _, state = jax.jit(run)(jax.tree.map(lambda array: array.reshape(2, 2, -1, C), batch))
    arrays, _, expected = undivided(batch)
    assert_close((y.reshape(-1, C), dx.reshape(-1, C), state), (*arrays, expected), 1e-6)


def test_one_row_for_each_of_many_replicas_has_a_variance() -> None:
    x = np.random.default_rng(0).standard_normal((64, C)).astype(np.float32)
    bn, twin = layer(AXIS), layer(None, backend="numpy")
    run = jax.vmap(partial(bn.apply, bn.params, bn.state, training=True), out_axes=(0, None), axis_name=AXIS)
    y, state = jax.jit(run)(x[:, None])
    assert_close((y[:, 0], state), (twin(x), twin.state), 1e-6)


def test_program_does_not_grow_with_the_replicas() -> None:
    bn = layer(AXIS)

    def size(replicas: int) -> int:
        run = jax.vmap(partial(step, bn, bn.params), axis_name=AXIS)
        shards = jax.tree.map(lambda array: jnp.stack([array] * replicas), sample("mask"))
        return len(jax.jit(run).lower(shards).as_text().splitlines())

    assert size(64) == size(4)


def test_one_replica_computes_the_bits_of_a_layer_without_a_group() -> None:
    batch = sample("mask")
    shared = jax.vmap(partial(step, layer(AXIS), layer(AXIS).params), axis_name=AXIS)
    alone = jax.vmap(partial(step, layer(None), layer(None).params))
    one = jax.tree.map(lambda array: array[None], batch)
    assert_same(jax.jit(shared)(one), jax.jit(alone)(one))


def test_one_value_per_channel_over_all_replicas_is_refused() -> None:
    bn = layer(AXIS)
    run = jax.vmap(partial(bn.apply, bn.params, bn.state, training=True), axis_name=AXIS)
    with pytest.raises(ValueError, match="all replicas hold one value per channel"):
        run(jnp.ones((1, 1, C)))
    y, _ = run(jnp.arange(2.0 * C).reshape(2, 1, C))
    assert np.all(np.isfinite(y))


TRAINING = {
    "call": lambda bn, x: bn(x),
    "vjp": lambda bn, x: bn.vjp(x),
    "apply": lambda bn, x: bn.apply(bn.params, bn.state, x, training=True),
    "empty batch": lambda bn, x: bn(x[:0]),
    "jit": lambda bn, x: jax.jit(partial(bn.apply, training=True))(bn.params, bn.state, x),
    "grad": lambda bn, x: jax.grad(lambda x: bn.apply(bn.params, bn.state, x, training=True)[0].sum())(x),
    "function": lambda bn, x: mbn.functional.batch_norm(x, training=True, group=bn.group),
    "another axis": lambda bn, x: jax.vmap(partial(bn.apply, bn.params, bn.state, training=True), axis_name="b")(
        x[None]
    ),
}


@pytest.mark.parametrize("group", [AXIS, ("b", AXIS)])
@pytest.mark.parametrize("name", TRAINING)
def test_training_outside_of_the_axis_is_an_error_that_names_it(name: str, group: Any) -> None:
    bn = layer(group)
    before, x = bn.state, sample("rows").x
    axis = "b" if group != AXIS and name != "another axis" else AXIS
    words = rf"the axis '{axis}', .*shard_map, jax\.pmap or jax\.vmap\(axis_name='{axis}'\), or set bn\.group = None"
    with pytest.raises(ValueError, match=words):
        TRAINING[name](bn, x)
    assert bn.state is before
    assert bn.group == group


def test_first_batch_outside_of_the_axis_leaves_an_open_layer_open() -> None:
    bn = mbn.BatchNorm1d(None, group=AXIS)
    with pytest.raises(ValueError, match=f"axis '{AXIS}'"):
        bn(sample("rows").x)
    assert bn.backend is bn.num_features is None


def test_evaluation_and_frozen_layers_do_not_need_the_axis() -> None:
    bn, local, x = layer(AXIS).eval(), layer(None).eval(), sample("rows").x
    expected = local(x)
    assert_same(bn(x), expected)
    assert_same(jax.jit(bn)(x), jax.jit(local)(x))
    assert_same(bn.apply(bn.params, bn.state, x, training=False)[0], expected)
    assert_same(bn.freeze().train()(x), expected)
    assert_same(mbn.functional.batch_norm(x, *local.state[:2], *local.params, group=AXIS).output, expected)
    untracked = mbn.BatchNorm1d(C, track_running_stats=False, backend="jax", group=AXIS).eval()
    assert np.all(np.abs(untracked(x).mean(0)) < 1e-6)


@pytest.mark.parametrize("group", [True, ThreadGroup(2), 3, ("a", 3), ()], ids=["True", "mbn.Group", "3", "a, 3", "()"])
def test_groups_of_processes_are_refused(group: Any) -> None:
    bn = layer(AXIS)
    with pytest.raises(TypeError, match="on JAX is the name of an axis of shard_map, pmap or vmap"):
        bn.group = group
    assert bn.group == AXIS
    with pytest.raises(TypeError, match="on JAX is the name of an axis"):
        mbn.functional.batch_norm(sample("rows").x, training=True, group=group)


@pytest.mark.flax
class TestModuleOfFlax:
    """The module that ``as_module`` makes of a layer in a group."""

    def test_modules_along_an_axis_of_its_vmap_share_statistics(self) -> None:
        nnx = pytest.importorskip("flax.nnx")
        x = sample("rows").x
        module, twin = layer(AXIS).as_module(), layer(None, backend="numpy")
        run = nnx.vmap(lambda module, x: module(x), in_axes=(nnx.StateAxes({...: None}), 0), axis_name=AXIS)
        assert_close(nnx.jit(run)(module, halves(x)).reshape(x.shape), twin(np.asarray(x)), 1e-6)
        assert_close([module.running_mean[...], module.running_var[...]], twin.state[:2], 1e-6)
        assert module.num_batches_tracked[...] == 1

    def test_group_is_a_settable_part_of_the_definition(self) -> None:
        nnx = pytest.importorskip("flax.nnx")
        bn = layer(AXIS)
        module, other = bn.as_module(), layer(None).as_module()
        assert (module.group, other.group) == (AXIS, None)
        assert nnx.graphdef(module) == nnx.graphdef(layer(AXIS).as_module()) != nnx.graphdef(other)
        clone = nnx.clone(other)
        other.group = AXIS
        assert nnx.graphdef(module) == nnx.graphdef(other)
        assert clone.group is None
        module.group = None
        assert nnx.graphdef(module) == nnx.graphdef(clone)
        assert bn.group == AXIS
        for again in copy.deepcopy(other), pickle.loads(pickle.dumps(other)), nnx.clone(other):
            assert again.group == AXIS

    def test_module_refuses_other_groups_and_training_outside_of_the_axis(self) -> None:
        pytest.importorskip("flax.nnx")
        module, x = layer(AXIS).as_module(), sample("rows").x
        with pytest.raises(TypeError, match="name of an axis"):
            module.group = True
        with pytest.raises(ValueError, match=f"axis '{AXIS}'"):
            module(x)
        assert module.num_batches_tracked[...] == 0
        assert_same(module(x, use_running_average=True), layer(None).eval()(x))

    def test_synchronize_sets_the_group_of_each_module_of_a_model(self) -> None:
        nnx = pytest.importorskip("flax.nnx")
        model = nnx.Sequential(layer(None).as_module(), layer(None).as_module())
        mbn.synchronize(model, AXIS)
        assert [module.group for module in model.layers] == [AXIS, AXIS]
