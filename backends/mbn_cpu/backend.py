"""The border of NumPy arrays, and the choice of their kernels: all that NumPy's and Numba's backends have in common.

Everything is on the host, so the border is a cast at most.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from mbn.contract import Backend, Batch, Capabilities, Kernels, Operation, numpy_dtype, overlaps_itself
from mbn_cpu.kernels.host import HostKernels, fits_float64


class HostBackend(Backend):
    """A backend of NumPy arrays."""

    kernels: HostKernels
    steps: ModuleType
    """The whole of a step at once, for those batches that it ``takes``."""
    step_kernels: HostKernels
    """Kernels with these steps."""

    capabilities = Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        devices=("cpu",),
        mutable=True,
        strided=True,
        masks=True,
        any_size=True,
        out=True,
    )

    def owns(self, x: object) -> bool:
        # A mask would be lost and a matrix would multiply in its own way, so neither passes for an array.
        return isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray | np.matrix)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> np.ndarray:
        if device not in (None, "cpu"):
            message = f"NumPy's only device is 'cpu', not {device!r}."
            raise ValueError(message)
        return np.asarray(x, None if dtype is None else numpy_dtype(dtype))

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def device(self, x: np.ndarray) -> None:
        """There is one device, so none to be on by mistake."""

    def copy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x)

    def conflict(self, out: np.ndarray, x: np.ndarray) -> str | None:
        if not out.flags.writeable:
            return "is read-only"
        if not out.flags.forc and overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself: some of its values share memory"
        # Writing to x itself is safe: each value is read before the one in its place is written.
        is_same = out.__array_interface__["data"] == x.__array_interface__["data"] and out.strides == x.strides
        return None if is_same or not np.shares_memory(out, x) else "overlaps x in memory without being x"

    def within(self, values: np.ndarray, low: float, high: float) -> bool:
        return bool(np.all((low <= values) & (values < high)))

    def kernels_for(
        self, operation: Operation, batch: Batch, other: np.ndarray | None = None, vectors: tuple[Any, ...] = ()
    ) -> tuple[Kernels, Batch]:
        # Whole steps, against the passes of the same backend, training and evaluation of (32, 64): NumPy's are 1.6 and
        # 4.0 times as fast, Numba's 4.8 and 4.2 times; of (1024, 256), which NumPy's do not take, 1.8 and 1.5 times.
        return (self.step_kernels if takes(self.steps, operation, batch, other, vectors) else self.kernels), batch

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return forward, partial(_rounded, pullback)


def takes(
    steps: ModuleType, operation: Operation, batch: Batch, other: np.ndarray | None, operands: tuple[Any, ...]
) -> bool:
    """Tell whether a module of whole steps is the one for a call."""
    if not steps.takes(batch.x, batch.sample_weight, other):
        return False
    if operation == "pullback":
        weight, stats = operands
        return fits_float64(batch.x, stats.mean, weight)
    return operation == "evaluate" or (operation == "train" and batch.dtype == "float32")


def _rounded(pullback: Callable[..., Any], kernels: Kernels, dy: Any, batch: Batch, weight: Any, *rest: Any) -> Any:
    """Return gradients, those of parameters in their dtype: beyond its range they are infinite."""
    dx, *sums = pullback(kernels, dy, batch, weight, *rest)
    if weight is not None and sums[0].dtype != weight.dtype:
        with np.errstate(over="ignore"):
            sums = [total.astype(weight.dtype) for total in sums]
    return dx, *sums
