"""The private parts of Torch that mbn uses, most of them in predicates of how Torch executes operations at the moment.

A version of Torch that moves a private part breaks this file and no other. Under ``torch.compile`` no function here may
be traced except ``torch.compiler.is_compiling``, which Dynamo takes for a constant.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._C import _current_graph_task_id, _get_value_trace, _is_tracing, _len_torch_dispatch_stack  # type: ignore[attr-defined]
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor, peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # noqa: F401 - for other files

_OWN = torch.Tensor, torch.nn.Parameter
"""Classes without ``__torch_function__`` or ``__torch_dispatch__`` of their own."""
CPU = -1
"""The number of the CPU among the indices of GPUs."""
_dispatch_keys = torch._C._dispatch_keys
with torch.inference_mode():
    _ON_CPU = {_dispatch_keys(torch.empty(0, device="cpu")).raw_repr()}
with torch.inference_mode(mode=False):
    _ON_CPU.add(_dispatch_keys(torch.empty(0, device="cpu")).raw_repr())
"""The properties by which Torch dispatches plain tensors in host memory: those of inference mode, and all others."""
_HAS_VERSIONS = hasattr(torch._C, "_to_dlpack_versioned")  # Torch 2.9 and later


def is_transformed() -> bool:
    """Tell whether operations are compiled, transformed by ``torch.func``, or differentiated in forward mode."""
    return torch.compiler.is_compiling() or is_interpreted()


def is_interpreted() -> bool:
    """Tell whether operations are transformed by ``torch.func``, or differentiated in forward mode."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Tell whether ``torch.export`` traces the operations. Older Dynamos take the public predicate for True."""
    return torch.compiler._is_exporting_flag


def is_surely_below(size: int, limit: int) -> bool:
    """Tell whether traced code knows that a size, which may be a symbol, is below a limit; the code stays general."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # compilers have imported it

    return statically_known_true(size < limit)


def is_plain(value: torch.Tensor) -> bool:
    """Tell whether a tensor is of no class with rules of its own."""
    return type(value) in _OWN


def below_autograd() -> AbstractContextManager[None]:
    """Return a context in which operators call their kernels, past autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def is_recorded(*values: Any) -> bool:
    """Tell whether autograd records operations on one of these values; None is ignored."""
    if torch.is_grad_enabled():
        for value in values:  # a loop, as below
            if value is not None and value.requires_grad:
                return True
    return False


def is_traced(value: torch.Tensor | None) -> bool:
    """Tell whether this tensor is traced: its values are unknown now, or invalid after the transformation."""
    return value is not None and (
        torch.compiler.is_compiling()
        or _is_tracing()
        or is_fake(value)
        or is_functorch_wrapped_tensor(value)
        or is_legacy_batchedtensor(value)
    )


def is_fake(value: torch.Tensor | None) -> bool:
    """Tell whether this is a tensor without values: fake, or on the meta device."""
    return value is not None and (isinstance(value, FakeTensor) or value.is_meta)


def is_scripted() -> bool:
    """Tell whether ``torch.jit.trace`` traces the operations, or ``torch.onnx.export`` by means of it."""
    return not torch.compiler.is_compiling() and _is_tracing()


def is_constant(value: torch.Tensor | None) -> bool:
    """Tell whether the traced graph would contain this tensor as a constant, since no module registers it."""
    if value is None:
        return False
    try:
        return bool(_get_value_trace(value).node().kind() == "prim::Constant")
    except RuntimeError:  # Torch raises this for a constant that requires a gradient
        return True


def common_device(*values: torch.Tensor | None) -> int | None:
    """Return the one device of plain tensors: ``CPU`` or the index of a GPU.

    The result is None if the tensors are not on one such device, if one of them is not plain (another class or layout,
    a lazy or transformed tensor), or if a mode intercepts operations. A value of None is ignored.
    """
    if _is_tracing() or _len_torch_dispatch_stack():
        return None
    found = None
    for value in values:  # a loop, since every call runs it and a generator is slower
        if value is None:
            continue
        if type(value) not in _OWN:
            return None
        if _dispatch_keys(value).raw_repr() in _ON_CPU:  # all of the following at once
            own: int | None = CPU
        else:
            if value.layout is not torch.strided or value.is_neg() or is_zero_tensor(value):
                return None
            if is_functorch_wrapped_tensor(value) or is_legacy_batchedtensor(value):
                return None
            own = CPU if value.is_cpu else value.get_device() if value.is_cuda else None
        if own is None or own != (own if found is None else found):
            return None
        found = own
    return found


def is_backward() -> bool:
    """Tell whether a backward pass executes this code: activation checkpointing repeats forward passes within it."""
    return _current_graph_task_id() != -1


def is_zero_tensor(value: torch.Tensor) -> bool:
    """Tell whether this is a tensor of zeros without memory: forward mode makes such derivatives."""
    return value._is_zerotensor()


def copy_all(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy tensors to others in one call of Torch, so that an interrupt comes before or after all copies."""
    torch._foreach_copy_(list(targets), list(sources))


def assumed_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as ``torch.compiler.assume_constant_result`` does, which would import the compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def gather_all(group: Any, rows: torch.Tensor, vector: torch.Tensor) -> None:
    """Gather the vectors of a process group, as ``torch.distributed.all_gather_single`` does but without its logger."""
    from torch._C._distributed_c10d import AllgatherOptions  # some builds of Torch have no torch.distributed

    options = AllgatherOptions()
    options.asyncOp = False
    gather = getattr(group, "all_gather_single", None) or group._allgather_base  # the name before Torch 2.13
    work = gather(rows, vector, options)
    if work is not None:
        work.wait()


def to_dlpack(tensor: torch.Tensor, *, is_versioned: bool) -> object:
    """Return a DLPack capsule, as ``Tensor.__dlpack__`` does but without its checks."""
    return (torch._C._to_dlpack_versioned if is_versioned and _HAS_VERSIONS else torch._C._to_dlpack)(tensor)
