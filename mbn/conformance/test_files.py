"""Files: a layer that was saved on one backend has the same bits when it is loaded on any other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.target import Target, assert_same, configured
from mbn.contract import dtype_name

X = np.random.default_rng(14).normal(2, 3, (9, 4)).astype(np.float32)
LAYERS: list[dict[str, Any]] = [
    {},
    {"eps": 0.0, "momentum": None, "correction": 0},
    {"eps": 1 / 3, "momentum": 0.1 + 0.2, "axis": -1},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_saved_layer_loads_unchanged_on_any_backend(target: Target, arguments: dict[str, Any], tmp_path: Path) -> None:
    bn = configured(target.layer(4, **arguments), seed=1)
    bn(target.array(X))
    bn.save(tmp_path / "bn")
    on_host = mbn.BatchNorm1d.load(tmp_path / "bn", backend="numpy")
    on_host.save(tmp_path / "from the host")
    loaded = mbn.BatchNorm1d.load(tmp_path / "from the host", backend=target.backend, device=target.device)
    assert repr(loaded) == repr(bn)
    assert_same(target.snapshot(bn), target.snapshot(loaded))
    for key, value in on_host.state_dict().items():
        np.testing.assert_array_equal(value, target.numpy(bn.state_dict()[key]), err_msg=key)
    np.testing.assert_array_equal(target.numpy(loaded(target.array(X))), target.numpy(bn(target.array(X))))
    assert_same(target.snapshot(bn), target.snapshot(loaded))  # after one more training step of both


def test_saved_float64_layer_loads_unchanged_on_any_backend(target: Target, tmp_path: Path) -> None:
    target.require_dtype("float64")
    bn = configured(target.layer(4, dtype="float64"), seed=2)
    bn(target.array(X / 3.0))
    bn.save(tmp_path / "bn")
    loaded = mbn.BatchNorm1d.load(tmp_path / "bn", backend=target.backend, device=target.device)
    assert_same(target.snapshot(bn), target.snapshot(loaded))
    for key, value in mbn.BatchNorm1d.load(tmp_path / "bn", backend="numpy").state_dict().items():
        np.testing.assert_array_equal(value, target.numpy(bn.state_dict()[key]), err_msg=key)


def test_saved_file_has_the_same_bytes_on_every_backend(target: Target, tmp_path: Path) -> None:
    bn = configured(target.layer(4), seed=3)
    twin = mbn.BatchNorm1d(4, backend="numpy")
    twin.load_state_dict(target.snapshot(bn))
    bn.save(tmp_path / "bn")
    twin.save(tmp_path / "twin")
    assert (tmp_path / "bn").read_bytes() == (tmp_path / "twin").read_bytes()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_saved_layer_keeps_its_modes(target: Target, tmp_path: Path, *, training: bool, frozen: bool) -> None:
    bn = configured(target.layer(4), seed=4).train(training)
    if frozen:
        bn.freeze()
    bn.save(tmp_path / "bn")
    loaded = mbn.BatchNorm1d.load(tmp_path / "bn", backend=target.backend, device=target.device)
    assert loaded.training is training
    before = target.snapshot(loaded)
    np.testing.assert_array_equal(target.numpy(loaded(target.array(X))), target.numpy(bn(target.array(X))))
    learns = training and not frozen
    assert int(loaded.num_batches_tracked) == int(before["num_batches_tracked"]) + learns


def test_load_puts_the_arrays_on_the_given_device(target: Target, tmp_path: Path) -> None:
    configured(target.layer(4), seed=5).save(tmp_path / "bn")
    for device in target.capabilities.devices:
        loaded = mbn.BatchNorm1d.load(tmp_path / "bn", backend=target.backend, device=device)
        there = target.backend.device(target.backend.asarray(X, device=device))
        assert all(target.backend.device(value) == there for value in loaded.state_dict().values())
    with pytest.raises(ValueError):  # noqa: PT011 - every framework has its own message
        mbn.BatchNorm1d.load(tmp_path / "bn", backend=target.backend, device="nowhere")


def test_load_keeps_or_rejects_a_large_num_batches_tracked(target: Target, tmp_path: Path) -> None:
    bn = mbn.BatchNorm1d(4, backend="numpy")
    bn.num_batches_tracked = 2**40
    bn.save(tmp_path / "bn")
    if dtype_name(target.layer(4).num_batches_tracked.dtype) == "int64":
        loaded = mbn.BatchNorm1d.load(tmp_path / "bn", backend=target.backend, device=target.device)
        assert int(loaded.num_batches_tracked) == 2**40
        return
    with pytest.raises(ValueError, match="num_batches_tracked counts batches and is at least 0 and at most"):
        mbn.BatchNorm1d.load(tmp_path / "bn", backend=target.backend, device=target.device)


def test_save_rejects_a_layer_with_unknown_num_features(target: Target, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="num_features is not known yet"):
        target.layer(None).save(tmp_path / "bn")
    assert list(tmp_path.iterdir()) == []
