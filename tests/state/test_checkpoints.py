"""Checkpoints of models: one layer is read from the entries of all, in safetensors and torch; no code is executed."""

import sys
from pathlib import Path
from typing import Any

import frameworks
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import mbn

torch = frameworks.optional("torch")

PREFIX = "module.encoder.bn1."


def layer_entries(c: int, seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return the entries of one layer."""
    drawn = np.random.default_rng(seed).uniform(0.5, 2, (4, c)).astype(dtype)
    names = ("weight", "bias", "running_mean", "running_var")
    return {**dict(zip(names, drawn, strict=True)), "num_batches_tracked": np.array(seed, np.int64)}


def model_entries() -> dict[str, np.ndarray]:
    """Return the entries of a large model: 300 batch norms, and other layers between them."""
    entries = {f"{PREFIX}{key}": value for key, value in layer_entries(4, 7).items()}
    for k in range(300):
        entries |= {f"module.blocks.{k}.norm.{key}": value for key, value in layer_entries(3, k).items()}
        entries[f"module.blocks.{k}.fc.weight"] = np.ones((5, 3), np.float32)
    entries |= {f"{PREFIX[:-1]}0.{key}": value for key, value in layer_entries(2, 9).items()}
    return entries


def tensors(entries: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: torch.from_numpy(value.copy()) for key, value in entries.items()}


def assert_is(bn: mbn.BatchNorm1d, expected: dict[str, np.ndarray]) -> None:
    found = {key: mbn.to_numpy(value) for key, value in bn.state_dict().items()}
    assert list(found) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value.astype(found[key].dtype))


def nested(entries: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "plain": entries,
        "state_dict": {
            "epoch": 3,
            "state_dict": entries,
            "optimizer": {"state": {0: {"step": next(iter(entries.values()))}}},
        },
        "model": {"a": {"model": entries}},
    }[kind]


@pytest.fixture(params=["safetensors", "plain", "state_dict", "model", "legacy"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the path of a checkpoint of the model, of every kind."""
    if request.param == "safetensors":
        save_file(model_entries(), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"
    kind = "plain" if request.param == "legacy" else request.param
    is_zip = request.param != "legacy"
    torch.save(nested(tensors(model_entries()), kind), tmp_path / "model.pt", _use_new_zipfile_serialization=is_zip)
    return tmp_path / "model.pt"


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX[:-1]])
@pytest.mark.parametrize("backend", ["numpy", "torch", None])
def test_from_checkpoint_reads_the_layer_of_a_prefix(path: Path, prefix: str, backend: str | None) -> None:
    bn = mbn.BatchNorm1d.from_checkpoint(path, prefix, backend=backend, eps=1e-3, momentum=None)
    assert (bn.num_features, bn.eps, bn.momentum, bn.training, bn.backend) == (4, 1e-3, None, True, backend)
    assert_is(bn, layer_entries(4, 7))


def test_error_for_an_unknown_prefix_names_the_nearest(path: Path) -> None:
    for prefix, nearest in (
        ("encoder.bn1.", PREFIX),
        ("module.encoder.bn2", PREFIX),
        ("blocks.17.norm", "blocks.17.norm"),
    ):
        with pytest.raises(ValueError, match=f"no entries begin with '{prefix}'.*Did you mean .*{nearest}") as caught:
            mbn.BatchNorm1d.from_checkpoint(path, prefix)
        assert "and 297 more" in str(caught.value)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 800


def test_from_checkpoint_refuses_entries_of_other_layers(path: Path) -> None:
    with pytest.raises(ValueError, match="lack running_mean, .*track_running_stats=False.*Batch norms in it: '"):
        mbn.BatchNorm1d.from_checkpoint(path, "module.blocks.3.fc.")
    with pytest.raises(ValueError, match=r"weight has shape \(5, 3\)"):
        mbn.BatchNorm1d.from_checkpoint(path, "module.blocks.3.fc.", track_running_stats=False)
    with pytest.raises(TypeError, match="num_features is no setting"):
        mbn.BatchNorm1d.from_checkpoint(path, PREFIX, num_features=4)


