"""CuPy's verbs. CuPy computes on the current device, so each verb makes the one of its array current."""

from typing import Any, ClassVar

import cupy
import numpy as np

from mbn.contract import Backend, Capabilities, Moments, Residuals
from mbn.state import State
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
            masks=True,
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

    def copy(self, x: cupy.ndarray) -> cupy.ndarray:
        with x.device:
            return x.copy()

    def weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: cupy.ndarray | None,
        lengths: cupy.ndarray | None,
        sample_weight: cupy.ndarray | None,
    ) -> cupy.ndarray:
        with next(given.device for given in (mask, lengths, sample_weight) if given is not None):
            return kernels.weights(shape, dtype, mask, lengths, sample_weight)

    def within(self, values: cupy.ndarray, low: float, high: float) -> bool:
        with values.device:
            return bool(cupy.all((low <= values) & (values < high)))

    def moments(self, x: cupy.ndarray, weights: cupy.ndarray | None = None) -> Moments:
        with x.device:
            return kernels.moments(x, weights)

    def merge(self, first: Moments, second: Moments) -> Moments:
        with first.m2.device:
            return kernels.merge(first, second)

    def variance(self, moments: Moments, correction: int) -> cupy.ndarray:
        with moments.m2.device:
            return kernels.variance(moments, correction)

    def normalize(
        self,
        x: cupy.ndarray,
        mean: kernels.Mean,
        var: cupy.ndarray,
        weight: cupy.ndarray | None,
        bias: cupy.ndarray | None,
        eps: float,
        weights: cupy.ndarray | None = None,
    ) -> cupy.ndarray:
        with x.device:
            return kernels.normalize(x, mean, var, weight, bias, eps, weights)

    def lerp(self, start: cupy.ndarray, end: kernels.Mean, weight: float | cupy.ndarray) -> cupy.ndarray:
        with start.device:
            return kernels.lerp(start, end, weight)

    def step(
        self,
        momentum: float | None,
        num_batches_tracked: cupy.ndarray | None,
        count: int | cupy.ndarray,
        correction: int,
    ) -> float | cupy.ndarray:
        if momentum is None:
            with num_batches_tracked.device:
                momentum = 1 / num_batches_tracked
        if isinstance(count, int):
            return momentum
        with count.device:
            return momentum * (count > correction).astype(kernels.WIDE)

    def grad_sums(
        self,
        dy: cupy.ndarray,
        x: cupy.ndarray,
        mean: kernels.Mean,
        var: cupy.ndarray,
        eps: float,
        weights: cupy.ndarray | None = None,
    ) -> tuple[cupy.ndarray, cupy.ndarray]:
        with x.device:
            return kernels.grad_sums(dy, x, mean, var, eps, weights)

    def grad_input(
        self,
        dy: cupy.ndarray,
        x: cupy.ndarray,
        mean: kernels.Mean,
        var: cupy.ndarray,
        weight: cupy.ndarray | None,
        eps: float,
        sums: tuple[cupy.ndarray, cupy.ndarray] | None,
        count: int | cupy.ndarray | None,
        weights: cupy.ndarray | None = None,
    ) -> cupy.ndarray:
        with x.device:
            return kernels.grad_input(dy, x, mean, var, weight, eps, sums, count, weights)

    def batch_norm_residuals(
        self, x: cupy.ndarray, *args: Any, **options: Any
    ) -> tuple[cupy.ndarray, State, Residuals]:
        with x.device:  # for the arithmetic between the verbs
            return super().batch_norm_residuals(x, *args, **options)

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
