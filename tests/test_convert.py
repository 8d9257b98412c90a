"""Data across the border."""

import ml_dtypes
import numpy as np
import pytest

import mbn

torch = pytest.importorskip("torch", reason="the border needs a second framework")


def test_asarray_moves_between_frameworks() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    host = mbn.asarray(x, backend="numpy")
    assert isinstance(host, np.ndarray)
    assert isinstance(mbn.asarray(host, backend="torch"), torch.Tensor)
    assert mbn.asarray(x, dtype="float64").dtype == torch.float64
    assert mbn.asarray([[1.0]], dtype=torch.float16).dtype == np.float16
    assert mbn.asarray(x) is x
    with mbn.use_backend("numpy"):
        assert isinstance(mbn.asarray(x), np.ndarray)


def test_to_numpy() -> None:
    for x in ([[1.0, 2.0]], np.array([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])):
        np.testing.assert_array_equal(mbn.to_numpy(x), [[1, 2]])
    with pytest.raises(TypeError, match="no backend knows arrays of type builtins.object"):
        mbn.to_numpy(object())


def test_bfloat16_crosses_unchanged() -> None:
    host = np.array([1, 1.0078125, -3e38]).astype(ml_dtypes.bfloat16)
    tensor = mbn.asarray(host, backend="torch")
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(mbn.to_numpy(tensor), host, strict=True)


def test_dtype_names_are_shared() -> None:
    for dtype in ("float32", np.float32, np.dtype("f4"), torch.float32):
        assert mbn.contract.dtype_name(dtype) == "float32"
    assert mbn.contract.dtype_name(torch.bfloat16) == "bfloat16"
    assert mbn.contract.dtype_name(np.dtype(ml_dtypes.bfloat16)) == "bfloat16"
