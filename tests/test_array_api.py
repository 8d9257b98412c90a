"""Arrays of a library that follows the array API standard and has no backend of its own, or no float64."""

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mbn
from mbn import checks, registry
from mbn.array_api import ArrayAPIBackend
from mbn.conformance import oracle, ulp

xp = pytest.importorskip("array_api_strict", reason="comes with the plug-in")
NARROW = next(device for device in xp.__array_namespace_info__().devices() if "no_x64" in repr(device))
"""A device without 64-bit numbers."""


@pytest.fixture
def _unregistered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove all backends that own arrays of ``array_api_strict`` from the registry."""
    monkeypatch.setattr(registry, "_all_entry_points", dict)
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_owners", {})
    return


def strict_array(*shape: int) -> Any:
    return xp.asarray(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


@pytest.mark.usefixtures("_unregistered")
def test_array_without_a_backend_is_normalised() -> None:
    x, bn, twin = strict_array(32, 4), mbn.BatchNorm1d(4), mbn.BatchNorm1d(4, backend="numpy")
    y, pullback = bn.vjp(x, mask=xp.asarray(np.arange(32) > 3))
    expected, of_twin = twin.vjp(np.from_dlpack(x), mask=np.arange(32) > 3)
    np.testing.assert_allclose(np.from_dlpack(y), expected, 1e-6, 1e-6)
    np.testing.assert_allclose(np.from_dlpack(pullback(y)[0]), of_twin(expected)[0], 1e-5, 1e-6)
    assert bn.backend == "array_api.array_api_strict"
    for other in (pickle.loads(pickle.dumps(bn)), mbn.BatchNorm1d(4, backend=bn.backend)):
        assert type(other(x)) is type(x)
    assert bn.backend not in mbn.list_backends()


@pytest.mark.usefixtures("_unregistered")
def test_backend_that_is_registered_later_serves_its_arrays() -> None:
    x = strict_array(8, 4)
    mbn.BatchNorm1d(4)(x)
    own = type("Own", (ArrayAPIBackend,), {"name": "own", "namespace": xp})
    mbn.register_backend("own", own)
    bn = mbn.BatchNorm1d(4)
    bn(x)
    assert bn.backend == "own"


@pytest.mark.usefixtures("_unregistered")
def test_array_of_a_broken_backend_is_refused() -> None:
    mbn.register_backend("broken", "no_such_module:Backend")
    with pytest.raises(TypeError, match="no backend knows arrays of type array_api_strict") as caught:
        mbn.BatchNorm1d(4)(strict_array(8, 4))
    assert isinstance(caught.value.__cause__, mbn.BackendUnavailableError)


@pytest.mark.usefixtures("_unregistered")
@pytest.mark.parametrize(
    "make",
    [
        np.ma.ones,
        lambda shape: np.ones(shape).view(np.matrix),
        lambda shape: np.ma.ones(shape).view(type("OfOwn", (np.ma.MaskedArray,), {})),
        lambda shape: np.ones(shape).view(type("OfOwn", (np.matrix,), {})),
    ],
    ids=["masked", "matrix", "subclass of masked", "subclass of matrix"],
)
def test_array_that_numpy_refuses_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="no backend knows arrays of type"):
        mbn.BatchNorm1d(4)(make((8, 4)))


@pytest.mark.usefixtures("_unregistered")
@pytest.mark.parametrize(
    "namespace", [lambda _: 1 / 0, lambda _: object(), lambda _: np], ids=["broken", "none", "numpy"]
)
def test_array_with_a_wrong_namespace_is_refused(namespace: Any) -> None:
    kind = type("Strange", (), {"shape": (8, 4), "__dlpack__": None, "__array_namespace__": namespace})
    with pytest.raises(TypeError, match="no backend knows arrays of type"):
        mbn.BatchNorm1d(4)(kind())


@pytest.mark.usefixtures("_unregistered")
def test_missing_library_is_named() -> None:
    with pytest.raises(mbn.BackendUnavailableError, match="no_such_library is not installed"):
        mbn.get_backend("array_api.no_such_library")


@pytest.mark.strict
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 3), (301, 3), (20, 3, 31)])
def test_results_without_float64_are_within_bounds(shape: tuple[int, ...], offset: float, *, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    x, dy = ((start + rng.standard_normal(shape)).astype(np.float32) for start in (offset, 0))
    weights = rng.integers(0, 3, (shape[0], *shape[2:])).astype(np.float32) if weighted else None
    bn = mbn.BatchNorm1d(3, backend="strict", device=NARROW)
    given = xp.asarray(x, device=NARROW)
    y, pullback = bn.vjp(given, sample_weight=None if weights is None else xp.asarray(weights, device=NARROW))
    dx, *_ = pullback(xp.asarray(dy, device=NARROW))
    truth = oracle.train(x, np.zeros(3), np.ones(3), momentum=0.1, eps=1e-5, weights=weights)
    assert y.device == NARROW
    assert ulp.error(np.from_dlpack(y), truth.y, "float32") <= 4
    for actual, expected in ((bn.running_mean, truth.running_mean), (bn.running_var, truth.running_var)):
        assert ulp.error(np.from_dlpack(actual), expected, "float32") <= 4
    twin, of_twin = mbn.BatchNorm1d(3, backend="numpy").vjp(x, sample_weight=weights)
    np.testing.assert_allclose(np.from_dlpack(dx), of_twin(dy)[0], 2e-6, 1e-7)
    np.testing.assert_allclose(np.from_dlpack(y), twin, 1e-6, 1e-6)


@pytest.mark.usefixtures("_unregistered")
def test_layer_keeps_working_after_another_backend_is_registered() -> None:
    x, bn = strict_array(8, 4), mbn.BatchNorm1d(4)
    bn(x)
    mbn.register_backend("other", type("Other", (ArrayAPIBackend,), {"name": "other", "namespace": np}))
    bn(x)
    assert int(bn.num_batches_tracked) == 2


@pytest.mark.parametrize("module", ["json", "torch"])
def test_module_that_is_no_namespace_is_refused(module: str) -> None:
    with pytest.raises(mbn.BackendUnavailableError, match=f"{module} does not follow the array API standard"):
        mbn.get_backend(f"array_api.{module}")


@pytest.mark.usefixtures("_unregistered")
@pytest.mark.parametrize("masking", [("mask",), ("lengths",), ("sample_weight",), ("mask", "lengths", "sample_weight")])
def test_masked_positions_count_as_in_numpy(masking: tuple[str, ...]) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((6, 3, 5)).astype(np.float32)
    given = {
        "mask": rng.random((6, 5)) > 0.2,
        "lengths": np.array([5, 0, 2, 4, 1, 3]),
        "sample_weight": rng.integers(0, 3, 6).astype(np.float32),
    }
    chosen = {name: given[name] for name in masking}
    twin, bn = mbn.BatchNorm1d(3, affine=False, backend="numpy"), mbn.BatchNorm1d(3, affine=False)
    y = bn(xp.asarray(x), **{name: xp.asarray(values) for name, values in chosen.items()})
    np.testing.assert_allclose(np.from_dlpack(y), twin(x, **chosen), 1e-6, 1e-6)
    np.testing.assert_allclose(np.from_dlpack(bn.running_mean), twin.running_mean, 1e-6, 1e-7)


@pytest.mark.usefixtures("_unregistered")
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_evaluation_are_those_of_numpy(*, affine: bool) -> None:
    x, twin = strict_array(8, 4), mbn.BatchNorm1d(4, affine=affine, backend="numpy").eval()
    _, pullback = mbn.BatchNorm1d(4, affine=affine).eval().vjp(x)
    _, of_twin = twin.vjp(np.from_dlpack(x))
    np.testing.assert_allclose(np.from_dlpack(pullback(x)[0]), of_twin(np.from_dlpack(x))[0], 1e-6, 1e-7)


@pytest.mark.usefixtures("_unregistered")
def test_unknown_dtype_and_device_are_refused() -> None:
    backend = mbn.get_backend("array_api.array_api_strict")
    with pytest.raises(TypeError, match="array_api_strict has no dtype float8; it has .*float32"):
        backend.asarray([1.0], dtype="float8")
    with pytest.raises(ValueError, match="the devices of array_api.array_api_strict are .*, not 'cuda'"):
        backend.asarray([1.0], device="cuda")
    name = next(name for name in backend.capabilities.devices if "no_x64" in name)
    assert backend.asarray([1.0], dtype="float32", device=name).device == NARROW


@pytest.mark.usefixtures("_unregistered")
def test_x_on_another_device_or_on_several_is_refused() -> None:
    bn = mbn.BatchNorm1d(4, backend="array_api.array_api_strict", device=NARROW)
    with pytest.raises(ValueError, match="x is on .*CPU_DEVICE.*, the layer on .*no_x64"):
        bn(strict_array(8, 4))
    with pytest.raises(ValueError, match="x is spread over here, there, and the layer is on here alone"):
        checks.device("x", None, "here", ("here", "there"))
