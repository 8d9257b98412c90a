"""Folding: a layer in evaluation mode as one product and one sum, alone or within the dense layer before it.

The results have to be as exact as the layer's own outputs, on every backend and under every transformation. So the
layer itself computes them: the new weight is its output for the old one, with a running mean and a bias of 0, and the
new bias is its output for the old one.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mbn.contract import Array, Params, State, dtype_name, transposed

Evaluate: TypeAlias = Callable[[Params, State, Array], Array]
"""The layer in evaluation mode, as a function of parameters, state and x."""


def fold(evaluate: Evaluate, params: Params, state: State) -> tuple[Array, Array]:
    """Return scale and shift, (C,), such that the layer in evaluation computes ``x * scale + shift``."""
    ones = np.ones((1, *state.running_mean.shape), dtype_name(state.running_mean.dtype))
    return _scaled(evaluate, params, state, ones)[0, :], evaluate(params, state, np.zeros_like(ones))[0, :]


def fold_linear(evaluate: Evaluate, params: Params, state: State, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Return weight, (C, in), and bias, (C,), of one dense layer that computes a dense layer and then the evaluation.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    2018 (arXiv:1712.05877), section 3.2.
    """
    folded = _scaled(evaluate, params, state, transposed(weight))
    return transposed(folded), evaluate(params, state, bias[None, :])[0, :]


def _scaled(evaluate: Evaluate, params: Params, state: State, values: Array) -> Array:
    """Return values, (N, C), times the scale of each channel."""
    zeros = np.zeros(state.running_mean.shape, dtype_name(state.running_mean.dtype))
    return evaluate(params._replace(bias=None), state._replace(running_mean=zeros), values)
