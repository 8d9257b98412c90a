"""``asarray`` and ``to_numpy``: arrays from one framework to another."""

from typing import Any

import frameworks
import ml_dtypes
import numpy as np
import pytest
import second_framework as other

import mbn

torch = frameworks.optional("torch")


def test_asarray_moves_between_frameworks() -> None:
    x = other.asarray(np.arange(6.0).reshape(2, 3))
    host = mbn.asarray(x, backend="numpy")
    assert isinstance(host, np.ndarray)
    assert isinstance(mbn.asarray(host, backend=other.NAME), other.Array)
    assert mbn.asarray(x, dtype="float32").dtype != x.dtype
    assert mbn.asarray([[1.0]], dtype=other.float64).dtype == np.float64
    assert mbn.asarray(host) is host
    assert type(mbn.asarray(x)) is type(x)
    with mbn.use_backend("numpy"):
        assert isinstance(mbn.asarray(x), np.ndarray)


def _pointer(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("source", "target", "shared"),
    [
        ("numpy", "torch", True),
        ("torch", "numpy", True),
        ("jax", "numpy", True),  # read-only
        ("numpy", "jax", False),  # JAX's arrays never change
        ("torch", "jax", False),
        ("jax", "torch", False),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_asarray_shares_host_memory_where_it_can(source: str, target: str, dtype: str, *, shared: bool) -> None:
    host = np.arange(4096, dtype=np.float32).reshape(64, 64).astype(dtype)
    x = mbn.asarray(host, backend=source)
    y = mbn.asarray(x, backend=target)
    assert mbn.registry.owner_of(y).name == target
    assert (_pointer(y) == _pointer(x)) == shared
    np.testing.assert_array_equal(mbn.to_numpy(y), host, strict=True)
    if isinstance(y, np.ndarray):
        assert y.flags.writeable == (source == "torch")


@pytest.mark.parametrize("target", ["numpy", "jax"])
def test_asarray_converts_views_and_tensors_with_gradients(target: str) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    recorded = x.clone().requires_grad_() * 2
    for tensor in (x.T, x[:, ::2], torch._neg_view(x), x[1:], recorded):
        expected = tensor.detach().resolve_neg().numpy()
        np.testing.assert_array_equal(mbn.to_numpy(mbn.asarray(tensor, backend=target)), expected)
    assert recorded.requires_grad
    backwards = np.arange(6.0)[::-1]
    backwards.flags.writeable = False
    np.testing.assert_array_equal(mbn.asarray(backwards, backend="torch"), backwards)


def test_asarray_refuses_traced_sparse_and_meta_values() -> None:
    jax = pytest.importorskip("jax", reason="it traces")
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda x: mbn.asarray(x, backend="torch"))(1.0)
    with pytest.raises(TypeError):
        mbn.asarray(torch.eye(3).to_sparse(), backend="jax")
    with pytest.raises(ValueError, match="no values to copy"):
        mbn.asarray(torch.ones(3, device="meta"), backend="jax")


def test_to_numpy_takes_arrays_of_any_backend() -> None:
    for x in ([[1.0, 2.0]], np.array([[1.0, 2.0]]), other.asarray(np.array([[1.0, 2.0]]))):
        np.testing.assert_array_equal(mbn.to_numpy(x), [[1, 2]])
    with pytest.raises(TypeError, match="no backend knows arrays of type builtins.object"):
        mbn.to_numpy(object())


def test_asarray_keeps_bfloat16() -> None:
    host = np.array([1, 1.0078125, -3e38]).astype(ml_dtypes.bfloat16)
    tensor = mbn.asarray(host, backend="torch")
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(mbn.to_numpy(tensor), host, strict=True)


def test_dtype_name_is_the_same_for_all_frameworks() -> None:
    for dtype in ("float64", np.float64, np.dtype("f8"), other.float64):
        assert mbn.contract.dtype_name(dtype) == "float64"
    assert mbn.contract.dtype_name(np.dtype(ml_dtypes.bfloat16)) == "bfloat16"
