"""Batch normalisation of array_api_strict arrays, and the template of a backend over the array API standard.

All arithmetic is that of ``mbn.array_api``. A backend made for speed has kernels of its own, which work on blocks that
fit the processor's caches: ``mbn.contract.Kernels``, as the attribute ``kernels``.
"""

from typing import ClassVar

import array_api_strict

from mbn.array_api import ArrayAPIBackend


class StrictBackend(ArrayAPIBackend):
    """The backend of array_api_strict arrays."""

    name: ClassVar[str] = "strict"
    namespace = array_api_strict

    # Decision: ``capabilities`` promises what the namespace says of itself, on this machine. Promise less where that is
    # too much, and raise in ``__init__`` if the framework cannot work at all (no GPU, say); the suite tests all of it.

    def device_name(self, device: array_api_strict.Device) -> str:
        """Return a short name; the standard leaves open what ``str`` gives."""
        return repr(device).split("'")[1]
