"""Modules: the module of a layer, ``as_module()``, computes and learns the same as the layer."""

import copy
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.target import Target, assert_same, configured

X = np.random.default_rng(20).normal(2, 3, (9, 4)).astype(np.float32)
LAYERS: list[dict[str, Any]] = [
    {},
    {"momentum": None, "correction": 0},
    {"axis": -1, "eps": 0.0},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
]


def snapshot(target: Target, module: Any) -> dict[str, np.ndarray]:
    """Return copies of all entries of a module, which are arrays or the framework's variables."""
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    held = {name: getattr(module, name) for name in names}
    return {name: target.numpy(value[...]) for name, value in held.items() if value is not None}


def pair(target: Target, **arguments: Any) -> tuple[mbn.BatchNorm1d, Any]:
    """Return a layer, and the module of an equal layer."""
    target.require("modules")
    bn = configured(target.layer(4, **arguments), seed=1)
    return bn, copy.deepcopy(bn).as_module()


@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_module_computes_and_learns_as_the_layer_does(target: Target, arguments: dict[str, Any]) -> None:
    bn, module = pair(target, **arguments)
    assert_same(target.snapshot(bn), snapshot(target, module))
    for mode, scale in [("train", 1), ("eval", 2), ("train", 3)]:
        getattr(bn, mode)()
        getattr(module, mode)()
        x = X * np.float32(scale)
        np.testing.assert_array_equal(target.numpy(module(target.array(x))), target.numpy(bn(target.array(x))))
        assert_same(target.snapshot(bn), snapshot(target, module))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_module_starts_in_the_mode_of_the_layer(target: Target, mode: str) -> None:
    target.require("modules")
    bn = getattr(configured(target.layer(4), seed=2), mode)()
    module = bn.as_module()
    before = target.snapshot(bn)
    module(target.array(X))
    learnt = int(snapshot(target, module)["num_batches_tracked"]) - int(before["num_batches_tracked"])
    assert learnt == (mode == "train")


def test_frozen_layer_makes_a_frozen_module(target: Target) -> None:
    target.require("modules")
    module = configured(target.layer(4), seed=3).freeze().as_module()
    module.train()
    before = snapshot(target, module)
    module(target.array(X))
    assert_same(before, snapshot(target, module))


def test_module_passes_masks_to_the_layer(target: Target) -> None:
    target.require("masks")
    bn, module = pair(target)
    mask = np.arange(9) % 3 > 0
    x = np.where(mask[:, None], X, np.float32(np.nan))
    y, expected = module(target.array(x), mask=target.array(mask)), bn(target.array(x), mask=target.array(mask))
    np.testing.assert_array_equal(target.numpy(y), target.numpy(expected))
    assert_same(target.snapshot(bn), snapshot(target, module))


@pytest.mark.parametrize(
    ("x", "error"),
    [(X[:, :3], ValueError), (X[0], ValueError), (X[:1], ValueError), (X.astype(int), TypeError)],
    ids=["channels", "axes", "one value", "integers"],
)
def test_rejected_call_leaves_the_module_unchanged(target: Target, x: np.ndarray, error: type[Exception]) -> None:
    _, module = pair(target)
    module.train()
    before = snapshot(target, module)
    with pytest.raises(error):
        module(target.array(x))
    assert_same(before, snapshot(target, module))


def test_module_and_layer_share_their_arrays(target: Target) -> None:
    target.require("modules")
    if not target.capabilities.mutable:
        pytest.skip(f"{target.backend.name} declares immutable arrays")
    bn = configured(target.layer(4), seed=4)
    module = bn.as_module()

    def step(called: Any) -> None:
        before = target.snapshot(bn)
        called()
        assert not np.array_equal(before["running_var"], target.snapshot(bn)["running_var"])
        assert_same(target.snapshot(bn), snapshot(target, module))

    module.train()
    step(lambda: module(target.array(X)))
    step(lambda: bn(target.array(2 * X)))
    step(lambda: bn.load_state_dict(configured(target.layer(4), seed=5).state_dict()))
    step(lambda: setattr(bn, "running_var", 7))
    step(lambda: bn.fit([target.array(X)], progress=False))
    step(bn.reset_parameters)


def test_module_leaves_a_layer_of_immutable_arrays_unchanged(target: Target) -> None:
    target.require("modules")
    if target.capabilities.mutable:
        pytest.skip(f"{target.backend.name} declares mutable arrays")
    bn = configured(target.layer(4), seed=6)
    before = target.snapshot(bn)
    bn.as_module()(target.array(X))
    assert_same(before, target.snapshot(bn))


def test_as_module_is_rejected_unless_modules_are_declared(target: Target) -> None:
    if target.capabilities.modules:
        pytest.skip(f"{target.backend.name} declares modules")
    with pytest.raises((TypeError, ImportError), match="modules"):
        target.layer(4).as_module()
