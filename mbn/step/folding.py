"""A layer in evaluation mode as one product and one sum, alone or within the dense layer before it.

The results have to be as exact as the layer's own outputs, and follow every backend and transformation. So folding is
normalising: a weight becomes what the layer makes of it around a mean of 0, and a bias what the layer makes of it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, dtype_name, transposed
from mbn.convert import received
from mbn.state.storage import Storage

if TYPE_CHECKING:
    from mbn.layer import BatchNorm1d


def fold(bn: "BatchNorm1d") -> tuple[Array, Array]:
    """Return scale and shift, (C,), with which evaluation is ``x * scale + shift``."""
    registry.check_uncompiled("folding a layer")
    ones = np.ones((1, *bn.running_mean.shape), dtype_name(bn.running_mean.dtype))
    return _scaled(bn, ones)[0, :], _shifted(bn, np.zeros_like(ones))[0, :]


def fold_linear(weight: Any, bias: Any, bn: "BatchNorm1d") -> tuple[Array, Array]:
    """Return weight and bias of the dense layer that does what one does with ``bn`` in evaluation mode behind it.

    Args:
        weight: (C, in), as ``torch.nn.Linear`` has it; of a (in, C) kernel, as flax and Keras have it, the transpose.
        bias: (C,), or None for none.
        bn: the layer; it is not changed.

    Returns:
        Arrays of the layer's backend, (C, in) and (C,), in the dtypes of ``weight`` and ``bias``; in that of ``weight``
        without a bias. Each is as exact as an output of the layer.

    Raises:
        TypeError: another framework's array, or a dtype that the layer does not take.
        ValueError: a wrong shape or device, or a layer without running statistics.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    2018 (arXiv:1712.05877), section 3.2.
    """
    checks.layer("fold_linear", bn, Storage)
    registry.check_uncompiled("folding a layer")
    checks.tracked(bn.track_running_stats, "fold_linear")
    dtype = dtype_name(bn.running_mean.dtype)
    backend, device = (bn._backend, bn._device) if bn._is_bound else (registry.owner_of(weight), None)
    weight = received(backend, "weight", weight, dtype, device)
    if bias is None:
        bias = backend.asarray(np.zeros(bn.running_mean.shape), dtype_name(weight.dtype), backend.device(weight))
    bias = received(backend, "bias", bias, dtype, device)
    checks.linear(backend, weight, bias, bn.num_features, dtype)
    return transposed(_scaled(bn, transposed(weight))), _shifted(bn, bias[None, :])[0, :]


def _scaled(bn: "BatchNorm1d", values: Any) -> Array:
    """Return values, (N, C), times the scale of each channel."""
    zeros = np.zeros(bn.running_mean.shape, dtype_name(bn.running_mean.dtype))
    params, state = bn.params._replace(bias=None), bn.state._replace(running_mean=zeros)
    return bn.apply(params, state, values, training=False)[0]


def _shifted(bn: "BatchNorm1d", values: Any) -> Array:
    """Return values, (N, C), as the layer evaluates them."""
    return bn.apply(bn.params, bn.state, values, training=False)[0]
