"""Damaged and wrong files: each is refused in one sentence, and none of its contents is used."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

import mbn
from mbn.conformance.target import configured
from mbn.state import files

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a saved layer."""
    configured(mbn.BatchNorm1d(2, momentum=0.25), seed=1).freeze().save(tmp_path / "bn.safetensors")
    return tmp_path / "bn.safetensors"


def loaded(path: Path) -> Any:
    """Return the snapshot of a loaded layer, comparable to the bit; or None if the file is refused."""
    try:
        snapshot = mbn.BatchNorm1d.load(path)._snapshot()
    except ValueError:
        return None
    entries = [(key, value.dtype, value.tobytes()) for key, value in snapshot.entries.items()]
    return snapshot._replace(entries=entries)


def forge(path: Path, change: Change) -> None:
    """Change the contents of a file, and make its checksum fit."""
    arguments, entries, training, frozen, _ = files.read(path)
    described = {"version": files.VERSION, "arguments": arguments, "training": training, "frozen": frozen}
    change(described, entries)
    described["checksum"] = files._checksum(described, entries)
    path.write_bytes(save(entries, {files.KEY: json.dumps(described)}))


def test_every_truncation_is_refused(path: Path) -> None:
    intact = path.read_bytes()
    assert loaded(path) is not None
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        assert loaded(path) is None


@pytest.mark.slow
def test_every_flipped_bit_is_refused_or_harmless(path: Path) -> None:
    intact, expected = path.read_bytes(), loaded(path)
    refused = 0
    for position in range(len(intact)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ flip]) + intact[position + 1 :])
            found = loaded(path)
            assert found in (None, expected)
            refused += found is None
    assert refused > 0.99 * 9 * len(intact)


def test_appended_bytes_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert loaded(path) is None


def test_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mbn.BatchNorm1d.load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        mbn.BatchNorm1d.load(tmp_path)


class Trap:
    """An object whose unpickling would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_pickle_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "bn").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(
        ValueError, match=r"/bn holds no layer: it is damaged or no safetensors file \(.*\)\. .*from_checkpoint"
    ):
        mbn.BatchNorm1d.load(tmp_path / "bn")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_safetensors_of_another_origin_are_refused_with_a_hint(path: Path, metadata: dict[str, str] | None) -> None:
    entries = load_file(path)
    save_file(entries, path, metadata)
    with pytest.raises(
        ValueError, match=r"not from BatchNorm1d\.save.* mbn\.BatchNorm1d\.from_checkpoint\(path, prefix\)"
    ):
        mbn.BatchNorm1d.load(path)
    bn = mbn.BatchNorm1d(None)
    bn.load_state_dict(load_file(path))
    np.testing.assert_array_equal(bn.running_var, entries["running_var"])


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", "1", "null", '"text"', "{}", '{"version": NaN}', '{"version": 1}']
)
def test_wrong_descriptions_are_refused(path: Path, text: str) -> None:
    save_file(load_file(path), path, {files.KEY: text})
    with pytest.raises(ValueError, match="its description (is damaged|has missing or unexpected entries)"):
        mbn.BatchNorm1d.load(path)


def test_later_format_version_is_refused(path: Path) -> None:
    save_file(load_file(path), path, {files.KEY: '{"version": 2, "layers": []}'})
    with pytest.raises(ValueError, match="format is version 2, and this mbn reads version 1: install a newer mbn"):
        mbn.BatchNorm1d.load(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_features", "2", "num_features is '2', and should be of type int"),
        ("num_features", 2.0, "type int"),
        ("num_features", True, "type int"),
        ("num_features", None, "type int"),
        ("num_features", 0, "at least 1, not 0"),
        ("num_features", 3, r"weight is F32 of shape \(2,\), and should be F32 of shape \(3,\)"),
        ("num_features", 10**30, "num_features is the number of channels C of the input, at most"),
        ("dtype", None, "dtype is None, and should be of type str"),
        ("dtype", "float16", "dtype is 'float16', and should be float32 or float64"),
        ("dtype", "float64", r"weight is F32 of shape \(2,\), and should be F64"),
        ("eps", 1, "eps is 1, and should be of type float"),
        ("eps", -1e-5, "eps is added to a variance"),
        ("eps", float("nan"), "eps is added to a variance"),
        ("momentum", "None", "momentum is 'None', and should be of type float"),
        ("momentum", float("inf"), "momentum is the weight of the new value and is finite"),
        ("axis", 2, "axis is 1 for"),
        ("axis", True, "axis is True, and should be of type int"),
        ("correction", 2, "correction is 1 for"),
        ("affine", 1, "affine is 1, and should be of type bool"),
        ("affine", False, r"bias is F32 of shape \(2,\), and should be absent"),
        ("bias", [], r"bias is \[\], and should be of type bool"),
        ("bias", False, "bias is F32"),
        ("track_running_stats", {}, "track_running_stats is {}, and should be of type bool"),
        ("track_running_stats", False, "no running statistics for freeze"),
        ("backend", "torch", r"list of arguments has missing or unexpected entries: \['backend'\]"),
    ],
)
def test_wrong_arguments_are_refused(path: Path, name: str, value: Any, words: str) -> None:
    forge(path, lambda described, _: described["arguments"].update({name: value}))
    with pytest.raises(ValueError, match=f"^{path} holds no layer that can be loaded: .*{words}"):
        mbn.BatchNorm1d.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda described, _: described.update(training=1), "training is 1, and should be of type bool"),
        (lambda described, _: described.update(frozen=None), "frozen is None, and should be of type bool"),
        (lambda described, _: described.update(arguments=[]), r"arguments is \[\], and should be of type dict"),
        (lambda described, _: described.update(extra=1), r"missing or unexpected entries: \['extra'\]"),
        (lambda described, _: described.pop("training"), r"missing or unexpected entries: \['training'\]"),
        (lambda described, _: described["arguments"].pop("eps"), r"missing or unexpected entries: \['eps'\]"),
        (lambda _, entries: entries.pop("bias"), r"bias is absent, and should be F32 of shape \(2,\)"),
        (lambda _, entries: entries.update(gamma=np.ones(2)), r"gamma is F64 of shape \(2,\), and should be absent"),
        (lambda _, entries: entries.update(bias=np.ones((2, 1), np.float32)), r"bias is F32 of shape \(2, 1\)"),
        (lambda _, entries: entries.update(bias=np.ones(2, np.float16)), r"bias is F16 of shape \(2,\)"),
        (lambda _, entries: entries.update(num_batches_tracked=np.array(1, np.int32)), r"num_batches_tracked is I32"),
        (lambda _, entries: entries.update(num_batches_tracked=np.array(-1)), "at least 0, not -1"),
    ],
)
def test_wrong_contents_are_refused(path: Path, change: Change, words: str) -> None:
    forge(path, change)
    with pytest.raises(ValueError, match=f"^{path} holds no layer that can be loaded: .*{words}"):
        mbn.BatchNorm1d.load(path)


def test_arrays_of_another_file_are_refused(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    entries = load_file(path)
    save_file({**entries, "bias": entries["bias"] + 1}, path, metadata)
    with pytest.raises(ValueError, match="its checksum does not match its contents"):
        mbn.BatchNorm1d.load(path)
