"""Dtypes: inputs that are accepted or rejected, and the dtypes, devices and memory orders of results."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

import mbn
from mbn.conformance import oracle, strategies
from mbn.conformance.target import Target, assert_same, strides
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape", [(200, 3), (20_000, 3), (50, 3, 9), (40, 3, 600)], ids=["200", "20000", "50x9", "40x600"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_narrow_input_in_a_float64_layer_is_accurate(
    target: Target, shape: tuple[int, ...], dtype: str, *, masked: bool
) -> None:
    target.require("any_size")
    target.require_dtype("float64")
    target.require_dtype(dtype)
    x = np.random.default_rng(10).standard_normal(shape)
    x[0] = 6e4 if dtype == "float16" else 1e6
    x = x.astype(dtype)
    arguments, weights = {}, None
    if masked:
        target.require("masks")
        masking = strategies.maskings((shape[0], *shape[2:]))["mask"]
        arguments, weights = target.arrays(masking.arguments), masking.weights
    bn = target.layer(3, dtype="float64", momentum=1.0)
    exact = oracle.train(x, np.zeros(3), np.ones(3), momentum=1.0, eps=1e-5, weights=weights)
    target.assert_output(bn(target.array(x), **arguments), exact.y, dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, "float64")
    target.assert_statistic(bn.running_var, exact.running_var, "float64")


def other_order(values: np.ndarray) -> np.ndarray:
    """Return the same values in the byte order that is not this machine's."""
    return values.astype(values.dtype.newbyteorder())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(200, 3), (9000, 3), (6, 3, 40)])
def test_byte_order_of_x_changes_no_bit(target: Target, shape: tuple[int, ...], dtype: str) -> None:
    target.require_dtype(dtype)
    x, dy = np.random.default_rng(13).standard_normal((2, *shape)).astype(dtype)
    x[0] = 6e4
    bn, twin = (target.layer(3, dtype=layer_dtype(dtype)) for _ in range(2))
    for layer, order in ((bn, other_order), (twin, np.array)):
        layer.weight = order(np.array([0.5, 2.0, 3.0], layer_dtype(dtype)))
        layer.running_var = order(np.array([2.0, 3.0, 4.0], layer_dtype(dtype)))
    y, pullback = bn.vjp(other_order(x))
    expected, of_twin = twin.vjp(target.array(x))
    results = y, *pullback(other_order(dy)), bn.running_mean, bn.running_var, bn.eval()(other_order(x))
    twins = expected, *of_twin(target.array(dy)), twin.running_mean, twin.running_var, twin.eval()(target.array(x))
    for result, other in zip(results, twins, strict=True):
        assert target.numpy(result).dtype.name == target.numpy(other).dtype.name
        np.testing.assert_array_equal(target.numpy(result), target.numpy(other))


ORDERS: list[Callable[[np.ndarray], np.ndarray]] = [np.array, other_order]


def test_byte_order_of_any_argument_changes_no_bit(target: Target) -> None:
    x = X.astype(np.float32)
    vectors = [np.array([a, b, c], np.float32) for a, b, c in [(1, 2, 3), (2, 3, 4), (0.5, 2, 3), (0, 1, 2)]]
    for training in (True, False):
        results = []
        for of_x, of_vectors in product(ORDERS, repeat=2):
            mean, var, weight, bias = (of_vectors(vector) for vector in vectors)
            normalized = mbn.functional.batch_norm(
                of_x(x), mean, var, weight, bias, training=training, backend=target.backend
            )
            results.append(normalized)
        expected, *others = results
        for other in others:
            for result, truth in zip(other, expected, strict=True):
                np.testing.assert_array_equal(target.numpy(result), target.numpy(truth))
    np.testing.assert_array_equal(target.numpy(mbn.asarray(other_order(x), backend=target.backend)), x)
    fitted, twin = (target.layer(3).fit([order(x), order(3 * x)], progress=False) for order in (other_order, np.array))
    assert_same(target.snapshot(twin), target.snapshot(fitted))
    if target.capabilities.masks:
        maskings = strategies.maskings((6, 4))["all three"].arguments
        y, expected = (
            target.layer(3)(x, **{name: order(values) for name, values in maskings.items()})
            for order in (other_order, np.array)
        )
        np.testing.assert_array_equal(target.numpy(y), target.numpy(expected))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "complex64"])
def test_input_that_is_not_floating_is_rejected(target: Target, dtype: str) -> None:
    bn = target.layer(3)
    before = target.snapshot(bn)
    with pytest.raises(TypeError, match=dtype):
        bn(np.ones((6, 3)).astype(dtype))
    assert {key: value.tolist() for key, value in before.items()} == {
        key: value.tolist() for key, value in target.snapshot(bn).items()
    }


def test_float64_input_into_a_float32_layer_is_rejected(target: Target) -> None:
    bn = target.layer(3)
    with pytest.raises(TypeError, match="float64"):
        bn(X)
    if "float64" in target.capabilities.dtypes:
        with pytest.raises(TypeError, match=r"float32.*dtype='float64'"):
            bn(target.array(X))


def test_undeclared_dtypes_are_rejected(target: Target) -> None:
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


def test_output_is_on_the_device_of_the_input(target: Target) -> None:
    x = target.array(X.astype(np.float32))
    bn = target.layer(3)
    assert target.backend.device(bn(x)) == target.backend.device(x)
    assert target.backend.device(bn.running_mean) == target.backend.device(x)


def test_results_agree_on_every_declared_device(target: Target) -> None:
    x = X.astype(np.float32)
    expected = target.numpy(target.layer(3)(target.array(x)))
    for device in target.capabilities.devices:
        bn = target.layer(3).to(device=device)
        y = target.numpy(bn(target.backend.asarray(x, device=device)))
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


def test_unknown_device_is_rejected(target: Target) -> None:
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
