"""Whether an output can be written to a tensor of the caller's."""

from typing import Any

import numpy as np
import torch

from mbn.contract import overlaps_itself
from mbn_torch.private import is_recorded, is_traced, is_zero_tensor


def conflict(out: torch.Tensor, x: torch.Tensor) -> str | None:  # noqa: PLR0911 - a reason each
    """Say why the output of x cannot be written to ``out``, in the words that follow its name; None if it can.

    Both have the same shape, dtype and device. Of what a trace stands for the framework that runs it has to know.
    """
    if is_traced(out) or is_traced(x):
        return None
    if is_recorded(out):
        return "requires grad, and autograd cannot record what is written to it: call it under torch.no_grad()"
    if is_recorded(x):
        return "is not recorded by autograd, and x requires grad: call it under torch.no_grad()"
    if out.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode() and can be written to only there"
    if out.is_neg() or out.is_conj() or is_zero_tensor(out):
        return "is a view that changes what it shows of its memory (of conj().imag, say): give a plain one"
    if not out.is_contiguous() and overlaps_itself(tuple(out.shape), out.stride(), 1):
        return "overlaps itself: some of its values share memory"
    # Writing to x itself is safe: each value is read before the one in its place is written.
    is_same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    is_apart = is_same or not np.shares_memory(np.asarray(_Memory(out)), np.asarray(_Memory(x)))
    return None if is_apart else "overlaps x in memory without being x"


class _Memory:
    """The memory of a tensor as NumPy sees it, on whatever device it is: nobody reads it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "typestr": f"|V{tensor.itemsize}",
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }
