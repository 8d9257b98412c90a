"""Strangers' backends: one that is installed as its users would install it, and others that are broken."""

from importlib import metadata

import numpy as np
import pytest

import mbn
from mbn import registry
from mbn_numpy.backend import NumpyBackend


@pytest.fixture
def strict():
    """Return the namespace whose arrays the installed plug-in is for."""
    if not metadata.entry_points(group=registry.ENTRY_POINTS, name="strict"):
        pytest.fail("the plug-in mbn-strict is not installed: pip install ./tests/plugin", pytrace=False)
    import array_api_strict  # noqa: PLC0415 - comes with the plug-in

    return array_api_strict


@pytest.fixture
def _nothing_loaded(monkeypatch):
    """Make the registry look for every backend anew, and forget afterwards what it found."""
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_owners", {})


@pytest.fixture
def plugin(tmp_path, monkeypatch, _nothing_loaded):
    """Return a function that installs a distribution ``mbn-NAME`` with one backend, made of the source of a module."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, source):
        module = tmp_path.name  # another one in each test: Python keeps the modules that it has imported
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"mbn_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mbn-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{name} = {module}:StrangeBackend\n")

    return install


def test_plugin_is_listed_and_loaded_by_name(strict):
    assert "strict" in mbn.list_backends()
    backend = mbn.get_backend("strict")
    assert backend.name == "strict"
    assert backend.owns(strict.zeros(1))
    assert mbn.get_backend("strict") is backend


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(32, 5), (8, 5, 7)])
def test_plugin_gives_the_numbers_of_numpy(strict, dtype, shape):
    x = (1e4 + np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    ours = mbn.BatchNorm1d(5, dtype=dtype, backend="numpy")
    theirs = mbn.BatchNorm1d(5, dtype=dtype, backend="strict")
    tolerance = 8 * np.finfo(dtype).eps
    for mode in (True, False):
        y = theirs.train(mode)(strict.asarray(x))
        assert y.dtype == getattr(strict, dtype)
        np.testing.assert_allclose(mbn.to_numpy(y), ours.train(mode)(x), rtol=tolerance, atol=tolerance)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(mbn.to_numpy(value), ours.state_dict()[key], rtol=tolerance, err_msg=key)


def test_plugin_takes_part_in_a_cumulative_average(strict):
    bn = mbn.BatchNorm1d(2, momentum=None)
    for value in (1.0, 3.0):
        bn(strict.asarray([[value, value], [value, -value]], dtype=strict.float32))
    np.testing.assert_allclose(mbn.to_numpy(bn.running_mean), [2, 0])


def test_plugin_is_inferred_from_its_arrays(strict):
    bn = mbn.BatchNorm1d(3, axis=-1)
    y = bn(strict.ones((4, 2, 3), dtype=strict.float32))
    assert bn.backend == "strict"
    assert y.shape == (4, 2, 3)
    assert mbn.get_backend("strict").owns(bn.running_mean)


def test_layers_stay_on_their_devices(strict):
    x = strict.ones((4, 3), dtype=strict.float32, device=strict.Device("device1"))
    bn = mbn.BatchNorm1d(3)
    assert bn(x).device == x.device
    assert bn.running_var.device == x.device
    with pytest.raises(ValueError, match="device1"):
        bn(strict.ones((4, 3), dtype=strict.float32))
    assert bn.to(device="CPU_DEVICE").running_var.device == strict.Device("CPU_DEVICE")


def test_arrays_do_not_change_frameworks_unasked(strict):
    x = strict.ones((4, 3), dtype=strict.float32)
    bn = mbn.BatchNorm1d(3, backend="numpy")
    with pytest.raises(TypeError, match=r"array of strict and the backend is numpy.*bn\.to\(backend='strict'\)"):
        bn(x)
    assert mbn.get_backend("strict").owns(bn.to(backend="strict")(x))
    with pytest.raises(TypeError, match="strict"):
        bn(object())


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise RuntimeError('no licence')", RuntimeError),
        ("import a_framework_that_nobody_has", ModuleNotFoundError),
        ("", AttributeError),
        ("def StrangeBackend(): raise OSError('no device')", OSError),
    ],
)
def test_broken_plugin_says_which_it_is_and_why(plugin, source, cause):
    plugin("broken", source)
    with pytest.raises(mbn.BackendUnavailableError, match=f"'broken'.*mbn-broken.*{cause.__name__}") as error:
        mbn.get_backend("broken")
    assert type(error.value.__cause__) is cause


def test_plugin_that_is_no_backend(plugin):
    plugin("hollow", "class StrangeBackend: pass")
    with pytest.raises(mbn.BackendUnavailableError, match=r"'hollow'.*mbn-hollow.*not a mbn\.contract\.Backend"):
        mbn.get_backend("hollow")


def test_broken_plugin_hides_no_other(plugin, strict):
    plugin("broken", "raise RuntimeError('no licence')")
    assert {"broken", "strict", "numpy", "torch", "jax", "cupy"} <= set(mbn.list_backends())
    assert mbn.get_backend("strict").owns(strict.zeros(1))
    assert registry.owner_of(strict.zeros(1)) is mbn.get_backend("strict")


def test_plugin_cannot_replace_a_built_in_backend(plugin):
    plugin("numpy", "raise RuntimeError('imported')")
    assert mbn.list_backends().count("numpy") == 1
    assert isinstance(mbn.get_backend("numpy"), NumpyBackend)
