"""CuPy's verbs. CuPy computes on the current device, so each verb makes the one of its array current."""

from typing import Any, ClassVar

import cupy
import numpy as np

from mbn.contract import Backend, Capabilities, Moments
from mbn_cupy import kernels

_DTYPE_CHARACTERS = "?bhilqBHILQefdFD"
"""Those that all of CuPy supports. It can hold bfloat16, but hardly compute with it."""


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
            dtypes=frozenset({"float16", "float32", "float64"}),
            devices=tuple(f"cuda:{index}" for index in range(count)),
            mutable=True,
            strided=True,
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

    def device(self, x: cupy.ndarray) -> str:
        return f"cuda:{x.device.id}"

    def moments(self, x: cupy.ndarray) -> Moments:
        with x.device:
            return kernels.moments(x)

    def normalize(
        self,
        x: cupy.ndarray,
        mean: kernels.Mean,
        var: cupy.ndarray,
        weight: cupy.ndarray | None,
        bias: cupy.ndarray | None,
        eps: float,
    ) -> cupy.ndarray:
        with x.device:
            return kernels.normalize(x, mean, var, weight, bias, eps)

    def lerp(self, start: cupy.ndarray, end: kernels.Mean, weight: float | cupy.ndarray) -> cupy.ndarray:
        with start.device:
            return kernels.lerp(start, end, weight)

    def reciprocal(self, count: cupy.ndarray) -> cupy.ndarray:
        with count.device:
            return 1 / count

    def batch_norm(self, x: cupy.ndarray, *args: Any, **options: Any) -> tuple[cupy.ndarray, Any]:
        with x.device:  # for the arithmetic between the verbs
            return super().batch_norm(x, *args, **options)

    def _device(self, device: Any) -> cupy.cuda.Device:
        name = f"cuda:{int(device)}" if isinstance(device, int | cupy.cuda.Device) else device
        if name in (None, "cuda"):
            return cupy.cuda.Device()  # the current one, CuPy's default
        usable = self.capabilities.devices
        if name not in usable:
            message = f"CuPy's devices here are {', '.join(usable)}, not {device!r}."
            raise ValueError(message)
        return cupy.cuda.Device(usable.index(name))


def _dtype(dtype: Any) -> np.dtype:
    found = np.dtype(dtype)
    if found.char not in _DTYPE_CHARACTERS:
        message = f"CuPy has no dtype {found}."
        raise TypeError(message)
    return found.newbyteorder("=")
