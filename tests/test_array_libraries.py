"""The table of libraries of docs/backends.md: the calls that work on each library's arrays, and why others do not."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mbn
from mbn import registry

DOCS = Path(__file__).parents[1] / "docs" / "backends.md"
X = np.random.default_rng(0).normal(3, 2, (8, 3)).astype(np.float32)
MASK = np.arange(8) > 2
WITHOUT_A_COUNT = {"track_running_stats": False}


def strict(values: np.ndarray) -> Any:
    return pytest.importorskip("array_api_strict", reason="strict is not installed").asarray(values)


def narrow(values: np.ndarray) -> Any:
    xp = pytest.importorskip("array_api_strict", reason="strict is not installed")
    device = next(device for device in xp.__array_namespace_info__().devices() if "no_x64" in repr(device))
    return xp.asarray(values, device=device)


def of_module(name: str) -> Callable[[np.ndarray], Any]:
    return lambda values: pytest.importorskip(name, reason=f"{name} is not installed").asarray(values)


LIBRARIES = {
    "strict": ("`array_api_strict`", strict),
    "strict without 64 bits": ("its device without 64 bits", narrow),
    "ndonnx": ("`ndonnx`", of_module("ndonnx")),
    "sparse": ("`sparse`", of_module("sparse")),
}


def host(y: Any) -> np.ndarray:
    return y.unwrap_numpy() if hasattr(y, "unwrap_numpy") else mbn.to_numpy(y)  # ndonnx exports nothing by DLPack


def trained(make: Callable[[np.ndarray], Any], of: type, **settings: Any) -> tuple[Any, np.ndarray]:
    bn, twin = mbn.BatchNorm1d(3, **settings), mbn.BatchNorm1d(3, backend="numpy", **settings)
    return bn(make(X.astype(of))), twin(X.astype(of))


def evaluated(make: Callable[[np.ndarray], Any]) -> tuple[Any, np.ndarray]:
    return mbn.BatchNorm1d(3).eval()(make(X)), mbn.BatchNorm1d(3, backend="numpy").eval()(X)


def masked(make: Callable[[np.ndarray], Any]) -> tuple[Any, np.ndarray]:
    y = mbn.BatchNorm1d(3, **WITHOUT_A_COUNT)(make(X), mask=make(MASK))
    return y, mbn.BatchNorm1d(3, backend="numpy", **WITHOUT_A_COUNT)(X, mask=MASK)


def pulled_back(make: Callable[[np.ndarray], Any]) -> tuple[Any, np.ndarray]:
    _, pullback = mbn.BatchNorm1d(3, **WITHOUT_A_COUNT).vjp(make(X))
    _, of_twin = mbn.BatchNorm1d(3, backend="numpy", **WITHOUT_A_COUNT).vjp(X)
    return pullback(make(X * X))[0], of_twin(X * X)[0]


CALLS: dict[str, Callable[[Callable[[np.ndarray], Any]], tuple[Any, np.ndarray]]] = {
    "training": lambda make: trained(make, np.float32),
    "training without running statistics": lambda make: trained(make, np.float32, **WITHOUT_A_COUNT),
    "evaluation": evaluated,
    "masks": masked,
    "`vjp`": pulled_back,
    "float64": lambda make: trained(make, np.float64, dtype="float64", **WITHOUT_A_COUNT),
    "`mbn.to_numpy`": lambda make: (mbn.to_numpy(make(X)), X),
}


@pytest.fixture(autouse=True)
def _unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the plug-in, so that all arrays go to the generic backend."""
    for name, value in {"_all_entry_points": dict, "_loaded": {}, "_owners": {}}.items():
        monkeypatch.setattr(registry, name, value)


def table() -> dict[str, list[str]]:
    """Return the columns of the table, by their heads."""
    rows = [
        line.strip("|").split("|")
        for line in DOCS.read_text().partition("| call |")[2].partition("\n\n")[0].splitlines()
    ]
    columns = zip(*([cell.strip() for cell in row] for row in (["call", *rows[0]], *rows[2:])), strict=True)
    return {head: cells for head, *cells in columns}


def reasons(library: str) -> list[str]:
    """Return the words of errors that the list quotes for a library."""
    return re.findall("“(.*?)”", DOCS.read_text().partition(f"\n- {library}: ")[2].partition(".\n")[0])


def test_table_has_each_library_and_call() -> None:
    assert list(table()) == ["call", *(name for name, _ in LIBRARIES.values())]
    assert table()["call"] == list(CALLS)


@pytest.mark.parametrize("library", LIBRARIES)
def test_calls_on_a_library_are_those_of_the_table(library: str) -> None:
    name, make = LIBRARIES[library]
    found, errors = [], []
    for call in CALLS.values():
        try:
            result, truth = call(make)
        except (BufferError, OverflowError, TypeError, ValueError) as error:
            found.append("no")
            errors.append(str(error))
        else:
            np.testing.assert_allclose(host(result), truth, 3e-6, 1e-6)
            found.append("yes")
    assert found == table()[name]
    assert all(any(words in error for words in reasons(name)) for error in errors), errors
    assert all(any(words in error for error in errors) for words in reasons(name))


def test_namespace_of_dask_is_none_of_the_standard() -> None:
    pytest.importorskip("dask.array", reason="dask is not installed")
    assert "dask.array" in sys.modules
    with pytest.raises(
        mbn.BackendUnavailableError, match=r"dask\.array does not follow .* no __array_namespace_info__"
    ):
        mbn.get_backend("array_api.dask.array")
