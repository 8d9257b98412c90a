"""CuPy's verbs. CuPy computes on the current device, so each verb makes the one of its array current."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, ClassVar

import cupy
import numpy as np

from mbn.contract import Backend, Capabilities, Moments, Residuals, overlaps_itself
from mbn.state import Params, State
from mbn_cupy import kernels, vectors

_DTYPE_CHARACTERS = "?bhilqBHILQefdFD"
"""Those that CuPy supports whatever its version."""
_KNOWS_BFLOAT16 = int(cupy.__version__.partition(".")[0]) >= 14 and find_spec("ml_dtypes") is not None  # noqa: PLR2004


class CupyBackend(Backend):
    """The backend of CuPy arrays. Making it asks CUDA for its devices, and fails in CUDA's words."""

    name: ClassVar[str] = "cupy"
    version = cupy.__version__

    def __init__(self) -> None:
        count = cupy.cuda.runtime.getDeviceCount()
        if count == 0:
            message = "CUDA finds no device."
            raise RuntimeError(message)
        self._capabilities = Capabilities(
            dtypes=frozenset({"float16", "float32", "float64"} | ({"bfloat16"} if _KNOWS_BFLOAT16 else set())),
            devices=tuple(f"cuda:{index}" for index in range(count)),
            mutable=True,
            strided=True,
            masks=True,
            any_size=True,
            out=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def owns(self, x: object) -> bool:
        return isinstance(x, cupy.ndarray)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> cupy.ndarray:
        is_own = isinstance(x, cupy.ndarray)
        if not is_own:
            x = np.asarray(x)
        with x.device if is_own and device is None else self._device(device):
            return cupy.asarray(x, _dtype(dtype or x.dtype))

    def to_numpy(self, x: cupy.ndarray) -> np.ndarray:
        return cupy.asnumpy(x)

    def from_dlpack(self, x: Any) -> cupy.ndarray:
        return cupy.from_dlpack(x)

    @contextmanager
    def exported(self, x: cupy.ndarray) -> Iterator[cupy.ndarray]:
        with x.device:  # whose current stream is the one to wait for
            yield x

    def device(self, x: cupy.ndarray) -> str:
        return f"cuda:{x.device.id}"

    def copy(self, x: cupy.ndarray) -> cupy.ndarray:
        with x.device:
            return x.copy()

    def conflict(self, out: cupy.ndarray, x: cupy.ndarray) -> str | None:
        if overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself: some of its values share memory"
        # Writing to x itself is safe: each value is read before the one in its place is written.
        is_same = out.data.ptr == x.data.ptr and out.strides == x.strides
        is_apart = is_same or not cupy.may_share_memory(out, x) or not cupy.shares_memory(out, x)
        return None if is_apart else "overlaps x in memory without being x"

    def weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: cupy.ndarray | None,
        lengths: cupy.ndarray | None,
        sample_weight: cupy.ndarray | None,
    ) -> cupy.ndarray:
        with next(given.device for given in (mask, lengths, sample_weight) if given is not None):
            return vectors.weights(shape, dtype, mask, lengths, sample_weight)

    def within(self, values: cupy.ndarray, low: float, high: float) -> bool:
        with values.device:
            return bool(cupy.all((low <= values) & (values < high)))

    def moments(self, x: cupy.ndarray, weights: cupy.ndarray | None = None) -> Moments:
        with x.device:
            return kernels.moments(x, weights)

    def merge(self, first: Moments, second: Moments) -> Moments:
        with _device_of(first.m2):
            return vectors.merge(first, second)

    def variance(self, moments: Moments, correction: int) -> vectors.Variance:
        with _device_of(moments.m2):
            return vectors.variance(moments, correction)

    def normalize(
        self,
        x: cupy.ndarray,
        mean: vectors.Mean,
        var: vectors.Variance,
        weight: cupy.ndarray | None,
        bias: cupy.ndarray | None,
        eps: float,
        weights: cupy.ndarray | None = None,
        out: cupy.ndarray | None = None,
    ) -> cupy.ndarray:
        with x.device:
            return kernels.normalize(x, mean, var, weight, bias, eps, weights, out)

    def lerp(
        self, start: cupy.ndarray, end: vectors.Mean | vectors.Variance, weight: float | cupy.ndarray
    ) -> cupy.ndarray:
        with start.device:
            return vectors.lerp(start, end, weight)

    def step(
        self,
        momentum: float | None,
        num_batches_tracked: cupy.ndarray | None,
        count: int | cupy.ndarray,
        correction: int,
    ) -> float | cupy.ndarray:
        given = [array for array in (num_batches_tracked, count) if isinstance(array, cupy.ndarray)]
        with given[0].device if given else nullcontext():
            return vectors.step(momentum, num_batches_tracked, count, correction)

    def grad_sums(
        self,
        dy: cupy.ndarray,
        x: cupy.ndarray,
        mean: vectors.Mean,
        var: vectors.Variance,
        eps: float,
        weights: cupy.ndarray | None = None,
    ) -> tuple[cupy.ndarray, cupy.ndarray]:
        with x.device:
            return kernels.grad_sums(dy, x, mean, var, eps, weights)

    def grad_input(
        self,
        dy: cupy.ndarray,
        x: cupy.ndarray,
        mean: vectors.Mean,
        var: vectors.Variance,
        weight: cupy.ndarray | None,
        eps: float,
        sums: tuple[cupy.ndarray, cupy.ndarray] | None,
        count: int | cupy.ndarray | None,
        weights: cupy.ndarray | None = None,
    ) -> cupy.ndarray:
        with x.device:
            return kernels.grad_input(dy, x, mean, var, weight, eps, sums, count, weights)

    def batch_norm_residuals(
        self,
        x: cupy.ndarray,
        params: Params,
        state: State,
        *,
        training: bool,
        momentum: float | None,
        eps: float,
        correction: int,
        weights: cupy.ndarray | None = None,
        out: cupy.ndarray | None = None,
    ) -> tuple[cupy.ndarray, State, Residuals]:
        with x.device:
            if training:
                return kernels.train(x, params, state, momentum, eps, correction, weights, out)
            running_mean, running_var, _ = state
            y = kernels.normalize(x, running_mean, running_var, *params, eps, weights, out)
            return y, state, Residuals(running_mean, running_var, None)

    def _device(self, device: Any) -> cupy.cuda.Device:
        name = f"cuda:{int(device)}" if isinstance(device, int | cupy.cuda.Device) else device
        if name in (None, "cuda"):
            return cupy.cuda.Device()  # the current one, CuPy's default
        usable = self.capabilities.devices
        if name not in usable:
            message = f"CuPy's devices here are {', '.join(usable)}, not {device!r}."
            raise ValueError(message)
        return cupy.cuda.Device(usable.index(name))


def _device_of(m2: vectors.Variance) -> cupy.cuda.Device:
    return (m2.values if isinstance(m2, vectors.Scaled) else m2).device


def _dtype(dtype: Any) -> np.dtype:
    if dtype == "bfloat16" and _KNOWS_BFLOAT16:
        import ml_dtypes  # noqa: PLC0415 - the only dtype that NumPy itself does not have

        return np.dtype(ml_dtypes.bfloat16)
    found = np.dtype(dtype)
    if found.char not in _DTYPE_CHARACTERS and not (found.name == "bfloat16" and _KNOWS_BFLOAT16):
        message = f"CuPy has no dtype {found}."
        raise TypeError(message)
    return found.newbyteorder("=")
