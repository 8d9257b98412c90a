"""State: the entries of a layer, the operations that change them, and that no other operation does."""

import copy
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbn
from mbn.conformance import oracle, strategies
from mbn.conformance.target import Target, assert_same, configured
from mbn.contract import State

X = np.random.default_rng(12).normal(2, 3, (9, 4)).astype(np.float32)
STEPS = ["train", "train", "evaluate", "load", "reset", "freeze", "unfreeze"]


@given(data=st.data())
def test_any_sequence_of_steps_gives_the_exact_state(target: Target, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(5, 3), (4, 3, 2)]))
    momentum = data.draw(st.sampled_from([None, 0.1, 1.0]))
    bn = target.layer(3, momentum=momentum)
    count, frozen = 0, False
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7)):
        before = target.snapshot(bn)
        if step in {"train", "evaluate"}:
            batch = data.draw(strategies.batches(frozenset({"float32"}), shape))
            learns = step == "train" and not frozen
            count += learns
            _assert_step(target, bn.train(step == "train"), batch.x, before, learns=learns, count=count)
            continue
        if step == "load":
            count = data.draw(st.integers(0, 9))
            entries = target.snapshot(configured(target.layer(3), seed=count))
            bn.load_state_dict({**entries, "num_batches_tracked": np.array(count)})
        elif step == "reset":
            count = 0
            bn.reset_running_stats()
            assert target.numpy(bn.running_mean).tolist() == [0, 0, 0]
            assert target.numpy(bn.running_var).tolist() == [1, 1, 1]
        else:
            frozen = step == "freeze"
            (bn.freeze if frozen else bn.unfreeze)()
        assert int(bn.num_batches_tracked) == count


def _assert_step(
    target: Target, bn: mbn.BatchNorm1d, x: np.ndarray, before: dict[str, np.ndarray], *, learns: bool, count: int
) -> None:
    y = bn(target.array(x))
    after = target.snapshot(bn)
    values = before["running_mean"], before["running_var"], before["weight"], before["bias"]
    if not learns:
        target.assert_output(y, oracle.evaluate(x, *values, eps=bn.eps), "float32")
        assert_same(before, after)
        return
    momentum = 1 / count if bn.momentum is None else bn.momentum
    exact = oracle.train(x, *values, momentum=momentum, eps=bn.eps)
    target.assert_output(y, exact.y, "float32")
    target.assert_statistic(target.array(after["running_mean"]), exact.running_mean, "float32")
    target.assert_statistic(target.array(after["running_var"]), exact.running_var, "float32")
    assert int(after["num_batches_tracked"]) == count


def test_state_dict_has_the_keys_shapes_and_order_of_torch(target: Target) -> None:
    entries = target.snapshot(target.layer(4))
    assert [(key, value.shape) for key, value in entries.items()] == [
        ("weight", (4,)),
        ("bias", (4,)),
        ("running_mean", (4,)),
        ("running_var", (4,)),
        ("num_batches_tracked", ()),
    ]
    assert [value.tolist() for value in entries.values()] == [[1] * 4, [0] * 4, [0] * 4, [1] * 4, 0]


def test_load_state_dict_copies_all_entries(target: Target) -> None:
    source, copied = configured(target.layer(4), seed=1), target.layer(4)
    assert copied.load_state_dict(source.state_dict()) == ([], [])
    assert_same(target.snapshot(source), target.snapshot(copied))
    source(target.array(X))
    assert int(copied.num_batches_tracked) == 3  # a load copies: the two layers share no array
    lazy = target.layer(None)
    lazy.load_state_dict(source.state_dict())
    assert_same(target.snapshot(source), target.snapshot(lazy))


def test_state_dict_is_a_copy(target: Target) -> None:
    bn = configured(target.layer(4), seed=1)
    before = target.snapshot(bn)
    entries = bn.state_dict()
    bn(target.array(X))
    assert_same(before, {key: target.numpy(value) for key, value in entries.items()})
    if not target.capabilities.mutable:
        pytest.skip(f"{target.backend.name} declares immutable arrays")
    before = target.snapshot(bn)
    for value in bn.state_dict().values():
        value[...] = 7
    assert_same(before, target.snapshot(bn))


def test_load_state_dict_that_is_not_strict_loads_the_known_entries(target: Target) -> None:
    bn = target.layer(4)
    result = bn.load_state_dict({"weight": np.full(4, 2.0), "gamma": np.ones(4)}, strict=False)
    assert result.missing_keys == ["bias", "running_mean", "running_var"]
    assert result.unexpected_keys == ["gamma"]
    assert target.numpy(bn.weight).tolist() == [2] * 4


