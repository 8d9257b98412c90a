"""Backends of plug-ins: one that is installed as users would install it, and others that are broken."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
from toy import Toy

import mbn
from mbn import registry
from mbn.commands.cli import main
from mbn_numpy.backend import NumpyBackend

pytestmark = pytest.mark.strict


@pytest.fixture
def strict():
    """Return the namespace of the arrays that the installed plug-in serves."""
    if not metadata.entry_points(group=registry.ENTRY_POINTS, name="strict"):
        pytest.fail("the plug-in mbn-strict is not installed: pip install ./tests/plugin", pytrace=False)
    import array_api_strict

    return array_api_strict


@pytest.fixture
def _nothing_loaded(monkeypatch):
    """Empty the registry's caches, so that it looks for every backend anew; restore them afterwards."""
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_owners", {})


@pytest.fixture
def plugin(tmp_path, monkeypatch, _nothing_loaded):
    """Return a function that installs a distribution ``mbn-NAME`` with a backend in a module of this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, source):
        module = tmp_path.name  # another name in each test, since Python caches the modules that it has imported
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"mbn_{len(name)}-1.0.dist-info"
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
def test_plugin_gives_the_results_of_numpy(strict, dtype, shape):
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


def test_plugin_computes_a_cumulative_average(strict):
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


def test_layer_of_a_plugin_stays_on_its_device(strict):
    x = strict.ones((4, 3), dtype=strict.float32, device=strict.Device("device1"))
    bn = mbn.BatchNorm1d(3)
    assert bn(x).device == x.device
    assert bn.running_var.device == x.device
    with pytest.raises(ValueError, match="device1"):
        bn(strict.ones((4, 3), dtype=strict.float32))
    assert bn.to(device="CPU_DEVICE").running_var.device == strict.Device("CPU_DEVICE")


def test_layer_of_another_backend_refuses_arrays_of_a_plugin(strict):
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
        ("import sys; sys.exit(3)", SystemExit),
        ("def StrangeBackend(): raise SystemExit", SystemExit),
        ("raise BaseException('panic')", BaseException),
    ],
)
def test_broken_plugin_is_named_with_its_error(plugin, source, cause):
    plugin("broken", source)
    with pytest.raises(mbn.BackendUnavailableError, match=f"'broken'.*mbn-broken.*{cause.__name__}") as error:
        mbn.get_backend("broken")
    assert isinstance(error.value.__cause__, cause)
    with pytest.raises(TypeError, match="no backend knows arrays of type builtins.object") as error:
        mbn.to_numpy(object())
    assert isinstance(error.value.__cause__, mbn.BackendUnavailableError)


def test_keyboard_interrupt_while_a_plugin_is_imported_is_raised(plugin):
    plugin("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        mbn.get_backend("slow")


def test_plugin_that_is_no_backend_is_refused(plugin):
    plugin("hollow", "class StrangeBackend: pass")
    with pytest.raises(mbn.BackendUnavailableError, match=r"'hollow'.*mbn-hollow.*not a mbn\.contract\.Backend"):
        mbn.get_backend("hollow")


def test_broken_plugin_leaves_other_backends_usable(plugin, strict):
    plugin("broken", "raise RuntimeError('no licence')")
    assert {"broken", "strict", "numpy", "torch", "jax", "cupy"} <= set(mbn.list_backends())
    assert mbn.get_backend("strict").owns(strict.zeros(1))
    assert registry.owner_of(strict.zeros(1)) is mbn.get_backend("strict")


def test_plugin_that_fails_on_other_arrays_leaves_other_backends_usable(plugin, monkeypatch, strict):
    plugin(
        "a",
        """
from toy import Toy
class StrangeBackend(Toy):
    name = "a"
    def owns(self, x):
        return x.colour == "red"
""",
    )
    monkeypatch.delitem(sys.modules, "cupy", raising=False)  # without a GPU, CuPy is another cause of the error
    x = strict.zeros(1)
    assert registry.owner_of(x) is mbn.get_backend("strict")
    with pytest.raises(TypeError, match="no backend knows arrays of type builtins.object") as error:
        mbn.to_numpy(object())
    assert "backend 'a' is broken: AttributeError: 'object' object has no attribute 'colour'" in str(
        error.value.__cause__
    )


@pytest.mark.parametrize("where", ["import", "constructor"])
def test_hanging_plugin_does_not_block_other_backends(plugin, monkeypatch, where):
    gate = SimpleNamespace(begun=threading.Event(), go_on=threading.Event(), made=[])
    monkeypatch.setitem(sys.modules, "gate", gate)
    hang = "gate.begun.set(); assert gate.go_on.wait(60)"
    plugin(
        "hanging",
        f"""
import gate
from toy import Toy
{hang if where == "import" else ""}
class StrangeBackend(Toy):
    name = "hanging"
    def __init__(self):
        gate.made.append(self)
        {hang if where == "constructor" else ""}
""",
    )

    def others():
        mbn.register_backend("toy", "toy:Toy")
        return [mbn.get_backend(name).name for name in ("numpy", "toy", "strict")]

    with ThreadPoolExecutor(3) as pool:
        try:
            first = pool.submit(mbn.get_backend, "hanging")
            assert gate.begun.wait(30)
            second = pool.submit(mbn.get_backend, "hanging")
            assert pool.submit(others).result(30) == ["numpy", "toy", "strict"]
            assert not first.done()
        finally:
            gate.go_on.set()
        assert first.result(30) is second.result(30)
    assert len(gate.made) == 1


def test_backend_registered_while_its_predecessor_is_made_prevails():
    class Other(Toy):
        def __init__(self):
            mbn.register_backend("toy", Toy)

    mbn.register_backend("toy", Other)
    assert type(mbn.get_backend("toy")) is Other
    assert type(mbn.get_backend("toy")) is Toy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_does_not_wait_for_a_plugin_of_its_parent():
    program = """
import os, threading
import mbn
from toy import Toy

class Hanging(Toy):
    def __init__(self):
        begun.set()
        go_on.wait(60)

begun, go_on = threading.Event(), threading.Event()
mbn.register_backend("toy", Hanging)
thread = threading.Thread(target=mbn.get_backend, args=("toy",))
thread.start()
begun.wait(60)
child = os.fork()
if not child:
    go_on.set()
    os._exit(type(mbn.get_backend("toy")) is not Hanging)
status = os.waitpid(child, 0)[1]
go_on.set()
thread.join()
raise SystemExit(status)
"""
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize("name", ["b@d name!", "1st"])
def test_plugin_with_an_invalid_name_is_ignored_and_listed(plugin, capsys, name):
    plugin(name, "")
    assert name not in mbn.list_backends()
    with pytest.raises(mbn.BackendNotFoundError):
        mbn.get_backend(name)
    assert main(["backends"]) == 0
    _, _, others = capsys.readouterr().out.partition("cannot be used here")
    assert f"{name} its name is not made of letters" in " ".join(others.split())


def test_plugin_cannot_replace_a_built_in_backend(plugin):
    plugin("numpy", "raise RuntimeError('imported')")
    assert mbn.list_backends().count("numpy") == 1
    assert isinstance(mbn.get_backend("numpy"), NumpyBackend)
