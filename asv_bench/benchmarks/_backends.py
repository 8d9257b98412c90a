"""The backends that are measured, on a GPU if they find one.

A backend that does not work on a machine must cost nothing but a mark in the table: asv reads NotImplementedError from
``setup`` as "n/a".
"""

import mbn
from mbn.commands.bench.subjects import Layer, subject
from mbn.commands.bench.workloads import Workload

NAMES = ["numpy", "numba", "torch", "jax", "cupy"]
"""Not ``mbn.list_backends()``: that depends on what is installed, and parameters must not."""

_GPU = "cuda:0"


def layer(name: str, workload: Workload) -> Layer:
    """Return a layer on a backend, with its input.

    Raises:
        NotImplementedError: The backend does not work here, or cannot do the workload.
    """
    try:
        devices = mbn.get_backend(name).capabilities.devices
    except (mbn.BackendNotFoundError, mbn.BackendUnavailableError) as error:
        raise NotImplementedError(str(error)) from error
    return subject(f"{name}:{_GPU}" if _GPU in devices else name, workload)
