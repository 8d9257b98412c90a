"""Arrays pass from framework to framework on their device: on simulated GPUs, and on a real one."""

import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import gpus
import numpy as np
import pytest
from toy import Toy

import mbn
from mbn.conformance.target import configured
from mbn.contract import Array

X = np.arange(12, dtype=np.float32).reshape(3, 4)


class Away:
    """An array on a simulated GPU."""

    def __init__(self, host: np.ndarray, index: int = 0) -> None:
        self.host, self.index = host, index

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index


class Remote(Toy):
    """A framework with two simulated GPUs. None of its arrays may be copied to the host."""

    array: type[Away]
    refuses: Any = staticmethod(lambda x: False)

    def owns(self, x: object) -> bool:
        return type(x) is self.array

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        index = x.index if self.owns(x) and device is None else ("cuda:0", "cuda:1").index(device or "cuda:0")
        return self.array(np.asarray(x.host if self.owns(x) else x, dtype), index)

    def to_numpy(self, x: Array) -> np.ndarray:
        raise AssertionError(f"{x} goes by way of the host")

    def device(self, x: Array) -> str:
        return f"cuda:{x.index}"

    def copy(self, x: Array) -> Array:
        return self.array(np.array(x.host), x.index)

    def within(self, values: Array, low: float, high: float) -> bool:
        return super().within(values.host, low, high)

    def write(self, before: Any, after: Any) -> Any:
        return after

    def from_dlpack(self, x: Any) -> Array:
        if self.refuses(x):
            raise BufferError("refused")
        return self.array(x.host, x.index)


def framework(name: str) -> Remote:
    kind = type(name, (Away,), {})
    backend = type(name, (Remote,), {"name": name, "array": kind})()
    mbn.register_backend(name, backend)
    return backend


@pytest.fixture
def here() -> Remote:
    return framework("here")


@pytest.fixture
def there() -> Remote:
    return framework("there")


def test_asarray_shares_memory_on_the_device(here: Remote, there: Remote) -> None:
    x = here.asarray(X, device="cuda:1")
    y = mbn.asarray(x, backend="there")
    assert there.owns(y)
    assert y.host is x.host
    assert there.device(y) == "cuda:1"
    with mbn.use_backend("there"):
        assert mbn.asarray(x).host is x.host


def test_asarray_changes_dtype_and_device_on_the_devices(here: Remote, there: Remote) -> None:
    y = mbn.asarray(here.asarray(X), "float16", backend=there, device="cuda:1")
    assert there.device(y) == "cuda:1"
    np.testing.assert_array_equal(y.host, X.astype(np.float16), strict=True)


def test_asarray_copies_an_array_that_the_target_refuses(here: Remote, there: Remote) -> None:
    x = here.asarray(X.T)
    there.refuses = lambda x: not x.host.flags.owndata
    y = mbn.asarray(x, backend=there)
    np.testing.assert_array_equal(y.host, X.T)
    assert not np.shares_memory(y.host, X)


def test_asarray_goes_through_the_host_if_the_target_refuses_the_copy_too(here: Remote, there: Remote) -> None:
    there.refuses = lambda x: True
    here.to_numpy = lambda x: x.host
    y = mbn.asarray(here.asarray(X, device="cuda:1"), backend=there)
    np.testing.assert_array_equal(y.host, X)
    assert there.device(y) == "cuda:0"
    np.testing.assert_array_equal(mbn.asarray(here.asarray(X), backend="numpy"), X)


def test_asarray_for_numpy_calls_to_numpy_of_the_source(here: Remote) -> None:
    with pytest.raises(AssertionError, match="by way of the host"):
        mbn.asarray(here.asarray(X), backend="numpy")


def test_layer_moves_to_another_framework_on_its_device_and_shares_nothing(here: Remote, there: Remote) -> None:
    bn = mbn.BatchNorm1d(4, backend=here, device="cuda:1")
    before = dict(bn.state_dict())
    held = (*bn.params, *bn.state)
    bn.to(backend="there")
    for (key, value), old in zip(before.items(), held, strict=True):
        new = getattr(bn, key)
        assert there.owns(new)
        assert there.device(new) == "cuda:1"
        np.testing.assert_array_equal(new.host, value.host, strict=True)
        assert not np.shares_memory(new.host, old.host)
    assert there.device(bn.to(backend=here, device="cuda:0").weight) == "cuda:0"
    assert all(map(here.owns, bn.state_dict().values()))
    assert all(map(there.owns, bn.state_dict(backend=there).values()))


def test_layer_takes_values_from_another_framework(here: Remote, there: Remote) -> None:
    bn = mbn.BatchNorm1d(4, backend=here)
    value = there.asarray(X[0].astype(np.float64))
    bn.weight = value
    np.testing.assert_array_equal(bn.weight.host, X[0], strict=True)
    assert not np.shares_memory(bn.weight.host, value.host)
    with pytest.raises(TypeError, match="weight is made of real numbers, not complex64"):
        bn.weight = there.asarray(X[0].astype(np.complex64))


def test_layer_moved_from_jax_has_writeable_arrays() -> None:
    pytest.importorskip("jax")
    bn = configured(mbn.BatchNorm1d(4, backend="jax"), seed=0).to(backend="numpy")
    assert all(value.flags.writeable for value in (*bn.params, *bn.state))


@pytest.mark.parametrize(("source", "target"), list(permutations(("cupy", "torch", "jax"), 2)))
def test_arrays_and_layers_pass_between_frameworks_on_a_gpu(source: str, target: str) -> None:
    for framework in (source, target):
        if reason := gpus.missing(framework):
            pytest.skip(reason)
    script = Path(__file__).with_name("handed_over_on_gpu.py")
    run = subprocess.run([sys.executable, script, source, target], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