def versioned(entries: dict[str, np.ndarray], version: int | None) -> OrderedDict[str, np.ndarray]:
    """Return entries with a version in ``_metadata``, as in the state_dict of Torch's modules."""
    result = OrderedDict(entries)
    vars(result)["_metadata"] = OrderedDict({"": {} if version is None else {"version": version}})
    return result


def test_state_dict_has_version_2(target: Target) -> None:
    assert vars(target.layer(4).state_dict())["_metadata"] == {"": {"version": 2}}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("version", ["none", None, 1])
def test_num_batches_tracked_may_be_missing_before_version_2(target: Target, version: Any, *, strict: bool) -> None:
    bn = configured(target.layer(4), seed=1)
    bn.num_batches_tracked = 7
    entries = target.snapshot(configured(target.layer(4), seed=2))
    del entries["num_batches_tracked"]
    result = bn.load_state_dict(entries if version == "none" else versioned(entries, version), strict=strict)
    assert result == ([], [])
    assert_same({**entries, "num_batches_tracked": target.numpy(bn.num_batches_tracked)}, target.snapshot(bn))
    assert int(bn.num_batches_tracked) == 7


def test_num_batches_tracked_missing_in_version_2_is_reported(target: Target) -> None:
    bn = configured(target.layer(4), seed=1)
    entries = target.snapshot(configured(target.layer(4), seed=2))
    del entries["num_batches_tracked"]
    assert bn.load_state_dict(versioned(entries, 2), strict=False).missing_keys == ["num_batches_tracked"]
    assert int(bn.num_batches_tracked) == 3


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_assigned_entries_keep_the_dtype_and_shape_of_the_layer(target: Target, name: str) -> None:
    bn = target.layer(4)
    values = np.array([1, 2, 3, 4])
    for given_value in (values, target.array(values.astype(np.float32)), values.astype(float)):
        setattr(bn, name, given_value)
        stored = target.numpy(getattr(bn, name))
        assert stored.dtype == np.float32
        assert stored.tolist() == [1, 2, 3, 4]
    setattr(bn, name, 7)
    assert target.numpy(getattr(bn, name)).tolist() == [7] * 4


def test_arrays_have_the_names_of_torch(target: Target) -> None:
    bn = configured(target.layer(4), seed=1)
    named = dict(bn.named_parameters()) | dict(bn.named_buffers())
    assert list(named) == list(bn.state_dict())
    assert all(value is getattr(bn, name) for name, value in named.items())
    without = target.layer(4, bias=False, track_running_stats=False)
    assert [name for name, _ in (*without.named_parameters(), *without.named_buffers())] == ["weight"]


def test_params_and_state_are_set_together(target: Target) -> None:
    bn, source = target.layer(4), configured(target.layer(4), seed=1)
    expected = target.snapshot(source)
    bn.params, bn.state = source.params, source.state
    assert_same(expected, target.snapshot(bn))
    source(target.array(X))
    source.params = (7, 7)
    assert_same(expected, target.snapshot(bn))  # the arrays are copies
    bn.params, bn.state = target.layer(4).params, tuple(np.full(shape, 2) for shape in ((4,), (4,), ()))
    assert [value.tolist() for value in target.snapshot(bn).values()] == [[1] * 4, [0] * 4, [2] * 4, [2] * 4, 2]


def test_refused_params_and_state_change_nothing(target: Target) -> None:
    bn = configured(target.layer(4), seed=1)
    before = target.snapshot(bn)
    five = target.array(np.full(4, 5, np.float32))
    with pytest.raises(ValueError, match="bias has shape"):
        bn.params = (five, target.array(np.ones(3, np.float32)))
    with pytest.raises(ValueError, match="running_var"):
        bn.state = (five, -five, 1)
    assert_same(before, target.snapshot(bn))


def test_a_layer_moves_to_the_device_and_dtype_of_another(target: Target) -> None:
    bn = configured(target.layer(4), seed=1)
    other = mbn.BatchNorm1d(4, backend=target.backend).to(device=bn.device, dtype=bn.dtype)
    assert (other.device, other.dtype) == (bn.device, bn.dtype)
    for name, value in (*bn.named_parameters(), *bn.named_buffers()):
        assert target.backend.device(getattr(other, name)) == target.backend.device(value)
    other.params, other.state = bn.params, bn.state
    np.testing.assert_array_equal(target.numpy(other(target.array(X))), target.numpy(bn(target.array(X))))


def test_assigned_arrays_are_copied(target: Target) -> None:
    bn = target.layer(4).eval()
    values = np.full(4, 5, np.float32)
    bn.running_mean = values
    values[:] = 99
    assert target.numpy(bn.running_mean).tolist() == [5] * 4


