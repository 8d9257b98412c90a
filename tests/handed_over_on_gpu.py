"""Check that arrays and layers pass between two frameworks on one GPU: ``python handed_over_on_gpu.py FROM TO``."""

import os
import sys

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other framework needs memory too

import numpy as np

import mbn
from mbn.contract import Array, Backend, transposed

X = np.arange(96, dtype=np.float32).reshape(8, 12)


def pointer(array: Array) -> int:
    if hasattr(array, "data_ptr"):
        return array.data_ptr()
    return array.unsafe_buffer_pointer() if hasattr(array, "unsafe_buffer_pointer") else array.data.ptr


def forbid_the_host(backend: Backend) -> None:
    """Let every copy to the host fail."""

    def to_numpy(array: Array) -> np.ndarray:
        raise AssertionError(f"{type(array)} goes by way of the host")

    backend.to_numpy = to_numpy


def check_arrays(source: Backend, target: Backend) -> None:
    for dtype in sorted(source.capabilities.dtypes & target.capabilities.dtypes):
        x = source.asarray(X, dtype, "cuda")
        forbid_the_host(source)
        y = mbn.asarray(x, backend=target)
        strided = mbn.asarray(x[::2, 1:], backend=target)
        swapped = mbn.asarray(transposed(x), backend=target)
        converted = mbn.asarray(x, "float32", backend=target)
        assert target.owns(y), type(y)
        assert pointer(y) == pointer(x), dtype
        del source.to_numpy
        host = mbn.to_numpy(x)
        for array, expected in ((y, host), (strided, host[::2, 1:]), (swapped, host.T)):
            np.testing.assert_array_equal(mbn.to_numpy(array), expected, strict=True)
        np.testing.assert_array_equal(mbn.to_numpy(converted), X, strict=True)
        # The target can compute with the arrays that it has taken over.
        for array in (y, strided, swapped):
            np.testing.assert_array_equal(mbn.to_numpy(array + array), 2 * mbn.to_numpy(array))


def check_order(source: Backend, target: Backend) -> None:
    """Pass an array that is still being computed."""
    x = source.asarray(np.ones((1024, 1024), np.float32), device="cuda")
    for _ in range(50):
        x = x @ x / 1024
    np.testing.assert_array_equal(mbn.to_numpy(mbn.asarray(x, backend=target) + 0), np.ones((1024, 1024)))


def check_layers(source: Backend, target: Backend) -> None:
    bn = mbn.BatchNorm1d(12, backend=source, device="cuda")
    bn(source.asarray(X, device="cuda"))
    before = {key: mbn.to_numpy(value) for key, value in bn.state_dict().items()}
    held = [pointer(value) for value in (*bn.params, *bn.state)]
    forbid_the_host(source)
    bn.to(backend=target)
    del source.to_numpy
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(mbn.to_numpy(value), before[key])
    assert not {pointer(value) for value in (*bn.params, *bn.state)} & set(held)
    y = bn(mbn.asarray(source.asarray(X, device="cuda"), backend=target))
    assert target.owns(y), type(y)


if __name__ == "__main__":
    source_name, target_name = sys.argv[1:]
    backends = [mbn.get_backend(name) for name in (source_name, target_name)]
    check_arrays(*backends)
    check_order(*backends)
    check_layers(*backends)
