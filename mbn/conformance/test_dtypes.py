"""Dtypes: what goes in, what comes out, and where it lies."""

import numpy as np
import pytest

from mbn.conformance.target import Target, strides
from mbn.contract import layer_dtype, transposed

DTYPES = ["float16", "bfloat16", "float32", "float64"]
X = np.random.default_rng(9).normal(1, 2, (6, 3, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_dtype_of_the_input(target: Target, dtype: str, *, training: bool) -> None:
    target.require_dtype(dtype)
    bn = target.layer(3, dtype=layer_dtype(dtype)).train(training)
    x = target.array(X.astype(dtype))
    y = bn(x)
    assert type(y) is type(x)
    assert y.dtype == x.dtype
    assert target.numpy(y).dtype.name == dtype
    assert tuple(y.shape) == X.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_keep_the_dtype_of_the_layer(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    bn = target.layer(3, dtype=layer_dtype(dtype))
    before = target.snapshot(bn)
    for _ in range(2):
        bn(target.array(X.astype(dtype)))
    for key, value in target.snapshot(bn).items():
        assert value.dtype == before[key].dtype
        assert value.shape == before[key].shape
        assert key == "num_batches_tracked" or value.dtype == layer_dtype(dtype)
    assert before["num_batches_tracked"].dtype in (np.int64, np.int32)


def test_narrow_input_goes_into_a_wide_layer(target: Target) -> None:
    target.require_dtype("float64")
    bn = target.layer(3, dtype="float64", momentum=1.0)
    y = target.numpy(bn(target.array(X.astype(np.float32))))
    assert y.dtype == np.float32
    assert target.numpy(bn.running_mean).dtype == np.float64
    np.testing.assert_allclose(
        target.numpy(bn.running_mean), X.astype(np.float32).astype(float).mean((0, 2)), rtol=1e-9
    )


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "complex64"])
def test_input_that_is_not_floating_is_refused(target: Target, dtype: str) -> None:
    bn = target.layer(3)
    before = target.snapshot(bn)
    with pytest.raises(TypeError, match=dtype):
        bn(np.ones((6, 3)).astype(dtype))
    assert {key: value.tolist() for key, value in before.items()} == {
        key: value.tolist() for key, value in target.snapshot(bn).items()
    }


def test_float64_input_into_a_float32_layer_is_refused(target: Target) -> None:
    bn = target.layer(3)
    with pytest.raises(TypeError, match="float64"):
        bn(X)
    if "float64" in target.capabilities.dtypes:
        with pytest.raises(TypeError, match=r"float32.*dtype='float64'"):
            bn(target.array(X))


def test_undeclared_dtypes_are_refused(target: Target) -> None:
    undeclared = sorted(set(DTYPES) - target.capabilities.dtypes)
    if not undeclared:
        pytest.skip(f"{target.backend.name} declares every dtype")
    for dtype in undeclared:
        with pytest.raises(TypeError, match=dtype):
            target.layer(3)(X.astype(dtype))


def test_host_data_comes_out_as_an_array_of_the_backend(target: Target) -> None:
    bn, twin = target.layer(3), target.layer(3)
    host = X.astype(np.float32)
    np.testing.assert_array_equal(target.numpy(bn(host)), target.numpy(twin(target.array(host))), strict=True)
    listed = target.numpy(bn.eval()(host[:, :, 0].tolist()))
    np.testing.assert_array_equal(listed, target.numpy(bn(target.array(host[:, :, 0]))), strict=True)


def test_output_lies_where_the_input_does(target: Target) -> None:
    x = target.array(X.astype(np.float32))
    bn = target.layer(3)
    assert target.backend.device(bn(x)) == target.backend.device(x)
    assert target.backend.device(bn.running_mean) == target.backend.device(x)


def test_every_declared_device_works(target: Target) -> None:
    x = X.astype(np.float32)
    expected = target.numpy(target.layer(3)(target.array(x)))
    for device in target.capabilities.devices:
        bn = target.layer(3).to(device=device)
        y = target.numpy(bn(target.backend.asarray(x, device=device)))
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


def test_unknown_device_is_refused(target: Target) -> None:
    bn = target.layer(3)
    before = target.snapshot(bn)
    with pytest.raises(ValueError, match="device"):
        bn.to(device="no such device")
    assert list(before) == list(target.snapshot(bn))
    bn(target.array(X.astype(np.float32)))


@pytest.mark.parametrize("training", [True, False])
def test_output_has_the_memory_order_of_the_input(target: Target, *, training: bool) -> None:
    target.require_memory_orders()
    bn = target.layer(3, axis=-1).train(training)
    plain = target.backend.asarray(X.swapaxes(1, 2).astype(np.float32).copy(), device=target.device)  # (N, L, C)
    swapped = transposed(target.array(X.astype(np.float32)))  # the same values with channels outermost
    for x in (plain, swapped):
        y = bn(x)
        assert strides(y) == strides(x)
