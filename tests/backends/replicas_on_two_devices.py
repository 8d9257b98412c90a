"""Tests of replicas on two devices; test_mbn_jax_replicas.py runs them in a process with two simulated devices."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax_replica_samples import (
    AXIS,
    KINDS,
    C,
    Sample,
    assert_close,
    bound,
    derivatives,
    halves,
    layer,
    sample,
    step,
    undivided,
)
from jax_samples import assert_same, jax, jnp

import mbn
from mbn_jax.kernels.primitives import enable_x64

SAME, SHARDED = PartitionSpec(), PartitionSpec(AXIS)


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), (AXIS,))


def numbers(kind: str) -> Any:
    return enable_x64(new_val=True) if kind == "float64" else nullcontext()


def joined(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), tree)


def sums(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(2, C).sum(0), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_shard_map_agree_with_the_undivided_batch(kind: str) -> None:
    with numbers(kind):
        bn, batch = layer(AXIS, kind), sample(kind)
        # The new state is the same on all devices, and shard_map knows it; so are gradients of parameters that are.
        run = jax.shard_map(
            partial(step, bn), mesh=mesh(), in_specs=(SAME, SHARDED), out_specs=((SHARDED, SHARDED), SAME, SAME)
        )
        assert_close(jax.jit(run)(bn.params, batch), undivided(batch), bound(kind))


@pytest.mark.parametrize("kind", ["rows", "mask", "offset"])
def test_unchecked_shards_have_the_bits_of_checked_ones(kind: str) -> None:
    bn, batch = layer(AXIS), sample(kind)

    def run(*, check_vma: bool) -> Any:
        specs = ((SHARDED, SHARDED), SAME if check_vma else SHARDED, SAME)
        function = jax.shard_map(
            partial(step, bn), mesh=mesh(), in_specs=(SAME, SHARDED), out_specs=specs, check_vma=check_vma
        )
        return jax.jit(function)(bn.params, batch)

    (arrays, dparams, state), (own_arrays, own_dparams, own_state) = run(check_vma=True), run(check_vma=False)
    assert_same((own_arrays, own_state), (arrays, state))
    assert_close(sums(own_dparams), dparams, 1e-6)


@pytest.mark.parametrize("kind", ["sequences", "mask"])
def test_shards_of_pmap_agree_with_the_undivided_batch(kind: str) -> None:
    bn, batch = layer(AXIS), sample(kind)
    run = jax.pmap(partial(step, bn), axis_name=AXIS, in_axes=(None, 0))
    arrays, dparams, states = run(bn.params, halves(batch))
    state, other = (jax.tree.map(lambda array, device=device: array[device], states) for device in (0, 1))
    assert_same(other, state)
    assert_close((joined(arrays), sums(dparams), state), undivided(batch), 1e-6)


@pytest.mark.parametrize(("kind", "check_vma"), [("sequences", False), ("sample weights", True)])
def test_derivatives_of_three_orders_agree_with_the_undivided_batch(kind: str, *, check_vma: bool) -> None:
    batch = sample(kind)

    def run(bn: mbn.BatchNorm1d, **options: Any) -> Any:
        function = partial(derivatives, bn, bn.params)
        if options:
            function = jax.shard_map(function, mesh=mesh(), in_specs=SHARDED, out_specs=SHARDED, **options)
        return jax.jit(function)(batch)

    assert_close(run(layer(AXIS), check_vma=check_vma), run(layer(None)), 3e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_layer_itself_passes_through_shard_map(*, compiled: bool) -> None:
    x, dy, *_ = sample("sequences")

    def train(bn: mbn.BatchNorm1d, x: Any, dy: Any) -> Any:
        y, pullback = bn.vjp(x)
        dx, *dparams = pullback(dy)
        return bn, (y, dx), [gradient[None] for gradient in dparams]

    run = jax.shard_map(
        train, mesh=mesh(), in_specs=(SAME, SHARDED, SHARDED), out_specs=(SAME, (SHARDED, SHARDED), SHARDED)
    )
    bn, arrays, dparams = (jax.jit(run) if compiled else run)(layer(AXIS), x, dy)
    twin, expected, own = train(layer(None), x, dy)
    assert_close((arrays, sums(dparams), bn.state), (expected, [gradient[0] for gradient in own], twin.state), 1e-6)
    assert bn.group == AXIS
    assert not bn.running_mean.sharding.spec


def test_function_takes_a_group() -> None:
    x = sample("rows").x

    def train(x: Any, group: Any = None) -> Any:
        return tuple(mbn.functional.batch_norm(x, jnp.zeros(C), jnp.ones(C), training=True, group=group))

    run = jax.shard_map(partial(train, group=AXIS), mesh=mesh(), in_specs=SHARDED, out_specs=(SHARDED, SAME, SAME))
    assert_close(run(x), train(x), 1e-6)


def test_state_is_carried_through_a_scan_with_rematerialisation() -> None:
    batches = jnp.stack([sample("rows").x, sample("rows").v])

    def train(group: Any, batches: Any) -> Any:
        bn = layer(group)

        def loss(batches: Any) -> Any:
            # The carry of a scan has the same type after each step: it varies over devices, or it does not.
            apply = jax.checkpoint(partial(bn.apply, bn.params, training=True))
            state, y = jax.lax.scan(lambda state, x: apply(state, x)[::-1], bn.state, batches)
            return (y**3).sum(), state

        return jax.grad(loss, has_aux=True)(batches)

    parts = PartitionSpec(None, AXIS)
    run = jax.shard_map(partial(train, AXIS), mesh=mesh(), in_specs=parts, out_specs=(parts, SAME))
    assert_close(jax.jit(run)(batches), train(None, batches), 1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_empty_shards_keep_the_statistics(*, check_vma: bool) -> None:
    batch = jax.tree.map(lambda array: array[:0], sample("sequences"))
    bn = layer(AXIS)
    run = jax.shard_map(
        partial(step, bn),
        mesh=mesh(),
        in_specs=(SAME, SHARDED),
        out_specs=((SHARDED, SHARDED), SAME, SAME),
        check_vma=check_vma,
    )
    (y, dx), dparams, state = jax.jit(run)(bn.params, batch)
    assert y.shape == dx.shape == batch.x.shape
    assert_same((dparams, state), ((jnp.zeros(C), jnp.zeros(C)), (*bn.state[:2], jnp.asarray(1))))


EXCHANGE = r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
"""The dtype and shape of an operation by which devices exchange values, in a compiled program."""


@pytest.mark.parametrize("kind", ["rows", "mask"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_step_takes_one_exchange_forward_and_one_backward(kind: str, *, check_vma: bool) -> None:
    bn, batch = layer(AXIS), sample(kind)

    def train(batch: Sample) -> Any:
        return bn.apply(bn.params, bn.state, batch.x, training=True, **batch.masking)

    def evaluate(batch: Sample) -> Any:
        return bn.apply(bn.params, bn.state, batch.x, training=False, **batch.masking)

    def backward(batch: Sample) -> Any:
        return jax.grad(lambda x: (train(batch._replace(x=x))[0] * batch.dy).sum())(batch.x)

    def exchanged(function: Any, out_specs: Any) -> list[tuple[str, str]]:
        run = jax.shard_map(function, mesh=mesh(), in_specs=SHARDED, out_specs=out_specs, check_vma=check_vma)
        return re.findall(EXCHANGE, jax.jit(run).lower(batch).compile().as_text())

    forward = ("f32", f"2,{6 * C + 2}")  # mean and m2, each a pair and a unit, and the count, a pair
    assert exchanged(evaluate, (SHARDED, SAME)) == []
    assert exchanged(train, (SHARDED, SAME)) == [forward]
    assert exchanged(backward, SHARDED) == [forward, ("f64", f"2,{3 * C}")]


def test_group_may_be_several_axes() -> None:
    batch = sample("mask")
    devices = np.array(jax.devices()).reshape(1, 2)
    both = PartitionSpec(("outer", "inner"))
    for group in ("outer", "inner"), "inner":
        bn = layer(group)
        run = jax.shard_map(
            partial(step, bn),
            mesh=Mesh(devices, ("outer", "inner")),
            in_specs=(SAME, both),
            out_specs=((both, both), SAME, SAME),
            check_vma=group != "inner",  # along "outer" the state of that one device varies
        )
        (y, dx), _, state = jax.jit(run)(bn.params, batch)
        arrays, _, expected = undivided(batch)
        assert_close(((y, dx), state), (arrays, expected), 1e-6)


@pytest.mark.flax
def test_module_of_flax_shares_statistics_under_its_shard_map() -> None:
    nnx = pytest.importorskip("flax.nnx")
    x = sample("rows").x
    module, twin = layer(AXIS).as_module(), layer(None).as_module()

    @nnx.jit
    @nnx.shard_map(mesh=mesh(), in_specs=(SAME, SHARDED), out_specs=SHARDED)
    def train(module: Any, x: Any) -> Any:
        return module(x)

    assert_close(train(module, x), twin(x), 1e-6)
    assert_close(nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(twin)), 1e-6)

    definition, state = nnx.split(module)

    def merged(state: Any, x: Any) -> Any:
        module = nnx.merge(definition, state)
        y = module(x)
        return y, nnx.state(module)

    run = jax.jit(jax.shard_map(merged, mesh=mesh(), in_specs=(SAME, SHARDED), out_specs=(SHARDED, SAME)))
    y, state = run(state, x)
    assert_close(y, twin(x), 1e-6)
    assert_close(nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.state(twin)), 1e-6)
