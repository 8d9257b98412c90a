"""Replicas in real processes of torch.distributed: gloo on the loopback interface."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_replica_steps as steps
from torch_world import Died, World

pytestmark = [pytest.mark.processes]

SHARDS = {
    "37 and 964 rows": [37, 964],
    "an empty batch and one row": [0, 20, 1],
    "four, one of them empty": [9, 0, 20, 8],
}
TOLERANCES = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 3e-6, "float64": 1e-11}
"""Relative to the value, and to the largest value of the array."""


@pytest.fixture(scope="module")
def world() -> Iterator[Callable[[int], World]]:
    """Worlds of 2 to 4 ranks, each started once."""
    started: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size not in started:
            started[size] = World(size).__enter__()
        return started[size]

    try:
        yield of_size
    finally:
        for other in started.values():
            other.__exit__()


def assert_near(found: Any, expected: Any, dtype: str) -> None:
    expected, tolerance = np.asarray(expected, float), TOLERANCES[dtype]
    np.testing.assert_allclose(
        np.asarray(found, float), expected, tolerance, tolerance * max(abs(expected).max(initial=0), 1)
    )


def assert_same_bits(entries: list[dict[str, np.ndarray]]) -> None:
    for other in entries[1:]:
        assert {key: value.tobytes() for key, value in other.items()} == {
            key: value.tobytes() for key, value in entries[0].items()
        }


def data(number: int, dtype: str, length: int | None = None, offset: float = 0.0) -> tuple[Any, Any]:
    shape = (number, steps.C) if length is None else (number, steps.C, length)
    x, dy = np.random.default_rng(5).standard_normal((2, *shape))
    x += offset + np.linspace(-4, 4, number).reshape(-1, *[1] * (x.ndim - 1))  # every shard has a mean of its own
    return (torch.from_numpy(values).to(getattr(torch, dtype)) for values in (x, dy))


def split(values: Any, sizes: list[int]) -> list[Any]:
    return [None] * len(sizes) if values is None else [part.clone() for part in values.split(sizes)]


def assert_agrees(world: World, sizes: list[int], x: Any, dy: Any, mask: Any, how: str, dtype: str) -> None:
    """Check a step of replicas against one of the undivided batch."""
    name = str(x.dtype).removeprefix("torch.")
    whole = steps.train(x, dy, mask, how, dtype, group=None)
    same = [[argument] * len(sizes) for argument in (how, dtype)]
    found = world.run(steps.train, *(split(values, sizes) for values in (x, dy, mask)), *same)
    for key in ("y", "dx"):
        assert_near(np.concatenate([own[key] for own in found]), whole[key], name)
    for key in ("dweight", "dbias"):  # they are those of the replica's own loss
        assert_near(sum(own[key].astype(float) for own in found), whole[key], dtype)
    entries = [{key: own[key] for key in ("running_mean", "running_var", "num_batches_tracked")} for own in found]
    assert_same_bits(entries)
    for key, value in entries[0].items():
        assert_near(value, whole[key], dtype)


@pytest.mark.parametrize("how", ["autograd", "vjp"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS)
def test_replicas_agree_with_the_undivided_batch(
    world: Callable[[int], World], sizes: list[int], dtype: str, how: str
) -> None:
    x, dy = data(sum(sizes), dtype)
    own = "float64" if dtype == "float64" else "float32"
    assert_agrees(world(len(sizes)), sizes, x, dy, None, how, own)


@pytest.mark.parametrize("how", ["autograd", "vjp"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS)
def test_masked_replicas_agree_with_the_undivided_batch_far_from_zero(
    world: Callable[[int], World], sizes: list[int], dtype: str, how: str
) -> None:
    x, dy = data(sum(sizes), dtype, length=4, offset=1e6)
    mask = torch.from_numpy(np.random.default_rng(6).random((sum(sizes), 4)) < 0.7)
    mask[-3:] = False  # a replica of one row has no value at all
    assert_agrees(world(len(sizes)), sizes, x, dy, mask, how, dtype)


def test_derivatives_of_three_orders_agree_with_the_undivided_batch(world: Callable[[int], World]) -> None:
    sizes = [20, 16, 1]
    x, dy = data(37, "float64", length=2)
    v = x.sin()
    expected = steps.derivatives(x, dy, v, group=None)
    parts = [split(values, sizes) for values in (x, dy, v)]
    for index, of_replicas in enumerate(zip(*world(3).run(steps.derivatives, *parts), strict=True)):
        is_sum = expected[index].ndim == 1
        assert_near(sum(of_replicas) if is_sum else np.concatenate(of_replicas), expected[index], "float64")


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_transformed_replicas_agree_with_the_undivided_batch(world: Callable[[int], World]) -> None:
    sizes = [20, 1, 16]
    x, v = data(37, "float64")
    expected = steps.transformed(x, v, group=None)
    found = zip(*world(3).run(steps.transformed, split(x, sizes), split(v, sizes)), strict=True)
    for of_replicas, whole in zip(found, expected, strict=True):
        assert_near(np.concatenate(of_replicas), whole, "float64")


def test_a_subgroup_shares_statistics_and_others_are_refused(world: Callable[[int], World]) -> None:
    x, _ = data(9, "float32")
    first, others, last = world(3).run(steps.in_subgroup, split(x, [2, 3, 4]))
    assert_same_bits([first, last])
    local = steps.layer()
    local(torch.cat([x[:2], x[5:]]))
    assert_near(first["running_var"], local.running_var, "float32")
    assert others == ["ValueError: this process is not part of the group that torch.distributed.new_group made."] * 2


def test_training_without_torch_distributed_is_refused_and_evaluation_works() -> None:
    bn, x = steps.layer(group=True), torch.ones(4, steps.C)
    for train in (bn, bn.as_module(), torch.compile(bn.as_module(), backend="eager", fullgraph=True)):
        with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised.*init_process_group"):
            train(x)
    np.testing.assert_array_equal(bn.eval()(x).detach(), steps.layer().eval()(x).detach())


@pytest.mark.parametrize("given", ["world", 1, object()])
def test_a_group_of_no_process_group_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"is a process group of torch\.distributed, True"):
        steps.layer(group=given)


def test_evaluation_and_frozen_layers_do_not_communicate(world: Callable[[int], World]) -> None:
    (before, after), nothing = world(2).run(steps.evaluate_alone)
    assert nothing is None
    assert_same_bits([before, after])


@pytest.mark.parametrize("how", ["call", "vjp", "apply", "module", "function"])
@pytest.mark.parametrize("kind", [*steps.REFUSED, "mask"])
def test_an_input_refused_on_one_rank_is_an_error_of_all(world: Callable[[int], World], kind: str, how: str) -> None:
    if how == "function" and kind == "another number of channels":
        kind = "mask"  # a function has the channels of its input
    if how == "function" and kind == "host data of another shape":
        kind = "mask"
    others, own, last = world(3).run(steps.refuse, [kind] * 3, [how] * 3)
    name, message = own[0].split(": ", 1)
    assert name in {"ValueError", "TypeError"}
    for error, *_ in (others, last):
        assert error.startswith("ReplicaError: ")
        assert f"failed elsewhere, and changed nothing: rank 1: {name}: {message[:180]}" in error
    for _, is_kept, took, _ in (others, own, last):
        assert is_kept
        assert took < 20  # not the timeout of the group
    assert_same_bits([others[3], own[3], last[3]])  # the step after it works


def test_a_gradient_refused_on_one_rank_is_an_error_of_all(world: Callable[[int], World]) -> None:
    own, other = world(2).run(steps.refuse_backward)
    assert own.startswith("ValueError: dy has shape (5, 3)")
    assert "failed elsewhere, and changed nothing: rank 0: ValueError: dy has shape (5, 3)" in other


@pytest.mark.parametrize("kind", ["channels", "dtype"])
def test_layers_that_differ_are_refused_by_all(world: Callable[[int], World], kind: str) -> None:
    words = {"channels": "4 channels in float32", "dtype": "3 channels in float64"}[kind]
    for *errors, count in world(3).run(steps.differ, [kind] * 3):
        for error in errors:
            assert error.startswith("ReplicaError: the replicas do not compute the same step: rank 0 is at")
            assert words in error
        assert count == 0


def test_layers_called_in_another_order_are_refused_by_all(world: Callable[[int], World]) -> None:
    for errors in world(2).run(steps.change_order):
        for error in errors:
            assert error.startswith("ReplicaError: the replicas do not compute the same step")


@pytest.mark.parametrize("kind", ["late", "killed"])
@pytest.mark.parametrize("tcp", [False, True], ids=["file", "tcp"])
def test_a_missing_rank_is_a_timeout_that_names_it(kind: str, *, tcp: bool) -> None:
    with World(3, tcp=tcp) as world:
        first, missing, last = world.attempt(steps.miss, [kind] * 3)
    assert isinstance(missing, Died) if kind == "killed" else missing is None
    for rank, (error, took, is_kept) in {0: first, 2: last}.items():
        assert error.startswith(f"TimeoutError: the layer '1' (3 channels, step 1), rank {rank}: rank 1 did not come")
        assert took < steps.SHORT + 10
        assert is_kept


@pytest.mark.parametrize("how", ["no gradient of x", "no tensor"])
def test_a_rank_without_gradients_takes_part_for_the_others(world: Callable[[int], World], how: str) -> None:
    results = world(2).run(steps.train_without_gradients, [how] * 2)
    assert [error for _, error, *_ in results] == ["no error"] * 2
    x, dy = (torch.cat([own[index] for own in results]) for index in (3, 4))
    bn = steps.layer()
    x.requires_grad_()
    (bn(x) * dy).sum().backward()
    assert_near(results[0][2], x.grad[:4], "float32")
    assert results[1][2] is None


def test_a_rank_under_no_grad_is_named_by_the_backward_pass_of_others(world: Callable[[int], World]) -> None:
    first, second = world(2).run(steps.train_without_gradients, ["no_grad"] * 2)
    assert "has no backward pass: rank 1 computed the step without gradients, as under no_grad" in first[1]
    assert second[1] == "no error"


def test_copies_share_the_group_and_pickles_detach(world: Callable[[int], World]) -> None:
    for found in world(2).run(steps.copies):
        assert set(found["keys"]) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        assert_same_bits(found["states"])
        assert found["is shared"]
        assert found["evaluated"]
        assert "has been pickled or loaded, and its group stayed in the other process: set bn.group" in found["error"]
        assert found["local"]["num_batches_tracked"] == 1


# The module and Torch's tools.

SIZES = [5, 2]


def undivided(x: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    model = steps.a_model()
    return steps.gradients_of(model, x), steps.state(model[1].layer)


def assert_model(found: dict[str, Any], entries: dict[str, Any], x: Any) -> None:
    gradients, after = undivided(x)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found[name], gradient, 1e-4, 1e-5, err_msg=name)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert_near(entries[key], after[key], "float32")


def a_batch(number: int = 7) -> Any:
    return torch.from_numpy(np.random.default_rng(8).standard_normal((number, 4)).astype(np.float32))


def test_module_forwards_its_group_to_its_layer() -> None:
    bn = steps.layer(group=True)
    module = bn.as_module()
    assert module.group is module.layer.group is True
    module.group = None
    assert module.group is module.layer.group is None
    assert bn.group is True
    with pytest.raises(TypeError, match="process group"):
        module.group = "world"


@pytest.mark.parametrize("how", ["parallel", "fully_shard", "FullyShardedDataParallel"])
def test_data_parallel_models_have_the_gradients_of_the_undivided_batch(
    world: Callable[[int], World], how: str
) -> None:
    x = a_batch()
    totals, kinds = [len(x)] * 2, [how] * 2
    arguments = (totals,) if how == "parallel" else (totals, kinds)
    function: Any = steps.parallel if how == "parallel" else steps.sharded
    for gradients, entries in world(2).run(function, split(x, SIZES), *arguments):
        assert_model(gradients, entries, x)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "functional_call"])
def test_recomputed_and_functional_models_have_the_gradients_of_the_undivided_batch(
    world: Callable[[int], World], how: str
) -> None:
    x = a_batch()
    arguments: Any = ([len(x)] * 2,) if how == "functional_call" else ([len(x)] * 2, [how == "reentrant"] * 2)
    function: Any = steps.functional_call if how == "functional_call" else steps.checkpointed
    results = world(2).run(function, split(x, SIZES), *arguments)
    found = {name: sum(gradients[name] for gradients, _ in results) for name in results[0][0]}
    for _, entries in results:
        assert_model(found, entries, x)  # one update of the statistics


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_have_the_gradients_of_the_undivided_batch(world: Callable[[int], World], backend: str) -> None:
    batches = [a_batch(7), a_batch(9), a_batch(7), a_batch(11), a_batch(9)]
    sizes = [SIZES, [5, 4], SIZES, [8, 3], [4, 5]]
    shards = [split(x, own) for x, own in zip(batches, sizes, strict=True)]
    totals = [len(x) for x in batches]
    results = world(2).run(
        steps.compiled, [[own[rank] for own in shards] for rank in range(2)], [totals] * 2, [backend] * 2
    )
    model = steps.a_model()
    for step, x in enumerate(batches):
        expected = steps.gradients_of(model, x)
        for name, gradient in expected.items():
            found = sum(gradients[step][name] for gradients, _, _ in results)
            np.testing.assert_allclose(found, gradient, 1e-4, 1e-5, err_msg=f"{name}, step {step}")
    after = steps.state(model[1].layer)
    assert_same_bits([entries for _, entries, _ in results])
    for _, entries, frames in results:
        for key, value in after.items():
            assert_near(entries[key], value, "float32")
        assert frames[0] == 1
        assert frames[-1] <= 2  # once more for other numbers of rows


@pytest.mark.parametrize("needed", [[True, False], [False, True], [False, False]])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_rank_without_a_gradient_of_x_takes_part(
    world: Callable[[int], World], backend: str, needed: list[bool]
) -> None:
    x, dy = data(7, "float32")
    whole = steps.train(x, dy, None, "autograd", "float32", group=None)
    arguments = split(x, SIZES), split(dy, SIZES), [needed] * 2, [backend] * 2
    results = world(2).run(steps.compiled_without_gradients, *arguments)
    assert [error for error, *_ in results] == ["no error"] * 2
    assert_near(sum(dweight for _, dweight, _ in results), whole["dweight"], "float32")
    for (_, _, dx), is_needed, expected in zip(results, needed, np.split(whole["dx"], [SIZES[0]]), strict=True):
        if is_needed:
            assert_near(dx, expected, "float32")


def test_compiled_steps_fail_together() -> None:
    with World(2) as world:
        first, second = world.run(steps.compiled_faults)
    assert "failed elsewhere, and changed nothing: rank 1: ValueError: x has shape (4, 2)" in first[0]
    for error in (first[1], second[1]):
        assert "step 1 (compiled or transformed), 3 channels in float32, of layer" in error
    assert "rank 0: rank 1 did not come" in first[2]


# Random steps and faults: tests/backends/torch_replica_faults.py runs many more.


@pytest.mark.parametrize("size", [2, 3, 4])
def test_random_steps_leave_the_same_bits_on_all_ranks(world: Callable[[int], World], size: int) -> None:
    bits = world(size).run(steps.random_steps, [size] * size, [12] * size)
    assert all(own == bits[0] for own in bits)
    assert len(set(bits[0])) > 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", steps.FAULTS)
def test_faults_neither_hang_nor_tear_a_state(kind: str) -> None:
    from torch_replica_faults import flaws

    for number in range(2):
        assert flaws(kind, number) == []
