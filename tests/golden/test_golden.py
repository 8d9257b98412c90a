"""Results, pickles and files of an earlier commit: bits stay, and layers that users have saved can be loaded.

Source of the bounds: docs/accuracy.md, twice, since the results of two commits may lie on two sides of the exact one.
"""

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import golden_cases
import numpy as np
import pytest
from golden_cases import Case
from numpy._core._multiarray_umath import __cpu_features__

import mbn
from mbn.conformance import ulp
from mbn.contract import Backend

HERE = Path(__file__).parent
OTHER_PROCESSOR = "this processor rounds differently: it has no FMA3 and AVX2, with which the bits were recorded"
"""Numba and Torch multiply and add in one rounding where they can. NumPy's bits do not depend on that."""


@cache
def _digests(backend: str) -> dict[str, dict[str, str]]:
    digests: dict[str, dict[str, str]] = json.loads((HERE / f"{backend}.json").read_text())
    return digests


@pytest.mark.parametrize("backend", golden_cases.EXACT)
def test_every_case_is_recorded(backend: str) -> None:
    assert list(_digests(backend)) == [str(case) for case in golden_cases.of_backend(backend)]


def _skip_other_processors(backend: str) -> None:
    if backend != "numpy" and not (__cpu_features__.get("FMA3") and __cpu_features__.get("AVX2")):
        pytest.skip(OTHER_PROCESSOR)


@pytest.mark.parametrize(
    ("backend", "shape"), [(b, shape) for b in golden_cases.EXACT for shape in golden_cases.SHAPES]
)
def test_results_have_the_recorded_bits(backend: str, shape: str) -> None:
    _skip_other_processors(backend)
    changed = []
    for case in golden_cases.of_backend(backend):
        if case.shape == shape:
            found = {name: golden_cases.digest(value) for name, value in golden_cases.results(case, backend).items()}
            recorded = _digests(backend)[str(case)]
            changed += [f"{case}: {name}" for name in found | recorded if found.get(name) != recorded.get(name)]
    assert changed == []


@pytest.mark.jax
@pytest.mark.parametrize("case", list(golden_cases.of_backend("jax")), ids=str)
def test_results_of_jax_are_within_bounds_of_the_recorded_ones(case: Case) -> None:
    with np.load(HERE / "jax.npz") as recorded:
        expected = {key.rpartition(": ")[2]: recorded[key] for key in recorded if key.rpartition(": ")[0] == str(case)}
    results = golden_cases.results(case, "jax")
    assert results.keys() == expected.keys()
    for name, value in results.items():
        _assert_close(golden_cases.excerpt(value), expected[name], case, name)


def _assert_close(value: np.ndarray, recorded: np.ndarray, case: Case, name: str) -> None:
    assert value.dtype == recorded.dtype, name
    is_finite = np.isfinite(recorded)
    np.testing.assert_array_equal(value[~is_finite], recorded[~is_finite], err_msg=name)
    value, recorded = value[is_finite].astype(np.float64), recorded[is_finite].astype(np.float64)
    size = np.abs(recorded).max(initial=0.0)
    dtype = case.dtype if name in ("y", "dx", "ddx") else golden_cases.statistics_dtype(case)
    if name == "num_batches_tracked":
        bound = 0.0
    elif name == "y":
        bound = ulp.OUTPUT_BOUNDS[dtype] * ulp.spacing(max(size, 1.0), dtype)
    elif name.startswith("running"):
        bound = ulp.STATISTICS_BOUNDS[dtype] * ulp.spacing(size, dtype)
    else:
        bound = ulp.GRADIENT_BOUNDS[dtype] * size
    assert np.abs(value - recorded).max(initial=0.0) <= 2 * bound, name


def _layers(backend: str) -> list[Any]:
    layers: list[Any] = pickle.loads((HERE / f"{backend}.pickle").read_bytes())
    return layers


@pytest.mark.parametrize("backend", golden_cases.BACKENDS)
def test_saved_layers_load(backend: str) -> None:
    own = mbn.get_backend(backend)
    x = own.asarray(golden_cases.inputs(golden_cases.CALLED)[0])
    pickled, waiting, *modules = _layers(backend)
    loaded = mbn.BatchNorm1d.load(HERE / f"{backend}.safetensors", backend=backend)
    for layer in (pickled, loaded, *modules):
        expected = golden_cases.called(backend)
        assert layer.training
        assert _digests_of(own, layer.state_dict()) == _digests_of(own, expected.state_dict())
        assert _digests_of(own, {"y": layer(x)}) == _digests_of(own, {"y": expected(x)})
    assert repr(pickled) == repr(loaded) == repr(golden_cases.called(backend))
    assert repr(waiting) == repr(golden_cases.waiting(backend))
    assert not waiting.training


def _digests_of(backend: Backend, arrays: dict[str, Any]) -> dict[str, str]:
    return {key: golden_cases.digest(backend.to_numpy(value)) for key, value in arrays.items()}


@pytest.mark.parametrize("backend", golden_cases.EXACT)
def test_saved_state_has_the_digests_of_the_recorded_call(backend: str) -> None:
    _skip_other_processors(backend)
    own, saved = mbn.get_backend(backend), mbn.BatchNorm1d.load(HERE / f"{backend}.safetensors", backend=backend)
    recorded = _digests(backend)[str(golden_cases.CALLED)]
    of_state = {key: value for key, value in recorded.items() if key.startswith(("running", "num"))}
    assert len(of_state) == 3
    assert _digests_of(own, saved.state_dict()).items() >= of_state.items()
