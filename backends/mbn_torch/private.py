"""The private parts of Torch, and questions about what it does with operations at the moment, many of which need them.

A version of Torch that moves one of them breaks this file and no other. Under ``torch.compile`` nothing here may be
traced but ``is_compiling``, which Dynamo takes for a constant.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import _current_graph_task_id, _get_value_trace, _is_tracing, _len_torch_dispatch_stack  # type: ignore[attr-defined]
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor, peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # noqa: F401 - for other files

_OWN = torch.Tensor, torch.nn.Parameter
"""Classes whose operations nobody overrides."""
CPU = -1
"""The number of the device that has the host's memory, beside the indices of GPUs."""
_HAS_VERSIONS = hasattr(torch._C, "_to_dlpack_versioned")  # Torch 2.9 and later


def is_transformed() -> bool:
    """Tell whether operations are compiled, vectorised or differentiated forwards, or by ``torch.func``."""
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0


def is_recorded(*values: Any) -> bool:
    """Tell whether autograd records, for a backward pass, what is done with one of these; None is nothing."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def is_traced(value: torch.Tensor | None) -> bool:
    """Tell whether this stands for values that are not known now, or not after the transformation."""
    return value is not None and (
        torch.compiler.is_compiling()
        or _is_tracing()
        or is_fake(value)
        or is_functorch_wrapped_tensor(value)
        or is_legacy_batchedtensor(value)
    )


def is_fake(value: torch.Tensor | None) -> bool:
    """Tell whether this is a tensor without values."""
    return value is not None and (isinstance(value, FakeTensor) or value.is_meta)


def is_scripted() -> bool:
    """Tell whether ``torch.jit.trace`` follows the operations, or ``torch.onnx.export`` by way of it."""
    return not torch.compiler.is_compiling() and _is_tracing()


def is_constant(value: torch.Tensor | None) -> bool:
    """Tell whether this would be a constant of the graph that ``is_scripted`` is about: nothing that a model holds."""
    if value is None:
        return False
    try:
        return bool(_get_value_trace(value).node().kind() == "prim::Constant")
    except RuntimeError:  # it would be one if it did not require a gradient
        return True


def common_device(*values: torch.Tensor | None) -> int | None:
    """Return where these are, ``CPU`` or the index of a GPU, if they are nothing but values in memory there.

    None where they are more, are elsewhere or apart, or somebody sees the operations. A value of None is nothing.
    """
    if _is_tracing() or _len_torch_dispatch_stack():
        return None
    found = None
    for value in values:  # in every call, where a generator costs
        if value is None:
            continue
        if type(value) not in _OWN or value.layout is not torch.strided:
            return None
        if value.is_neg() or is_zero_tensor(value):
            return None
        if is_functorch_wrapped_tensor(value) or is_legacy_batchedtensor(value):
            return None
        own = CPU if value.is_cpu else value.get_device() if value.is_cuda else None
        if own is None or own != (own if found is None else found):
            return None
        found = own
    return found


def is_backward() -> bool:
    """Tell whether this runs within a backward pass, as a forward pass does that activation checkpointing repeats."""
    return _current_graph_task_id() != -1


def is_zero_tensor(value: torch.Tensor) -> bool:
    """Tell whether this is a tensor of zeros without memory, as derivatives in forward mode can be."""
    return value._is_zerotensor()


def copy_all(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy tensors to others in one call, which no interrupt splits."""
    torch._foreach_copy_(list(targets), list(sources))


def to_dlpack(tensor: torch.Tensor, *, is_versioned: bool) -> object:
    """Return what ``Tensor.__dlpack__`` does, without its checks."""
    return (torch._C._to_dlpack_versioned if is_versioned and _HAS_VERSIONS else torch._C._to_dlpack)(tensor)