def test_assigned_statistics_are_used_in_evaluation(target: Target) -> None:
    bn = target.layer(4, eps=0.0).eval()
    bn(target.array(X))
    bn.running_mean = 10
    np.testing.assert_array_equal(target.numpy(bn(target.array(X))), X - 10)


def test_edits_in_place_are_used_in_evaluation(target: Target) -> None:
    if not target.capabilities.mutable:
        pytest.skip(f"{target.backend.name} declares immutable arrays")
    bn = target.layer(4, eps=0.0).eval()
    bn.running_mean[:] = 10
    np.testing.assert_array_equal(target.numpy(bn(target.array(X))), X - 10)


@pytest.mark.parametrize("training", [True, False])
def test_call_does_not_write_to_its_arguments(target: Target, *, training: bool) -> None:
    bn = configured(target.layer(4), seed=2).train(training)
    x = target.array(X)
    held = bn.params, bn.state
    before = [target.numpy(value) for group in held for value in group]
    bn(x)
    bn.apply(*held, x, training=training)
    np.testing.assert_array_equal(target.numpy(x), X)
    for value, old in zip([value for group in held for value in group], before, strict=True):
        np.testing.assert_array_equal(target.numpy(value), old)


def test_host_input_is_neither_written_to_nor_kept(target: Target) -> None:
    x = X.copy()
    bn = target.layer(4)
    for _ in range(2):
        bn(x)
    np.testing.assert_array_equal(x, X)
    y = target.numpy(bn(x))
    x[:] = 0
    bn.eval()
    assert not np.array_equal(y, target.numpy(bn(x)))


def test_evaluation_keeps_the_state(target: Target) -> None:
    bn = configured(target.layer(4), seed=3).eval()
    before = target.snapshot(bn)
    bn(target.array(X))
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))],  # noqa: S301 - its own pickle
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(
    target: Target, duplicate: Callable[[mbn.BatchNorm1d], mbn.BatchNorm1d]
) -> None:
    bn = configured(target.layer(4, momentum=0.5), seed=4)
    twin = duplicate(bn)
    assert repr(twin) == repr(bn)
    before = target.snapshot(bn)
    assert_same(before, target.snapshot(twin))
    y = target.numpy(twin(target.array(X)))
    assert_same(before, target.snapshot(bn))  # only the copy has learnt
    np.testing.assert_array_equal(target.numpy(bn(target.array(X))), y)


def test_reset_parameters_restores_the_initial_state(target: Target) -> None:
    bn = configured(target.layer(4), seed=5)
    bn.reset_parameters()
    assert_same(target.snapshot(target.layer(4)), target.snapshot(bn))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["plain", "masked", "empty", "traced", "vjp"])
def test_num_batches_tracked_stays_at_its_limit(target: Target, kind: str, momentum: float | None) -> None:
    bn = target.layer(4, momentum=momentum)
    limit = np.iinfo(target.numpy(bn.num_batches_tracked).dtype).max
    bn.num_batches_tracked = limit - 1
    x, arguments = target.array(X[:0] if kind == "empty" else X), {}
    if kind == "masked":
        target.require("masks")
        arguments["mask"] = target.array(np.arange(9) > 1)
    if kind == "traced" and not target.capabilities.compile:
        target.require("jit")
    step: Any = bn.vjp if kind == "vjp" else partial(bn, **arguments)
    for _ in range(3):
        if kind == "traced" and target.capabilities.jit:
            run = target.transforms.jit(partial(bn.apply, training=True))
            bn.load_state_dict({**bn.state_dict(), **run(bn.params, bn.state, x)[1]._asdict()})
        else:
            (target.transforms.compile(step) if kind == "traced" else step)(x)
        assert int(bn.num_batches_tracked) == limit
    entries = target.snapshot(bn)
    bn.load_state_dict(entries)
    assert_same(entries, target.snapshot(bn))


CHANGES: dict[str, Callable[[Target, mbn.BatchNorm1d], object]] = {
    "reset_parameters": lambda _, bn: bn.reset_parameters(),
    "reset_running_stats": lambda _, bn: bn.reset_running_stats(),
    "load_state_dict": lambda target, bn: bn.load_state_dict(target.snapshot(configured(target.layer(4), seed=9))),
    "fit": lambda target, bn: bn.fit([target.array(X)], progress=False),
    "weight": lambda _, bn: setattr(bn, "weight", 5.0),
    "running_var": lambda _, bn: setattr(bn, "running_var", 5.0),
    "params": lambda _, bn: setattr(bn, "params", (5.0, 6.0)),
    "state": lambda _, bn: setattr(bn, "state", (5.0, 6.0, 7)),
    "a call": lambda target, bn: bn(target.array(X)),
}


