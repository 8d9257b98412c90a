"""The border of NumPy arrays, and the choice of their kernels, for the backends numpy and numba.

All arrays are on the host, so the border is at most a cast.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from mbn.contract import Backend, Batch, Capabilities, Group, Kernels, Operation, numpy_dtype, overlaps_itself
from mbn_cpu.group import mpi_group
from mbn_cpu.kernels.host import HostKernels, fits_float64
from mbn_cpu.thread_pool import CHUNK

_FEW_FOR_NUMPY = 1 << 14
_FEW_FOR_NUMBA = 1 << 19
"""The largest numbers of values of x for which fused steps are faster."""


class HostBackend(Backend):
    """A backend of NumPy arrays."""

    kernels: HostKernels
    step_kernels: HostKernels
    """Kernels with fused steps."""
    suits_steps: Callable[[np.ndarray, np.ndarray | None, np.ndarray | None, int | None], bool]
    """Tell whether fused steps suit x, its sample weights, another array in its shape and the size of the whole array
    or None: a function below."""

    capabilities = Capabilities(
        dtypes=frozenset({"float16", "float32", "float64"} | ({"bfloat16"} if find_spec("ml_dtypes") else set())),
        devices=("cpu",),
        mutable=True,
        strided=True,
        masks=True,
        any_size=True,
        replicas=True,
        out=True,
    )

    def owns(self, x: object) -> bool:
        # A MaskedArray would lose its mask, and a matrix has another product, so neither is taken.
        return isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray | np.matrix)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> np.ndarray:
        if device not in (None, "cpu"):
            raise ValueError(f"NumPy's only device is 'cpu', not {device!r}.")
        return np.asarray(x, None if dtype is None else numpy_dtype(dtype))

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def device(self, x: np.ndarray) -> None:
        """Return None: there is one device alone."""

    def copy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x)

    def conflict(self, out: np.ndarray, x: np.ndarray) -> str | None:
        if not out.flags.writeable:
            return "is read-only"
        if not out.flags.forc and overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself: some of its values share memory"
        # Writing to x itself is safe: each value is read before its output is written.
        is_same = out.__array_interface__["data"] == x.__array_interface__["data"] and out.strides == x.strides
        return None if is_same or not np.shares_memory(out, x) else "overlaps x in memory without being x"

    def within(self, values: np.ndarray, low: float, high: float) -> bool:
        return bool(np.all((low <= values) & (values < high)))

    def concatenated(self, parts: Sequence[Any]) -> np.ndarray:
        return np.concatenate(parts, dtype=np.float64)

    def group(self, given: Any) -> Group:
        return given if isinstance(given, Group) else mpi_group(self.name, given)

    def kernels_for(
        self,
        operation: Operation,
        batch: Batch,
        other: np.ndarray | None = None,
        vectors: tuple[Any, ...] = (),
        size: int | None = None,
    ) -> tuple[Kernels, Batch]:
        """Return the kernels for a call, and its batch as it is.

        NumPy's two kernels differ in bits, so the size of the whole array decides between them; Numba's do not.

        | kernels | gains of training and evaluation over the passes of the same backend |
        |---|---|
        | NumPy's fused steps | (32, 64): 1.6 and 4.0 times as fast |
        | Numba's fused steps | (32, 64): 4.8 and 4.2 times as fast; (1024, 256): 1.8 and 1.5 times |
        | passes | all other batches |
        """
        fits = self.suits_steps(batch.x, batch.sample_weight, other, size)
        if operation == "train":
            fits = fits and batch.dtype == "float32"
        elif operation == "pullback":
            weight, stats = vectors
            fits = fits and fits_float64(batch.x, stats.mean, weight)
        return (self.step_kernels if fits and operation != "moments" else self.kernels), batch

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return forward, partial(_rounded, pullback)


def suits_numpy_steps(
    x: np.ndarray, weights: np.ndarray | None, other: np.ndarray | None, size: int | None = None
) -> bool:
    """Tell whether NumPy's fused steps are faster, since a call of NumPy takes longer than its arithmetic."""
    return weights is None and (size or x.size) <= _FEW_FOR_NUMPY and x.dtype.char != "d"


def suits_numba_steps(
    x: np.ndarray, weights: np.ndarray | None, other: np.ndarray | None, size: int | None = None
) -> bool:
    """Tell whether Numba's fused steps support the arrays, and are faster on one thread than passes on several."""
    if x.size > few_for_numba(weights) or x.dtype != np.float32:
        return False
    if weights is not None and not (weights.dtype == np.float32 and weights.flags.c_contiguous):
        return False
    is_one_piece = x.flags.c_contiguous or (x.ndim == 3 and x.swapaxes(1, 2).flags.c_contiguous)
    return (
        is_one_piece and x.flags.aligned and (other is None or (other.strides == x.strides and other.dtype == x.dtype))
    )


def few_for_numba(weights: Any) -> int:
    """Return the most values of x for Numba's fused steps, with sample weights or None.

    With sample weights it is one chunk, so that the sums have the bits of the passes.
    """
    return _FEW_FOR_NUMBA if weights is None else CHUNK


def _rounded(pullback: Callable[..., Any], kernels: Kernels, dy: Any, batch: Batch, weight: Any, *rest: Any) -> Any:
    """Return gradients, those of parameters in the parameters' dtype: beyond its range they are infinite."""
    dx, *sums = pullback(kernels, dy, batch, weight, *rest)
    if weight is not None and sums[0].dtype != weight.dtype:
        with np.errstate(over="ignore"):
            sums = [total.astype(weight.dtype) for total in sums]
    return dx, *sums