@pytest.mark.parametrize("kind", ["plain", "state_dict", "model"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_load_state_dict_reads_the_layer_of_a_prefix(backend: str, kind: str) -> None:
    given = nested(model_entries() if backend == "numpy" else tensors(model_entries()), kind)
    for bn in (mbn.BatchNorm1d(4), mbn.BatchNorm1d(None, backend=backend)):
        assert bn.load_state_dict(given, prefix=PREFIX) == ([], [])
        assert_is(bn, layer_entries(4, 7))
    with pytest.raises(ValueError, match="no entries begin with 'encoder.bn1'.*Did you mean"):
        mbn.BatchNorm1d(4).load_state_dict(given, prefix="encoder.bn1")
    with pytest.raises(TypeError, match="prefix is a str, .*not int"):
        mbn.BatchNorm1d(4).load_state_dict(given, prefix=3)  # type: ignore[arg-type]


def test_load_state_dict_requires_the_entries_of_the_version_of_a_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    entries = model.state_dict()
    del entries["1.num_batches_tracked"]
    with pytest.raises(ValueError, match=r"missing 1\.num_batches_tracked"):
        mbn.BatchNorm1d(4).load_state_dict(entries, prefix="1.")
    mbn.BatchNorm1d(4).load_state_dict(dict(entries), prefix="1.")


def test_checkpoint_of_a_model_is_refused_without_a_prefix(path: Path) -> None:
    words = "Give prefix= to select one layer's entries.*Batch norms in it: '"
    with pytest.raises(ValueError, match=f"there are no entries of a layer alone.*{words}"):
        mbn.BatchNorm1d.from_checkpoint(path)
    with pytest.raises(ValueError, match=words):
        mbn.BatchNorm1d(4).load_state_dict(model_entries())
    with pytest.raises(ValueError, match="no weight or running_mean.*Batch norms in it: '"):
        mbn.BatchNorm1d(None).load_state_dict(model_entries())
    with pytest.raises(ValueError, match="missing module.blocks.3.fc.bias.*Batch norms in it: '"):
        mbn.BatchNorm1d(4).load_state_dict(model_entries(), prefix="module.blocks.3.fc")
    with pytest.raises(ValueError, match=r"from_checkpoint\(path, prefix\)"):
        mbn.BatchNorm1d.load(path)
    for given, words in (("m.pt", "From a file: mbn.BatchNorm1d.from_checkpoint"), (mbn.BatchNorm1d(4), "state_dict")):
        with pytest.raises(TypeError, match=rf"not (str|BatchNorm1d)\. .*{words}"):
            mbn.BatchNorm1d(4).load_state_dict(given)  # type: ignore[arg-type]


def test_from_checkpoint_refuses_a_file_of_save(tmp_path: Path) -> None:
    mbn.BatchNorm1d(4, eps=0.5).save(tmp_path / "bn.safetensors")
    with pytest.raises(
        ValueError, match=r"bn.safetensors: it is a layer of BatchNorm1d.save, .*BatchNorm1d\.load\(path"
    ):
        mbn.BatchNorm1d.from_checkpoint(tmp_path / "bn.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_floating_count_is_taken_if_it_is_an_integer(dtype: str, tmp_path: Path) -> None:
    entries = {f"bn.{key}": value.to(getattr(torch, dtype)) for key, value in tensors(layer_entries(4, 7)).items()}
    torch.save(entries, tmp_path / "m.pt")
    loaded = mbn.BatchNorm1d(4, backend="torch", dtype="float64")
    loaded.load_state_dict(entries, prefix="bn")
    for bn in (loaded, mbn.BatchNorm1d.from_checkpoint(tmp_path / "m.pt", "bn")):
        assert int(bn.num_batches_tracked) == 7
        assert mbn.contract.dtype_name(bn.num_batches_tracked.dtype) == "int64"
    for wrong in (1.5, float("inf"), float("nan")):
        entries["bn.num_batches_tracked"].fill_(wrong)
        torch.save(entries, tmp_path / "m.pt")
        with pytest.raises(TypeError, match=f"m.pt: bn.num_batches_tracked is made of integers, not {dtype}"):
            mbn.BatchNorm1d.from_checkpoint(tmp_path / "m.pt", "bn")


def test_errors_name_the_entry_and_the_file(tmp_path: Path) -> None:
    entries = tensors({f"bn.{key}": value for key, value in layer_entries(4, 7).items()})
    entries["bn.bias"] = entries["bn.bias"][:2]
    torch.save(entries, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt: bn\.bias has shape \(2,\)"):
        mbn.BatchNorm1d.from_checkpoint(tmp_path / "m.pt", "bn")
    with pytest.raises(ValueError, match=r"^bn\.bias has shape \(2,\)"):
        mbn.BatchNorm1d(4).load_state_dict(entries, prefix="bn")
    with pytest.raises(ValueError, match=r"unexpected bn\.weight, bn\.bias\."):
        mbn.BatchNorm1d(4, affine=False).load_state_dict(entries, prefix="bn")


def test_prefix_in_two_dictionaries_is_refused() -> None:
    given = {
        name: {f"bn.{key}": value for key, value in layer_entries(4, k).items()}
        for k, name in enumerate(("model", "ema"))
    }
    with pytest.raises(ValueError, match="several dictionaries.*'model.', 'ema.'"):
        mbn.BatchNorm1d(4).load_state_dict(given, prefix="bn.")
    bn = mbn.BatchNorm1d(4)
    bn.load_state_dict(given, prefix="ema.bn.")
    assert_is(bn, layer_entries(4, 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_from_checkpoint_takes_entries_of_any_precision(dtype: str, tmp_path: Path) -> None:
    entries = layer_entries(4, 5, getattr(ml_dtypes, dtype, dtype))
    torch.save(
        {
            f"bn.{key}": torch.tensor(value.astype(float)).to(getattr(torch, dtype) if value.ndim else torch.int64)
            for key, value in entries.items()
        },
        tmp_path / "model.pt",
    )
    from safetensors.torch import save_file as save_tensors

    save_tensors(torch.load(tmp_path / "model.pt", weights_only=True), tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        bn = mbn.BatchNorm1d.from_checkpoint(tmp_path / name, "bn", backend="numpy")
        assert bn.dtype == ("float64" if dtype == "float64" else "float32")
        assert_is(bn, entries)


def test_from_checkpoint_takes_a_layer_without_bias_or_weight(tmp_path: Path) -> None:
    entries = layer_entries(4, 5)
    for left_out, text in (("bias",), "bias=False"), (("weight", "bias"), "affine=False"):
        kept = {key: value for key, value in entries.items() if key not in left_out}
        save_file(kept, tmp_path / "model.safetensors")
        bn = mbn.BatchNorm1d.from_checkpoint(tmp_path / "model.safetensors")
        assert text in repr(bn)
        assert_is(bn, kept)


class Attack:
    """An object whose unpickling would execute code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("attacked"),)


def test_from_checkpoint_executes_no_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for is_zip in (True, False):
        torch.save({"bn.weight": Attack()}, "model.pt", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(
            ValueError, match=r"model.pt: torch cannot load it .* and it has \S+ or is damaged"
        ) as caught:
            mbn.BatchNorm1d.from_checkpoint("model.pt", "bn")
        assert "\n" not in str(caught.value)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 damaged", b"\x80\x02damaged", b'{"weight_map": {}}'])
def test_damaged_or_missing_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        mbn.BatchNorm1d.from_checkpoint(path, "bn")
    with pytest.raises(FileNotFoundError):
        mbn.BatchNorm1d.from_checkpoint(tmp_path / "nothing", "bn")


@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_torch_file_is_refused(tmp_path: Path, *, is_zip: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(tensors(layer_entries(4, 1)), path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=f"{path}: .*damaged") as caught:
        mbn.BatchNorm1d.from_checkpoint(path)
    assert len(str(caught.value)) - len(str(path)) < 300


def test_torch_file_without_torch_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tensors(layer_entries(4, 1)), tmp_path / "model.pt")
    save_file(layer_entries(4, 1), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch is not installed: pip install torch; or save safetensors"):
        mbn.BatchNorm1d.from_checkpoint(tmp_path / "model.pt", backend="numpy")
    mbn.BatchNorm1d.from_checkpoint(tmp_path / "model.safetensors", backend="numpy")


def test_file_without_a_batch_norm_is_refused_with_its_entries(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="it holds a Tensor, and no state_dict"):
        mbn.BatchNorm1d.from_checkpoint(tmp_path / "tensor.pt")
    torch.save({"fc.weight": torch.ones(3, 2)}, tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"no entries begin with 'bn\.'\. There are no running statistics in it, but"):
        mbn.BatchNorm1d.from_checkpoint(tmp_path / "linear.pt", "bn.")
