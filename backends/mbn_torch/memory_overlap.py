"""The check of ``out``: whether the output can be written to the caller's tensor."""

from typing import Any

import numpy as np
import torch

from mbn.contract import overlaps_itself
from mbn_torch.private import is_recorded, is_traced, is_zero_tensor


def conflict(out: torch.Tensor, x: torch.Tensor) -> str | None:  # noqa: PLR0911 - a reason each
    """Return why the output of x cannot be written to ``out``, as words that follow "out"; None if it can.

    Both have the same shape, dtype and device. Traced tensors have no memory to check: the result is None.
    """
    if is_traced(out) or is_traced(x):
        return None
    if is_recorded(out):
        return "requires grad, and autograd cannot record writes to out: call it under torch.no_grad()"
    if is_recorded(x):
        return "cannot be used while autograd records, and x requires grad: call it under torch.no_grad()"
    if out.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode() and can be written to only there"
    if out.is_neg() or out.is_conj() or is_zero_tensor(out):
        return "is a view whose values differ from its memory (of conj().imag, say): give an ordinary tensor"
    if not out.is_contiguous() and overlaps_itself(tuple(out.shape), out.stride(), 1):
        return "overlaps itself: some of its values share memory"
    # Writing to x itself is safe: each value is read before it is overwritten.
    is_same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    is_apart = is_same or not np.shares_memory(np.asarray(_Memory(out)), np.asarray(_Memory(x)))
    return None if is_apart else "overlaps x in memory without being x"


class _Memory:
    """The address range of a tensor on any device, for ``np.shares_memory``, which compares addresses only."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "typestr": f"|V{tensor.itemsize}",
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }
