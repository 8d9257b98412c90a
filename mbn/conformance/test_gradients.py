"""Gradients: the pullback (``vjp``), which every backend has, with or without autograd in its framework."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbn
from mbn.conformance import derivatives, strategies, ulp
from mbn.conformance.target import Target, assert_same, configured, strides
from mbn.contract import layer_dtype, transposed

DTYPES = ["float16", "bfloat16", "float32", "float64"]
X, DY = np.random.default_rng(16).normal(1, 2, (2, 6, 3, 4))
KINDS = strategies.maskings((6, 4))
MASKING = KINDS["mask and weights"]


def truth(
    before: dict[str, np.ndarray],
    x: np.ndarray,
    dy: np.ndarray,
    *,
    training: bool = True,
    eps: float = 1e-5,
    **more: Any,
) -> derivatives.Gradients:
    """Return the exact gradients of a layer whose entries were ``before``."""
    statistics = None if training else (before["running_mean"], before["running_var"])
    return derivatives.gradients(x, dy, before.get("weight"), eps=eps, statistics=statistics, **more)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pullback_is_accurate(target: Target, dtype: str, *, training: bool) -> None:
    target.require_dtype(dtype)
    x, dy = X.astype(dtype), DY.astype(dtype)
    bn = configured(target.layer(3, dtype=layer_dtype(dtype)), seed=1).train(training)
    before = target.snapshot(bn)
    own = target.array(x)
    _, pullback = bn.vjp(own)
    gradients = pullback(target.array(dy))
    target.assert_gradients(gradients, truth(before, x, dy, training=training), dtype)
    assert type(gradients[0]) is type(own)
    assert target.backend.device(gradients[0]) == target.backend.device(own)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pullback_with_masks_is_accurate(target: Target, kind: str, *, training: bool) -> None:
    target.require("masks")
    masking, x, dy = KINDS[kind], X.astype(np.float32), DY.astype(np.float32)
    bn = configured(target.layer(3), seed=2).train(training)
    before = target.snapshot(bn)
    for poison in (np.nan, np.inf):
        _, pullback = bn.vjp(target.array(masking.poisoned(x, poison)), **target.arrays(masking.arguments))
        gradients = pullback(target.array(masking.poisoned(dy, poison)))
        exact = truth(before, x, dy, training=training, weights=masking.weights)
        target.assert_gradients(gradients, exact, "float32")
        np.testing.assert_array_equal(target.numpy(gradients[0])[~masking.counted(x)], 0)
        before = target.snapshot(bn)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_pullback_with_masks_is_accurate_in_other_dtypes(target: Target, dtype: str) -> None:
    target.require("masks")
    target.require_dtype(dtype)
    x, dy = X.astype(dtype), DY.astype(dtype)
    bn = configured(target.layer(3, dtype=layer_dtype(dtype)), seed=3)
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(MASKING.poisoned(x)), **target.arrays(MASKING.arguments))
    exact = truth(before, x, dy, weights=MASKING.weights)
    target.assert_gradients(pullback(target.array(dy)), exact, dtype)


def test_pullback_is_accurate_for_rows(target: Target) -> None:
    x, dy = X[..., 0].astype(np.float32), DY[..., 0].astype(np.float32)
    bn = configured(target.layer(3), seed=4)
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x))
    target.assert_gradients(pullback(target.array(dy)), truth(before, x, dy), "float32")


def test_pullback_matches_the_two_values_example(target: Target) -> None:
    bn = target.layer(1, eps=3.0)
    _, pullback = bn.vjp(target.array(np.array([[0], [2]], np.float32)))
    dx, dweight, dbias = pullback(target.array(np.array([[0], [1]], np.float32)))
    # xhat is -1/2 and 1/2: dx = (dy - 1/2 - xhat / 4) / 2
    np.testing.assert_allclose(target.numpy(dx), [[-0.1875], [0.1875]], rtol=1e-6)
    np.testing.assert_allclose(target.numpy(dweight), [0.5], rtol=1e-6)
    np.testing.assert_allclose(target.numpy(dbias), [1], rtol=1e-6)


def test_dx_is_orthogonal_to_constants_and_to_x(target: Target) -> None:
    # The output does not change if x is shifted or, without eps, scaled: so dx is orthogonal to constants and to x.
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    _, pullback = target.layer(3, eps=0.0).vjp(target.array(x))
    dx = target.numpy(pullback(target.array(dy))[0]).astype(np.float64)
    np.testing.assert_allclose(dx.sum((0, 2)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose((dx * x).sum((0, 2)), np.zeros(3), atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_float32_pullback_is_accurate_with_large_means(
    target: Target, offset: float, slope: float, *, masked: bool
) -> None:
    masking = KINDS["mask"]
    x, dy = (offset + X).astype(np.float32), (slope + DY).astype(np.float32)
    arguments: dict[str, Any] = {}
    weights = None
    if masked:
        target.require("masks")
        arguments, weights = target.arrays(masking.arguments), masking.weights
    bn = configured(target.layer(3), seed=5)
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x), **arguments)
    target.assert_gradients(pullback(target.array(dy)), truth(before, x, dy, weights=weights), "float32")


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pullback_of_few_values_is_accurate_where_dy_nearly_cancels(
    target: Target, dtype: str, eps: float, *, masked: bool
) -> None:
    target.require_dtype(dtype)
    # With two values, dy minus its projections on a constant and on xhat would be 0, were it not for eps.
    x, dy = X.astype(dtype), DY.astype(dtype)
    arguments: dict[str, Any] = {}
    weights = None
    if masked:
        target.require("masks")
        lengths = np.array([1, 0, 0, 1, 0, 0])
        arguments, weights = target.arrays({"lengths": lengths}), (np.arange(4) < lengths[:, None]).astype(np.float64)
    else:
        x, dy = x[:2, :, 0], dy[:2, :, 0]
    bn = configured(target.layer(3, eps=eps), seed=13)
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x), **arguments)
    target.assert_gradients(pullback(target.array(dy)), truth(before, x, dy, eps=eps, weights=weights), dtype)


@pytest.mark.parametrize("mean", [1, 1e5], ids=["near", "away"])
@pytest.mark.parametrize("first", [2, 4096], ids=["ordinary", "outlier"])
@pytest.mark.parametrize("shape", [(6, 3, 4), (300, 3), (9000, 3)], ids=["few", "hundreds", "thousands"])
def test_constant_dy_gives_zero_dx_and_dweight(
    target: Target, shape: tuple[int, ...], first: float, mean: float
) -> None:
    x = np.random.default_rng(18).normal(0, 2, shape)
    x[0] = first
    x += mean
    x, dy = x.astype(np.float32), np.full(shape, 0.1, np.float32)
    bn = target.layer(3, eps=1e-12)
    exact = truth(target.snapshot(bn), x, dy, eps=1e-12)
    _, pullback = bn.vjp(target.array(x))
    dx, dweight, _ = map(target.numpy, pullback(target.array(dy)))
    for name, array, size in (("dx", dx, exact.sizes[0].max()), ("dweight", dweight, exact.sizes[1].max())):
        error = np.abs(array).max() / size  # the exact gradient is 0
        assert error <= ulp.CANCELLATION, f"{name} is {error:.3g} of its terms off"


@pytest.mark.parametrize("masked", [False, True])
def test_pullback_of_evaluation_is_accurate_where_sums_cancel(target: Target, *, masked: bool) -> None:
    x, dy = np.array([[[0.3], [9], [1.7]], [[0.1], [5], [0.1]]], np.float32)
    arguments: dict[str, Any] = {"mask": np.array([True, False, True])}
    if masked:
        target.require("masks")
    else:
        x, dy, arguments = x[::2], dy[::2], {}
    bn = target.layer(1).eval()
    bn.running_mean = 1.0
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x), **target.arrays(arguments))
    weights = arguments.get("mask")
    exact = truth(before, x, dy, training=False, weights=None if weights is None else weights.astype(np.float64))
    for name, array in zip(("dx", "dweight", "dbias"), pullback(target.array(dy)), strict=True):
        target.assert_derivative(array, getattr(exact, name), "float32", ulp.GRADIENT_BOUNDS["float32"], name)


def test_long_channels_have_accurate_gradients(target: Target) -> None:
    x, dy = np.random.default_rng(17).normal([[[1e3]], [[1e2]]], 1, (2, 100_000, 1)).astype(np.float32)
    bn = target.layer(1)
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x))
    target.assert_gradients(pullback(target.array(dy)), truth(before, x, dy), "float32")


@given(data=st.data())
def test_pullback_is_accurate_on_drawn_batches(target: Target, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([X.shape[:2], X.shape]))
    batch = data.draw(strategies.batches(target.capabilities.dtypes, shape))
    dy = data.draw(strategies.batches(frozenset({batch.dtype}), shape)).x
    # With a smaller eps, gradients may exceed the range of float16.
    eps = data.draw(st.sampled_from(strategies.EPS[3:] if batch.dtype == "float16" else strategies.EPS))
    training = data.draw(st.booleans())
    bn = target.layer(shape[1], eps=eps, dtype=batch.layer_dtype).train(training)
    before = target.snapshot(configured(bn, seed=data.draw(st.integers(0, 99))))
    arguments: dict[str, np.ndarray] = {}
    weights = None
    if target.capabilities.masks and data.draw(st.booleans()):
        kinds = strategies.maskings((shape[0], *shape[2:]))
        arguments, weights = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    _, pullback = bn.vjp(target.array(batch.x), **target.arrays(arguments))
    exact = truth(before, batch.x, dy, training=training, eps=eps, weights=weights)
    bounds = ulp.OUTPUT_BOUNDS[batch.dtype], *(ulp.STATISTICS_BOUNDS[batch.layer_dtype],) * 2
    for name, array, bound, size in zip(
        ("dx", "dweight", "dbias"), pullback(target.array(dy)), bounds, exact.sizes, strict=True
    ):
        host, value = target.numpy(array), getattr(exact, name)
        error = ulp.error(host, ulp.Exact(value, np.zeros_like(value), size), host.dtype.name)
        assert error <= bound, f"{name} is {error:.3g} ulp off; {bound} are allowed"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(d, s) for d, sizes in strategies.EXTREMES.items() for s in sizes])
def test_pullback_is_accurate_for_values_of_any_size(
    target: Target, dtype: str, size: float, *, training: bool, masked: bool
) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    target.require_numbers_of(size, dtype)
    x, dy = strategies.of_any_size((6, 3, 4), dtype, size), DY.astype(dtype)
    bn = target.layer(3, eps=0.0, dtype=layer_dtype(dtype)).train(training)
    # dx is dy times weight / standard deviation: choose weights that make dx about as large as dy.
    deviations = np.array([size, 1.0, size * 2.0**-12])
    if not training:
        least, most = (1e-18, 1e18) if layer_dtype(dtype) == "float32" else (1e-150, 1e150)
        deviations = deviations.clip(least, most)
    bn.weight, bn.running_var = deviations, 1.0 if training else deviations**2
    bn.running_mean = 0.9 * x[0, :, 0].astype(np.float64)
    arguments, weights = {}, None
    if masked:
        target.require("masks")
        arguments, weights = target.arrays(MASKING.arguments), MASKING.weights
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(MASKING.poisoned(x) if masked else x), **arguments)
    exact = truth(before, x, dy, training=training, eps=0.0, weights=weights)
    for name, array in zip(("dx", "dweight", "dbias"), pullback(target.array(dy)), strict=True):
        own_dtype = dtype if name == "dx" else layer_dtype(dtype)
        host, value = target.numpy(array), getattr(exact, name)
        for channel in range(3):  # compare channels separately, since their sizes differ
            column = np.s_[:, channel : channel + 1] if name == "dx" else np.s_[channel : channel + 1]
            error = ulp.relative_error(host[column], value[column])
            assert error <= ulp.GRADIENT_BOUNDS[own_dtype], f"{name} is {error:.3g} off"


@pytest.mark.parametrize(("dtype", "size"), [(d, s) for d, sizes in strategies.EXTREMES.items() for s in sizes])
def test_dx_is_accurate_where_dy_is_as_large_as_x(target: Target, dtype: str, size: float) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    target.require_numbers_of(size, dtype)
    x = strategies.of_any_size((6, 3, 4), dtype, size)
    # dy / standard deviation is of ordinary size, although 1 / standard deviation may be out of range.
    sizes = np.array([[max(size, 1e-290)], [1.0], [max(size, 1e-290)]])
    dy = (DY / 16 * sizes).astype(dtype)
    bn = target.layer(3, eps=0.0, dtype=layer_dtype(dtype))
    exact = truth(target.snapshot(bn), x, dy, eps=0.0)
    _, pullback = bn.vjp(target.array(x))
    dx, *_ = pullback(target.array(dy))
    target.assert_derivative(dx, exact.dx, dtype, ulp.GRADIENT_BOUNDS[dtype], "dx")


@pytest.mark.parametrize(("dtype", "size"), [(d, s) for d, sizes in strategies.EXTREMES.items() for s in sizes])
def test_pullback_is_accurate_for_constant_channels_of_any_size(target: Target, dtype: str, size: float) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    target.require_numbers_of(size, dtype)
    x = np.broadcast_to(np.array([[size], [1.0], [-size]]), DY.shape).astype(dtype)
    dy = DY.astype(dtype)
    bn = target.layer(3, dtype=layer_dtype(dtype))
    exact = truth(target.snapshot(bn), x, dy)
    _, pullback = bn.vjp(target.array(x))
    target.assert_gradients(pullback(target.array(dy)), exact, dtype)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e-30), ("float64", 1e-250)])
def test_pullback_is_accurate_for_weight_0_and_small_values(target: Target, dtype: str, size: float) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    x, dy = (X * size).astype(dtype), (DY / size).astype(dtype)
    bn = target.layer(3, eps=0.0, dtype=dtype)
    bn.weight = 0.0
    exact = truth(target.snapshot(bn), x, dy, eps=0.0)
    _, pullback = bn.vjp(target.array(x))
    target.assert_gradients(pullback(target.array(dy)), exact, dtype)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_pullback_is_accurate_for_dy_of_any_size(target: Target, size: float) -> None:
    target.require("any_size")
    target.require_dtype("float64")
    bn = target.layer(3, dtype="float64")
    before = target.snapshot(bn)
    for x in (X, X * 1e-110, X * 1e110, X * 1e-140, X * 1e140):
        dy = DY * size
        _, pullback = bn.vjp(target.array(x))
        dx, dweight, dbias = pullback(target.array(dy))
        exact = truth(before, x, dy)
        if np.abs(exact.dx).max() > 1e-300:
            target.assert_derivative(dx, exact.dx, "float64", 1e-12, "dx")
        target.assert_derivative(dbias, exact.dbias, "float64", 1e-12, "dbias")
        if np.abs(exact.dweight).max() > 1e-300:
            target.assert_derivative(dweight, exact.dweight, "float64", 1e-12, "dweight")


@pytest.mark.parametrize("size", [1e-30, 1e30, 1e-280, 1e280])
def test_pullback_is_accurate_for_sample_weights_of_any_size(target: Target, size: float) -> None:
    dtype = "float32" if 1e-38 < size < 1e38 else "float64"
    target.require("masks")
    target.require("any_size")
    target.require_dtype(dtype)
    x, dy = X.astype(dtype), (DY * size).astype(dtype)
    sample_weight = (np.random.default_rng(20).uniform(1, 2, (6, 4)) / size).astype(dtype)
    bn = target.layer(3, dtype=dtype)
    exact = truth(target.snapshot(bn), x, dy, weights=sample_weight.astype(np.float64))
    _, pullback = bn.vjp(target.array(x), sample_weight=target.array(sample_weight))
    target.assert_gradients(pullback(target.array(dy)), exact, dtype)


def test_dx_is_accurate_for_small_dy_and_large_variance(target: Target) -> None:
    target.require("any_size")
    x, dy = X.astype(np.float32), np.where(DY > 0, 2e-38, -5e-38).astype(np.float32)
    bn = target.layer(3).eval()
    bn.running_var, bn.weight = 8e36, 4e31
    exact = truth(target.snapshot(bn), x, dy, training=False)
    dx, *_ = bn.vjp(target.array(x))[1](target.array(dy))
    target.assert_derivative(dx, exact.dx, "float32", ulp.GRADIENT_BOUNDS["float32"], "dx")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("masked", [False, True])
def test_pullback_of_narrow_input_in_a_float64_layer_is_accurate(target: Target, dtype: str, *, masked: bool) -> None:
    target.require_dtype("float64")
    target.require_dtype(dtype)
    x, dy = np.random.default_rng(19).normal(3, 1, (2, 200, 3)).astype(dtype)
    x[0] = 6e4
    arguments, weights = {}, None
    if masked:
        target.require("masks")
        masking = strategies.maskings((200,))["mask"]
        arguments, weights = target.arrays(masking.arguments), masking.weights
    bn = target.layer(3, dtype="float64")
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x), **arguments)
    exact = truth(before, x, dy, weights=weights)
    dx, dweight, dbias = pullback(target.array(dy))
    target.assert_derivative(dx, exact.dx, dtype, ulp.GRADIENT_BOUNDS[dtype], "dx")
    target.assert_derivative(dweight, exact.dweight, "float64", 1e-12, "dweight")
    target.assert_derivative(dbias, exact.dbias, "float64", 1e-12, "dbias")


@pytest.mark.parametrize("training", [True, False])
def test_vjp_gives_the_output_and_state_of_a_call(target: Target, *, training: bool) -> None:
    x = target.array(X.astype(np.float32))
    bn, called = (configured(target.layer(3, momentum=0.3), seed=6).train(training) for _ in range(2))
    y, pullback = bn.vjp(x)
    np.testing.assert_array_equal(target.numpy(y), target.numpy(called(x)), strict=True)
    assert_same(target.snapshot(called), target.snapshot(bn))
    for _ in range(2):  # a pullback must not change the state
        pullback(target.array(DY.astype(np.float32)))
        assert_same(target.snapshot(called), target.snapshot(bn))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_vjp_equals_the_layer(target: Target, *, training: bool, masked: bool) -> None:
    if masked:
        target.require("masks")
    arguments = target.arrays(MASKING.arguments) if masked else {}
    x, dy = target.array(X.astype(np.float32)), target.array(DY.astype(np.float32))
    bn = configured(target.layer(3, momentum=0.3, eps=1e-3), seed=7).train(training)
    result, pullback = mbn.functional.batch_norm_vjp(
        x,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        training=training,
        momentum=0.3,
        eps=1e-3,
        **arguments,
        backend=target.backend,
    )
    y, pullback_of_layer = bn.vjp(x, **arguments)
    for given_array, own in zip(
        (*result, *pullback(dy)), (y, bn.running_mean, bn.running_var, *pullback_of_layer(dy)), strict=True
    ):
        np.testing.assert_array_equal(target.numpy(given_array), target.numpy(own), strict=True)


def test_batch_norm_vjp_needs_no_statistics_in_training(target: Target) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    result, pullback = mbn.functional.batch_norm_vjp(target.array(x), training=True, backend=target.backend)
    assert result.running_mean is None
    dx, dweight, dbias = pullback(target.array(dy))
    assert (dweight, dbias) == (None, None)
    target.assert_gradients([dx], derivatives.gradients(x, dy, eps=1e-5), "float32")


def _train(target: Target, bn: mbn.BatchNorm1d) -> None:
    bn.train()(target.array(5 * X.astype(np.float32)))


def _set(target: Target, bn: mbn.BatchNorm1d) -> None:
    bn.weight = bn.bias = bn.running_mean = bn.running_var = 7


def _edit(target: Target, bn: mbn.BatchNorm1d) -> None:
    if not target.capabilities.mutable:
        pytest.skip(f"{target.backend.name} declares immutable arrays")
    for vector in (bn.running_mean, bn.running_var):
        vector[...] = 7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [lambda *_: None, _train, _set, _edit], ids=["nothing", "train", "set", "edit"])
def test_pullback_gives_the_same_after_changes_of_the_layer(
    target: Target, change: Callable[[Target, mbn.BatchNorm1d], None], *, training: bool
) -> None:
    x, dy = target.array(X.astype(np.float32)), target.array(DY.astype(np.float32))
    bn = configured(target.layer(3), seed=8).train(training)
    _, pullback = bn.vjp(x)
    first = [target.numpy(gradient) for gradient in pullback(dy)]
    change(target, bn)
    for gradient, before in zip(pullback(dy), first, strict=True):
        np.testing.assert_array_equal(target.numpy(gradient), before, strict=True)


def test_pullback_ignores_later_edits_of_sample_weight(target: Target) -> None:
    target.require("masks")
    x, dy = target.array(X.astype(np.float32)), target.array(DY.astype(np.float32))
    host = np.array(KINDS["real weights"].arguments["sample_weight"])
    given_weights = [host]
    if target.capabilities.mutable:
        given_weights.append(target.array(host))
    for weights in given_weights:
        _, pullback = target.layer(3).vjp(x, sample_weight=weights)
        first = [target.numpy(gradient) for gradient in pullback(dy)]
        weights[...] = 0
        for gradient, before in zip(pullback(dy), first, strict=True):
            np.testing.assert_array_equal(target.numpy(gradient), before, strict=True)


@pytest.mark.parametrize("arguments", [{"bias": False}, {"affine": False}])
@pytest.mark.parametrize("training", [True, False])
def test_pullback_gives_none_for_absent_parameters(
    target: Target, arguments: dict[str, bool], *, training: bool
) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    bn = configured(target.layer(3, **arguments), seed=9).train(training)
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x))
    gradients = pullback(target.array(dy))
    assert [gradient is None for gradient in gradients] == [False, bn.weight is None, bn.bias is None]
    there = [gradient for gradient in gradients if gradient is not None]
    target.assert_gradients(there, truth(before, x, dy, training=training), "float32")


def test_zero_variance_and_eps_0_give_zero_gradients(target: Target) -> None:
    x, dy = np.full((6, 3, 4), 0.1, np.float32), DY.astype(np.float32)
    bn = target.layer(3, eps=0.0)
    _, pullback = bn.vjp(target.array(x))
    gradients = pullback(target.array(dy))
    target.assert_gradients(gradients, derivatives.gradients(x, dy, eps=0.0), "float32")
    assert not target.numpy(gradients[0]).any()
    assert not target.numpy(gradients[1]).any()


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_dx_and_dweight_are_zero_for_at_most_one_unmasked_value(target: Target, left: int, eps: float) -> None:
    target.require("masks")
    mask = np.arange(24).reshape(6, 4) < left
    masking = strategies.Masking({"mask": mask}, mask.astype(float))
    _, pullback = target.layer(3, eps=eps).vjp(target.array(masking.poisoned(X.astype(np.float32))), mask=mask)
    dx, dweight, dbias = map(target.numpy, pullback(target.array(masking.poisoned(DY.astype(np.float32)))))
    assert not dx.any()
    assert not dweight.any()
    np.testing.assert_array_equal(dbias, left * DY[0, :, 0].astype(np.float32))


def test_pullback_of_an_empty_batch_gives_zeros(target: Target) -> None:
    bn = configured(target.layer(3), seed=10)
    y, pullback = bn.vjp(target.array(X[:0].astype(np.float32)))
    assert int(bn.num_batches_tracked) == 4
    dx, dweight, dbias = pullback(y)
    assert tuple(dx.shape) == (0, 3, 4)
    assert target.numpy(dweight).tolist() == target.numpy(dbias).tolist() == [0, 0, 0]
    assert target.numpy(dbias).dtype == np.float32


def test_pullback_is_the_same_for_channels_last(target: Target) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    first, last = target.layer(3), target.layer(3, axis=-1)
    expected = [target.numpy(gradient) for gradient in first.vjp(target.array(x))[1](target.array(dy))]
    _, pullback = last.vjp(target.array(x.swapaxes(1, 2)))
    dx, *sums = (target.numpy(gradient) for gradient in pullback(target.array(dy.swapaxes(1, 2))))
    for gradient, other in zip((dx.swapaxes(1, 2), *sums), expected, strict=True):
        np.testing.assert_array_equal(gradient, other, strict=True)


def test_pullback_of_a_frozen_layer_is_that_of_evaluation(target: Target) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    bn = configured(target.layer(3), seed=11).freeze()
    before = target.snapshot(bn)
    _, pullback = bn.vjp(target.array(x))
    target.assert_gradients(pullback(target.array(dy)), truth(before, x, dy, training=False), "float32")
    assert_same(before, target.snapshot(bn))


def test_without_running_statistics_evaluation_uses_the_batch(target: Target) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    _, pullback = target.layer(3, track_running_stats=False).eval().vjp(target.array(x))
    target.assert_gradients(pullback(target.array(dy)), derivatives.gradients(x, dy, eps=1e-5), "float32")


def test_number_of_features_comes_from_the_first_input(target: Target) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    bn = target.layer(None)
    _, pullback = bn.vjp(target.array(x))
    assert int(bn.num_batches_tracked) == 1
    target.assert_gradients(pullback(target.array(dy)), derivatives.gradients(x, dy, eps=1e-5), "float32")


def test_vjp_and_pullback_accept_host_data(target: Target) -> None:
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    _, pullback = target.layer(3).vjp(target.array(x))
    expected = [target.numpy(gradient) for gradient in pullback(target.array(dy))]
    _, of_host = target.layer(3).vjp(x)
    for other in (pullback(dy), pullback(dy.tolist()), of_host(dy)):
        for gradient, own in zip(other, expected, strict=True):
            np.testing.assert_array_equal(target.numpy(gradient), own, strict=True)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_memory_layout_changes_no_bit_of_the_gradients(target: Target, layout: str) -> None:
    x, dy = (strategies.laid_out(values.astype(np.float32), layout) for values in (X, DY))
    plain = [target.array(np.ascontiguousarray(values)) for values in (x, dy)]
    expected = target.layer(3).vjp(plain[0])[1](plain[1])
    for gradient, other in zip(target.layer(3).vjp(x)[1](dy), expected, strict=True):
        np.testing.assert_array_equal(target.numpy(gradient), target.numpy(other), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_dx_has_the_memory_order_of_x(target: Target, *, training: bool) -> None:
    target.require_memory_orders()
    bn = target.layer(3, axis=-1).train(training)
    plain = target.array(np.ascontiguousarray(X.swapaxes(1, 2).astype(np.float32)))  # (N, L, C)
    for x in (plain, transposed(target.array(X.astype(np.float32)))):
        for dy in (plain, transposed(target.array(DY.astype(np.float32)))):
            dx, _, _ = bn.vjp(x)[1](dy)
            assert strides(dx) == strides(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_pullback_does_not_write_to_its_arguments(target: Target, *, training: bool, masked: bool) -> None:
    if masked:
        target.require("masks")
    host = [X.astype(np.float32), DY.astype(np.float32), *(MASKING.arguments.values() if masked else ())]
    x, dy, *masks = arrays = [target.array(values) for values in host]
    bn = configured(target.layer(3), seed=12).train(training)
    _, pullback = bn.vjp(x, **dict(zip(MASKING.arguments, masks, strict=False)))
    before = target.snapshot(bn)
    pullback(dy)
    for array, values in zip(arrays, host, strict=True):
        np.testing.assert_array_equal(target.numpy(array), values)
    assert_same(before, target.snapshot(bn))


def test_pullback_gives_the_same_bits_on_every_call(target: Target) -> None:
    x, dy = np.random.default_rng(18).normal(3, 2, (2, 1000, 33)).astype(np.float32)
    first, *others = (
        [target.numpy(gradient) for gradient in target.layer(33).vjp(target.array(x))[1](target.array(dy))]
        for _ in range(3)
    )
    for other in others:
        for gradient, expected in zip(other, first, strict=True):
            np.testing.assert_array_equal(gradient, expected)
