"""Folding a layer into dense layers of frameworks, for bound and unbound layers."""

import frameworks
import numpy as np
import pytest
import second_framework as other

import mbn
from mbn.conformance.target import configured

torch = frameworks.optional("torch")

X = np.random.default_rng(1).standard_normal((16, 3)).astype(np.float32)
WEIGHT = np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)


@pytest.mark.parametrize("has_bias", [True, False])
def test_fold_linear_into_a_torch_linear_gives_the_same_output(*, has_bias: bool) -> None:
    linear = torch.nn.Linear(3, 4, bias=has_bias)
    bn = configured(mbn.BatchNorm1d(4, backend="torch"), seed=1).eval()
    folded = torch.nn.Linear(3, 4)
    weight, bias = mbn.fold_linear(linear.weight, linear.bias, bn)
    folded.load_state_dict({"weight": weight, "bias": bias})
    x = torch.from_numpy(X)
    torch.testing.assert_close(folded(x), bn(linear(x)), rtol=1e-5, atol=1e-6)
    assert weight.is_contiguous()


def test_fold_linear_of_an_unbound_layer_uses_the_backend_of_the_weight() -> None:
    bn = configured(mbn.BatchNorm1d(4), seed=1)
    bias = np.ones(4, np.float32)
    folded = mbn.fold_linear(other.asarray(WEIGHT), bias, bn)
    assert all(isinstance(array, other.Array) for array in folded)
    assert bn.backend is None
    of_numpy = mbn.fold_linear(WEIGHT, bias, bn)
    for array, own in zip(of_numpy, folded, strict=True):
        np.testing.assert_allclose(array, mbn.to_numpy(own), rtol=1e-6)
    assert all(isinstance(array, np.ndarray) for array in bn.fold())


def test_fold_linear_refuses_arrays_of_another_framework() -> None:
    bn = mbn.BatchNorm1d(4, backend="numpy")
    weight, bias = other.asarray(WEIGHT), other.asarray(WEIGHT[:, 0].copy())
    with pytest.raises(TypeError, match=f"weight is an array of {other.NAME} and the backend is numpy"):
        mbn.fold_linear(weight, bias, bn)
    with pytest.raises(TypeError, match=f"bias is an array of {other.NAME} and the backend is numpy"):
        mbn.fold_linear(WEIGHT, bias, bn)


@pytest.mark.parametrize("given", [None, WEIGHT], ids=["None", "array"])
def test_fold_linear_refuses_an_argument_that_is_no_layer(given) -> None:
    with pytest.raises(TypeError, match=r"fold_linear takes a mbn.BatchNorm1d, not .*mbn.from_torch"):
        mbn.fold_linear(np.ones((3, 2), np.float32), None, given)


def test_folded_arrays_can_be_differentiated() -> None:
    bn = mbn.BatchNorm1d(4, backend="torch")
    scale, _ = bn.fold()
    scale.sum().backward()
    torch.testing.assert_close(bn.weight.grad, torch.rsqrt(bn.running_var + bn.eps))
