"""CuPy's border. CuPy computes on the current device, so each step makes the device of its arrays current."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

import cupy
import numpy as np

from mbn.contract import Backend, Batch, Capabilities, Group, Kernels, numpy_dtype, overlaps_itself
from mbn_cupy.group import cuda_group
from mbn_cupy.kernels import CudaKernels

_DTYPE_CHARACTERS = "?bhilqBHILQefdFD"
"""The dtypes that every version of CuPy supports."""
_KNOWS_BFLOAT16 = int(cupy.__version__.partition(".")[0]) >= 14 and find_spec("ml_dtypes") is not None


class CupyBackend(Backend):
    """The backend of CuPy arrays. The constructor asks CUDA for its devices, and raises CUDA's error if that fails."""

    name: ClassVar[str] = "cupy"
    version = cupy.__version__
    kernels = CudaKernels()

    def __init__(self) -> None:
        count = cupy.cuda.runtime.getDeviceCount()
        if count == 0:
            raise RuntimeError("CUDA finds no device.")
        self._capabilities = Capabilities(
            dtypes=frozenset({"float16", "float32", "float64"} | ({"bfloat16"} if _KNOWS_BFLOAT16 else set())),
            devices=tuple(f"cuda:{index}" for index in range(count)),
            mutable=True,
            strided=True,
            masks=True,
            any_size=True,
            replicas=True,
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
        with x.device:  # the consumer waits for the current stream of this device
            yield x

    def device(self, x: cupy.ndarray) -> str:
        return f"cuda:{x.device.id}"

    def copy(self, x: cupy.ndarray) -> cupy.ndarray:
        with x.device:
            return x.copy()

    def concatenated(self, parts: Sequence[Any]) -> cupy.ndarray:
        with next(part.device for part in parts if isinstance(part, cupy.ndarray)):
            return cupy.concatenate([cupy.asarray(part, np.float64).ravel() for part in parts])

    def group(self, given: Any) -> Group:
        return given if isinstance(given, Group) else cuda_group(given)

    def conflict(self, out: cupy.ndarray, x: cupy.ndarray) -> str | None:
        if overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself: some of its values share memory"
        # Writing to x itself is safe: each value is read before its output is written.
        is_same = out.data.ptr == x.data.ptr and out.strides == x.strides
        is_apart = is_same or not cupy.may_share_memory(out, x) or not cupy.shares_memory(out, x)
        return None if is_apart else "overlaps x in memory without being x"

    def within(self, values: cupy.ndarray, low: float, high: float) -> bool:
        with values.device:
            return bool(cupy.all((low <= values) & (values < high)))

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def step(kernels: Kernels, batch: Batch, *arguments: Any) -> Any:
            with batch.x.device:
                return forward(kernels, batch, *arguments)

        def differentiate(kernels: Kernels, dy: cupy.ndarray, batch: Batch, *arguments: Any) -> Any:
            with batch.x.device:
                return pullback(kernels, dy, batch, *arguments)

        return step, differentiate

    def _device(self, device: Any) -> cupy.cuda.Device:
        name = f"cuda:{int(device)}" if isinstance(device, int | cupy.cuda.Device) else device
        if name in (None, "cuda"):
            return cupy.cuda.Device()  # the current one, CuPy's default
        usable = self.capabilities.devices
        if name not in usable:
            raise ValueError(f"CuPy's devices here are {', '.join(usable)}, not {device!r}.")
        return cupy.cuda.Device(usable.index(name))


def _dtype(dtype: Any) -> np.dtype:
    found = numpy_dtype(dtype) if dtype == "bfloat16" and _KNOWS_BFLOAT16 else np.dtype(dtype)
    if found.char not in _DTYPE_CHARACTERS and not (found.name == "bfloat16" and _KNOWS_BFLOAT16):
        raise TypeError(f"CuPy has no dtype {found}.")
    return found.newbyteorder("=")