def interrupted(target: Target, at: int, change: Callable[[], object]) -> int:
    """Make a change, interrupted after ``at`` executed lines; return how many lines were executed.

    Only lines of the layer, its storage and the backend count: no other file stores values.
    """
    names, lines = ("mbn.layer", "mbn.state.storage", type(target.backend).__module__), 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_globals.get("__name__") not in names:
            return None
        lines += event == "line"
        if lines > at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            change()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_change_is_complete_or_absent(target: Target, name: str, *, shared: bool) -> None:
    if shared:
        target.require("modules")

    def changed(at: int) -> tuple[dict[str, np.ndarray], int]:
        bn = configured(target.layer(4), seed=8)
        module = bn.as_module() if shared else None
        lines = interrupted(target, at, partial(CHANGES[name], target, bn))
        del module  # keep the module, which shares the layer's arrays, alive until here
        return target.snapshot(bn), lines

    (before, _), (after, lines) = changed(0), changed(sys.maxsize)
    key = next(key for key, value in before.items() if not np.array_equal(value, after[key]))
    for at in (*range(1, lines - 30, 25), *range(max(lines - 30, 1), lines)):  # the last lines store the values
        found, _ = changed(at)
        assert_same(after if np.array_equal(found[key], after[key]) else before, found)


def test_concurrent_reader_sees_no_mixed_state(target: Target) -> None:
    bn = target.layer(4)
    entries = [{key: np.full_like(value, k) for key, value in target.snapshot(bn).items()} for k in (1, 2)]
    bn.load_state_dict(entries[0])
    done = threading.Event()

    def read() -> set[tuple[float, ...]]:
        seen = set()
        while not done.is_set():
            for held in (target.snapshot(bn), bn._snapshot().entries):  # noqa: SLF001 - save() writes these entries
                seen.add(tuple(float(value.reshape(-1)[0]) for value in held.values()))
        return seen

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read)
            for k in range(100):
                bn.load_state_dict(entries[k % 2])
            done.set()
            assert reader.result() <= {(1.0,) * 5, (2.0,) * 5}
    finally:
        done.set()
        sys.setswitchinterval(interval)


def test_load_during_a_step_is_not_lost(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    bn, other = target.layer(4), configured(target.layer(4), seed=10)
    stores = type(target.backend).stores

    def load_first(*arguments: Any) -> bool:
        bn.load_state_dict(other.state_dict())  # as another thread might
        return stores(*arguments)

    monkeypatch.setattr(type(target.backend), "stores", load_first)
    bn(target.array(np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)))
    assert_same(target.snapshot(other), target.snapshot(bn))


@pytest.mark.parametrize("num_features", [None, 4])
def test_settings_changed_during_a_load_are_not_lost(target: Target, num_features: int | None) -> None:
    bn = target.layer(num_features)

    class Entries(dict[str, np.ndarray]):
        def __getitem__(self, key: str) -> np.ndarray:
            bn.eval().momentum = 0.5  # as another thread might
            return super().__getitem__(key)

    entries = target.snapshot(configured(target.layer(4), seed=9))
    bn.load_state_dict(Entries(entries))
    assert_same(entries, target.snapshot(bn))
    assert (bn.training, bn.momentum) == (False, 0.5)


def test_modes_and_settings_changed_during_the_first_call_are_not_lost(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    bn = target.layer(None)
    stores = type(target.backend).stores

    def change_first(*arguments: Any) -> bool:
        bn.freeze().eval().momentum = 0.5  # as another thread might
        return stores(*arguments)

    monkeypatch.setattr(type(target.backend), "stores", change_first)
    bn(target.array(np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)))
    assert (bn.training, bn.momentum, int(bn.num_batches_tracked)) == (False, 0.5, 1)
    before = target.snapshot(bn)
    bn.train()(target.array(np.ones((8, 4), np.float32)))
    assert_same(before, target.snapshot(bn))


def test_concurrent_evaluations_agree(target: Target) -> None:
    bn = configured(target.layer(4), seed=6).eval()
    expected = target.numpy(bn(target.array(X)))
    before = target.snapshot(bn)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: target.numpy(bn(target.array(X))), range(64)))
    for y in outputs:
        np.testing.assert_array_equal(y, expected)
    assert_same(before, target.snapshot(bn))


def test_concurrent_training_never_mixes_updates(target: Target) -> None:
    bn = target.layer(1, momentum=1.0)
    inputs = [target.array(np.array([[0], [2 * k]], np.float32)) for k in range(1, 33)]  # mean k, variance 2k²
    bn(inputs[0])
    seen: list[State] = []

    def train(x: object) -> None:
        bn(x)
        seen.append(bn.state)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(train, inputs * 4))
    for state in [*seen, bn.state]:
        mean, var = target.numpy(state.running_mean), target.numpy(state.running_var)
        np.testing.assert_allclose(var, 2 * mean**2, rtol=1e-6)
