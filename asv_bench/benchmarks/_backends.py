"""The backends that are measured, where, and how to wait for what each of them computes.

A backend that does not work where the benchmarks run must cost nothing but a mark in the table: asv reads
NotImplementedError from ``setup`` as "n/a".
"""

from collections.abc import Callable
from typing import Any

import numpy as np

import mbn
from mbn.contract import Array, Backend

NAMES = ["numpy", "torch", "jax", "cupy"]
"""Not ``mbn.list_backends()``: that depends on what is installed, and parameters must not."""

_GPU = "cuda:0"


class Subject:
    """A backend under measurement, on a GPU where there is one. JAX prefers that by itself, and Torch does not.

    Raises:
        NotImplementedError: no such backend works here, or it takes no ``dtype``.
    """

    def __init__(self, name: str, dtype: str = "float32") -> None:
        try:
            self.backend = mbn.get_backend(name)
        except (mbn.BackendNotFoundError, mbn.BackendUnavailableError) as error:
            raise NotImplementedError(str(error)) from error
        if dtype not in self.backend.capabilities.dtypes:
            message = f"{name} takes no {dtype} here"
            raise NotImplementedError(message)
        self._device = _GPU if _GPU in self.backend.capabilities.devices else None
        self.wait = _waiter(self.backend)
        """Return when the arrays that are passed in have been computed."""

    def array(self, host: np.ndarray) -> Array:
        """Bring an input to the backend."""
        return self.backend.asarray(host, device=self._device)

    def layer(self, num_features: int, dtype: str = "float32") -> mbn.BatchNorm1d:
        """Make a layer on the backend."""
        return mbn.BatchNorm1d(num_features, dtype=dtype, device=self._device, backend=self.backend)


def _waiter(backend: Backend) -> Callable[[Any], object]:
    if backend.name == "jax":
        import jax  # noqa: PLC0415 - only setup imports a framework

        return jax.block_until_ready
    if backend.name == "torch" and _GPU in backend.capabilities.devices:
        import torch  # noqa: PLC0415

        return lambda _: torch.cuda.synchronize()
    if backend.name == "cupy":
        import cupy  # noqa: PLC0415

        return lambda _: cupy.cuda.get_current_stream().synchronize()
    return lambda _: None
