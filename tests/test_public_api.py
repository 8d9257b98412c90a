"""The public names are exactly these, each is documented, and their import is cheap."""

import inspect
import subprocess
import sys

import pytest

import mbn


def test_public_names_are_exactly_these() -> None:
    assert set(mbn.__all__) == {
        "BackendNotFoundError",
        "BackendUnavailableError",
        "BatchNorm1d",
        "ConversionWarning",
        "Group",
        "Params",
        "Population",
        "ReplicaError",
        "State",
        "asarray",
        "fold_linear",
        "from_flax",
        "from_keras",
        "from_onnx",
        "from_torch",
        "functional",
        "get_backend",
        "get_num_threads",
        "list_backends",
        "register_backend",
        "replace_batchnorm",
        "set_default_backend",
        "set_num_threads",
        "show_versions",
        "synchronize",
        "to_flax",
        "to_keras",
        "to_numpy",
        "to_onnx",
        "to_torch",
        "use_backend",
    }
    assert all(getattr(mbn, name).__doc__ for name in mbn.__all__)


def test_layer_takes_the_arguments_of_torch_in_their_order() -> None:
    parameters = inspect.signature(mbn.BatchNorm1d).parameters
    assert [str(parameter).partition(":")[0] for parameter in parameters.values()] == [
        *("num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype"),
        *("bias", "axis", "correction", "group", "backend"),
    ]
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[-1] == "dtype"
    defaults = {p.name: p.default for p in parameters.values()}
    assert (defaults["eps"], defaults["momentum"], defaults["bias"]) == (1e-5, 0.1, True)


def test_functional_takes_the_arguments_of_torch_in_their_order() -> None:
    parameters = inspect.signature(mbn.functional.batch_norm).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["x", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]


def test_public_methods_are_documented() -> None:
    for name, member in inspect.getmembers(mbn.BatchNorm1d):
        assert name.startswith("_") or member.__doc__, name


def test_import_loads_no_framework() -> None:
    script = (
        "import sys, mbn; mbn.list_backends(); mbn.BatchNorm1d(4);"
        "print(*sorted({'torch', 'jax', 'cupy', 'numba', 'flax', 'keras', 'onnx'} & set(sys.modules)),"
        "*sorted({'rich', 'safetensors', 'pytest', 'matplotlib'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == ""


def test_show_versions_never_raises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken metadata")

    monkeypatch.setattr("importlib.metadata.version", broken)
    monkeypatch.setattr("mbn.commands.versions.list_backends", broken)
    mbn.show_versions()
    printed = capsys.readouterr().out
    assert "python: 3." in printed
    assert "broken metadata" in printed


def test_show_versions_lists_installed_packages(capsys: pytest.CaptureFixture[str]) -> None:
    mbn.show_versions()
    printed = capsys.readouterr().out
    assert f"mbn: {mbn.__version__} (" in printed
    assert "numpy: 2." in printed
    assert "backends: " in printed
    assert "torch" in printed


def test_dir_lists_the_names_that_are_imported_when_used() -> None:
    assert set(mbn.__all__) <= set(dir(mbn))
    assert {"TYPE_CHECKING", "importlib"}.isdisjoint(dir(mbn))
