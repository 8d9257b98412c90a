"""The fastest arithmetic on host memory that is installed, for backends whose own framework is slower there."""

import logging
from functools import cache
from types import ModuleType

import numpy as np

from mbn_cpu.backend import HostBackend
from mbn_cpu.kernels import numpy_passes, numpy_steps
from mbn_cpu.kernels.host import HostKernels


class Host(HostBackend):
    """The backend of NumPy arrays that another backend's arrays share their memory with; it has no name to ask for."""

    name = "host"
    version = np.__version__

    def __init__(self, passes: ModuleType, steps: ModuleType) -> None:
        """Make it of a module of passes and one of whole steps."""
        self.kernels, self.steps, self.step_kernels = HostKernels(passes), steps, HostKernels(passes, steps)


@cache
def fastest() -> Host:
    """Return the backend, compiled by Numba where that can be imported, which is first done here: it takes long."""
    try:
        from mbn_cpu.kernels import numba_passes, numba_steps  # noqa: PLC0415 - as said
    except ModuleNotFoundError:
        return Host(numpy_passes, numpy_steps)
    except Exception as error:  # noqa: BLE001 - whatever is broken there, nobody has asked for it
        message = "Numba does not work here, which makes mbn slower: %s: %s"
        logging.getLogger("mbn.numba").warning(message, type(error).__name__, error)
        return Host(numpy_passes, numpy_steps)
    return Host(numba_passes, numba_steps)
