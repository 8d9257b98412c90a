"""Batch normalisation of array_api_strict arrays, and the template of a backend over the array API standard.

All arithmetic is that of ``mbn.array_api``. A backend made for speed has kernels of its own, which work on blocks that
fit the processor's caches: ``mbn.contract.Kernels``.
"""

from typing import Any, ClassVar

import array_api_strict

from mbn.array_api import ArrayAPIBackend
from mbn.contract import Array, Capabilities


class StrictBackend(ArrayAPIBackend):
    """The backend of array_api_strict arrays."""

    name: ClassVar[str] = "strict"
    namespace = array_api_strict

    # Decision: promise here what the framework can do on this machine, and no more; the suite tests all of it. If that
    # has to be found out, do so in __init__, and raise there if the framework cannot work at all (no GPU, say).
    @property
    def capabilities(self) -> Capabilities:
        return super().capabilities

    # The border: only what the standard leaves open.

    def device_name(self, device: array_api_strict.Device) -> str:
        return repr(device).split("'")[1]

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        return super().asarray(x, dtype, device)
