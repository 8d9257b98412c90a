"""Folding: a layer in evaluation as a scale and a shift, or merged into a dense layer, as exact as the layer itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbn
from mbn.conformance import oracle, strategies, ulp
from mbn.conformance.target import Target, assert_same, configured
from mbn.contract import layer_dtype

LAYERS: list[dict[str, Any]] = [{}, {"affine": False}, {"bias": False}, {"correction": 0, "axis": -1}, {"eps": 0.0}]
GENERATOR = np.random.default_rng(18)
WEIGHT = GENERATOR.standard_normal((4, 7)).astype(np.float32)
BIAS = GENERATOR.standard_normal(4).astype(np.float32)


def truth(
    target: Target, bn: mbn.BatchNorm1d, weight: np.ndarray, bias: np.ndarray | None = None
) -> tuple[ulp.Exact, ulp.Exact]:
    """Return the exact weight, (C, in), and bias, (C,), of a dense layer after the layer behind it is folded in."""
    held = target.snapshot(bn)
    mean, var = held["running_mean"], held["running_var"]
    scaled = oracle.evaluate(weight.T, np.zeros_like(mean), var, held.get("weight"), eps=bn.eps)
    given = np.zeros_like(mean) if bias is None else bias
    shifted = oracle.evaluate(given[None], mean, var, held.get("weight"), held.get("bias"), eps=bn.eps)
    return ulp.Exact(*(part.T for part in scaled)), ulp.Exact(*(part[0] for part in shifted))


@given(data=st.data())
def test_fold_gives_accurate_scale_and_shift(target: Target, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted({"float32", "float64"} & target.capabilities.dtypes)))
    eps = data.draw(st.sampled_from(strategies.EPS))
    bn = target.layer(4, eps=eps, dtype=dtype, **data.draw(st.sampled_from([{}, {"affine": False}, {"bias": False}])))
    configured(bn, seed=data.draw(st.integers(0, 99)))
    bn.running_mean = target.numpy(bn.running_mean) * data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e6]))
    bn.running_var = target.numpy(bn.running_var) * data.draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
    scales, shift = truth(target, bn, np.ones((4, 1), dtype))
    found = bn.fold()
    target.assert_output(found[0], ulp.Exact(*(part[:, 0] for part in scales)), dtype)
    target.assert_output(found[1], shift, dtype)


@pytest.mark.parametrize("arguments", LAYERS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_fold_linear_is_accurate(target: Target, dtype: str, arguments: dict[str, Any], *, has_bias: bool) -> None:
    target.require_dtype(dtype)
    bn = configured(target.layer(4, dtype=layer_dtype(dtype), **arguments), seed=1)
    weight, bias = WEIGHT.astype(dtype), BIAS.astype(dtype) if has_bias else None
    scaled, shifted = truth(target, bn, weight, bias)
    found = mbn.fold_linear(target.array(weight), None if bias is None else target.array(bias), bn)
    target.assert_output(found[0], scaled, dtype)
    target.assert_output(found[1], shifted, dtype)


def test_fold_linear_keeps_the_dtypes_of_weight_and_bias(target: Target) -> None:
    target.require_dtype("float16")
    bn = configured(target.layer(4), seed=1)
    weight = WEIGHT.astype(np.float16)
    found = mbn.fold_linear(target.array(weight), target.array(BIAS), bn)
    target.assert_output(found[0], truth(target, bn, weight)[0], "float16")
    target.assert_output(found[1], truth(target, bn, weight, BIAS)[1], "float32")


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_folded_layer_computes_the_same_as_both_layers(target: Target, offset: float) -> None:
    bn = configured(target.layer(4), seed=2).eval()
    bn.running_mean = target.numpy(bn.running_mean) + offset
    x = np.random.default_rng(19).standard_normal((32, 7))
    bias = BIAS + np.float32(offset)
    between = (x @ WEIGHT.T + bias).astype(np.float32)
    weight, shift = map(target.numpy, mbn.fold_linear(target.array(WEIGHT), target.array(bias), bn))
    # The dense layer's output is rounded to float32; the folded layer has no such intermediate result.
    bound = 4 * np.finfo(np.float32).eps * (8 + offset)
    assert np.abs(x @ weight.T + shift - target.numpy(bn(target.array(between)))).max() <= bound


def test_fold_of_zero_variance_leaves_the_bias(target: Target) -> None:
    bn = configured(target.layer(4, eps=0.0), seed=3)
    bn.running_var = 0
    expected = target.numpy(bn.bias)
    for scale, shift in (bn.fold(), mbn.fold_linear(target.array(WEIGHT), target.array(BIAS), bn)):
        assert not target.numpy(scale).any()
        np.testing.assert_array_equal(target.numpy(shift), expected)


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_fold_neither_depends_on_modes_nor_changes_them(target: Target, mode: str) -> None:
    bn = configured(target.layer(4), seed=4)
    before, expected = target.snapshot(bn), [target.numpy(vector) for vector in bn.fold()]
    getattr(bn, mode)()
    training = bn.training
    for vector, value in zip(bn.fold(), expected, strict=True):
        np.testing.assert_array_equal(target.numpy(vector), value)
    mbn.fold_linear(target.array(WEIGHT), target.array(BIAS), bn)
    assert bn.training is training
    assert_same(before, target.snapshot(bn))


def test_fold_linear_does_not_write_to_its_arguments(target: Target) -> None:
    weight, bias = target.array(WEIGHT), target.array(BIAS)
    mbn.fold_linear(weight, bias, configured(target.layer(4), seed=5))
    np.testing.assert_array_equal(target.numpy(weight), WEIGHT)
    np.testing.assert_array_equal(target.numpy(bias), BIAS)


@pytest.mark.parametrize("convert", [np.asarray, np.ndarray.tolist], ids=["NumPy", "lists"])
def test_fold_linear_accepts_host_data(target: Target, convert: Callable[[np.ndarray], Any]) -> None:
    bn = configured(target.layer(4), seed=6)
    expected = mbn.fold_linear(target.array(WEIGHT), target.array(BIAS), bn)
    found = mbn.fold_linear(convert(WEIGHT), convert(BIAS), bn)
    for array, own in zip(found, expected, strict=True):
        np.testing.assert_array_equal(target.numpy(array), target.numpy(own))


def test_fold_linear_accepts_a_weight_without_inputs(target: Target) -> None:
    weight, bias = mbn.fold_linear(target.array(WEIGHT[:, :0]), target.array(BIAS), target.layer(4))
    assert tuple(weight.shape) == (4, 0)
    assert tuple(bias.shape) == (4,)


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "an (in, C) kernel": (WEIGHT.T, BIAS, ValueError, r"weight has shape \(7, 4\).*C is 4.*kernel\.T"),
    "other channels": (WEIGHT[:3], BIAS, ValueError, r"weight has shape \(3, 7\).*\(C, in\), and C is 4\.$"),
    "a vector": (BIAS, BIAS, ValueError, r"weight has shape \(4,\)"),
    "a convolution": (WEIGHT[..., None], BIAS, ValueError, r"weight has shape \(4, 7, 1\)"),
    "a short bias": (WEIGHT, BIAS[:3], ValueError, r"bias has shape \(3,\).*C is 4"),
    "a bias for each": (WEIGHT, WEIGHT, ValueError, r"bias has shape \(4, 7\)"),
    "integers": (WEIGHT.astype(int), BIAS, TypeError, "weight is int64"),
    "an integer bias": (WEIGHT, BIAS.astype(int), TypeError, "bias is int64"),
    "float64": (WEIGHT.astype(float), BIAS, TypeError, "weight is float64"),
    "a bias in float64": (WEIGHT, BIAS.astype(float), TypeError, "bias is float64"),
    "nothing": (None, BIAS, TypeError, "None is no array"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fold_linear_rejects_bad_arguments(target: Target, name: str) -> None:
    weight, bias, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        mbn.fold_linear(weight, bias, target.layer(4))


def test_fold_rejects_a_layer_without_running_statistics(target: Target) -> None:
    bn = target.layer(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"no running statistics for fold\(\)"):
        bn.fold()
    with pytest.raises(ValueError, match=r"no running statistics for fold_linear\(\)"):
        mbn.fold_linear(WEIGHT, BIAS, bn)


def test_fold_rejects_a_layer_with_unknown_num_features(target: Target) -> None:
    bn = target.layer(None)
    for fold in (bn.fold, lambda: mbn.fold_linear(WEIGHT, BIAS, bn)):
        with pytest.raises(AttributeError, match="num_features is not known yet"):
            fold()


def test_jit_of_fold_linear_is_accurate(target: Target) -> None:
    target.require("jit")
    bn = configured(target.layer(4), seed=7)
    scaled, shifted = truth(target, bn, WEIGHT, BIAS)
    fold = target.transforms.jit(lambda weight, bias: mbn.fold_linear(weight, bias, bn))
    found = fold(target.array(WEIGHT), target.array(BIAS))
    target.assert_output(found[0], scaled, "float32")
    target.assert_output(found[1], shifted, "float32")


def test_gradient_of_fold_linear_is_accurate(target: Target) -> None:
    target.require("autograd")
    bn = configured(target.layer(4), seed=8)
    scale = target.numpy(bn.fold()[0])

    def loss(weight: Any, bias: Any) -> Any:
        folded_weight, folded_bias = mbn.fold_linear(weight, bias, bn)
        return folded_weight.sum() + folded_bias.sum()

    weight, bias = target.array(WEIGHT), target.array(BIAS)
    by_weight = target.transforms.grad(loss)(weight, bias)
    by_bias = target.transforms.grad(lambda bias, weight: loss(weight, bias))(bias, weight)
    np.testing.assert_allclose(target.numpy(by_weight), np.broadcast_to(scale[:, None], WEIGHT.shape), rtol=1e-6)
    np.testing.assert_allclose(target.numpy(by_bias), scale, rtol=1e-6)
