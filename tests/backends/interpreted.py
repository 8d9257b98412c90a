"""A plugin of pytest that sends tensors in host memory to the kernels for GPUs, which Triton interprets.

It has to be imported before Triton. ``MBN_PLANTED`` names a bug to plant in the kernels.
"""

import functools
import os
import threading
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import triton.language as tl
from hypothesis import HealthCheck, settings
from triton.runtime import interpreter

from mbn_torch import backend
from mbn_torch.kernels import gpu
from mbn_torch.private import CPU, common_device

settings.register_profile(
    "interpreted",
    deadline=None,
    derandomize=True,
    max_examples=8,  # as slow as some thousands on a GPU
    suppress_health_check=[HealthCheck.too_slow],
)

_convert_float = interpreter._convert_float


def _converted(values, given, wanted, mode):
    """Convert as a GPU does: the interpreter truncates numbers to bfloat16, and reads its subnormals wrongly."""
    if given == tl.bfloat16 and wanted == tl.float32:
        return (values.view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
    if given == tl.float32 and wanted == tl.bfloat16:
        with np.errstate(over="ignore"):
            return values.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return _convert_float(values, given, wanted, mode)


def _sum(self, values):
    """Sum pairwise, as a GPU does: NumPy does so along the last axis alone, and adds one by one along others."""
    data = np.moveaxis(values.handle.data, self.axis, -1)
    total = np.ascontiguousarray(data).sum(-1)
    return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, values.dtype)


_lock = threading.Lock()
_launch = interpreter.GridExecutor.__call__


def _alone(self, *args, **kwargs):
    """Launch one kernel at a time, since the interpreter is not thread-safe, and without warnings, as on a GPU."""
    with _lock, np.errstate(all="ignore"):
        return _launch(self, *args, **kwargs)


_patch = interpreter._patch_lang_tensor


def _with_indices(tensor, *scope):
    """Let scalar tensors serve as indices, which Triton 3.4 does not with NumPy 2.4."""
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())


_patch_language = interpreter._patch_lang


@functools.cache
def _patch_for_good(*modules):
    """Put the interpreter's functions into the language's modules for good: this process compiles nothing."""
    scope = _patch_language(SimpleNamespace(__globals__=dict(enumerate(modules))))
    getattr(scope, "_changes", []).clear()  # keeps the interpreter from restoring them
    return scope


def _patch_once(function):
    """Patch at the first call alone: Triton patches at every call of every function, which takes half of the time."""
    return _patch_for_good(*(value for value in function.__globals__.values() if value in (tl, tl.core)))


interpreter._patch_lang = _patch_once
interpreter._patch_lang_tensor = _with_indices
interpreter.GridExecutor.__call__ = _alone
interpreter._convert_float = _converted
interpreter.ReduceOps.sum = _sum
backend.common_device = lambda *values: 0 if common_device(*values) == CPU else None
backend._on_gpu = lambda index: gpu.TRITON
