"""Torch's verbs, and its border with NumPy: neither a warning nor a refusal where the data can be brought over."""

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from mbn.contract import Backend, Capabilities, Moments
from mbn_torch import kernels


class TorchBackend(Backend):
    """The backend of Torch tensors. Autograd sees through outputs; running statistics are detached."""

    name: ClassVar[str] = "torch"
    version = str(torch.__version__)

    @cached_property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
            # Counting does not start CUDA, which would keep a process that only uses the CPU from forking.
            devices=("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))),
            mutable=True,
            strided=True,
        )

    def owns(self, x: object) -> bool:
        return isinstance(x, torch.Tensor)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> torch.Tensor:
        if device is not None:
            device = _device(device, self.capabilities.devices)
        if not isinstance(x, torch.Tensor):
            # Unlike Tensor.to, as_tensor knows of torch.set_default_device.
            x = torch.as_tensor(_from_numpy(np.asarray(x)), device=device or torch.get_default_device())
        return x.to(device=device, dtype=_dtype(dtype))

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if x.dtype == torch.bfloat16:
            return x.detach().view(torch.int16).numpy(force=True).view(_numpy_bfloat16())
        return x.numpy(force=True)

    def device(self, x: torch.Tensor) -> torch.device:
        return x.device

    def moments(self, x: torch.Tensor) -> Moments:
        return kernels.moments(x)

    def normalize(
        self,
        x: torch.Tensor,
        mean: kernels.Mean,
        var: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        return kernels.normalize(x, mean, var, weight, bias, eps)

    def lerp(self, start: torch.Tensor, end: kernels.Mean, weight: float | torch.Tensor) -> torch.Tensor:
        return kernels.lerp(start, end, weight)

    def reciprocal(self, count: torch.Tensor) -> torch.Tensor:
        return count.to(kernels.WIDE).reciprocal()


def _from_numpy(x: np.ndarray) -> torch.Tensor:
    """Return a CPU tensor that shares memory with x where Torch can write and address that memory."""
    addressable = all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
    if not (addressable and x.flags.writeable and x.dtype.isnative):
        x = x.astype(x.dtype.newbyteorder("="))
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, name)
    if isinstance(dtype, str) or not isinstance(dtype, torch.dtype | None):
        message = f"Torch has no dtype {name!r}."
        raise TypeError(message)
    return dtype


def _device(device: Any, usable: tuple[str, ...]) -> torch.device:
    names = {"cpu:0", *usable, *(name.partition(":")[0] for name in usable)}
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if str(found) not in names:
        message = f"Torch's devices here are {', '.join(usable)}, not {device!r}."
        raise ValueError(message)
    return found


def _numpy_bfloat16() -> np.dtype:
    try:
        import ml_dtypes  # noqa: PLC0415 - the only dtype that NumPy itself does not have
    except ModuleNotFoundError as error:
        message = "NumPy has bfloat16 through ml_dtypes, which is not installed: pip install ml_dtypes."
        raise TypeError(message) from error
    return np.dtype(ml_dtypes.bfloat16)
