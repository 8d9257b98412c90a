"""The fastest arithmetic on host memory that is installed, for backends whose own framework is slower there."""

import logging
from functools import cache

import numpy as np

from mbn_cpu.backend import HostBackend, suits_numba_steps, suits_numpy_steps
from mbn_cpu.kernels import numpy_passes, numpy_steps
from mbn_cpu.kernels.host import HostKernels, StepKernels


class WithNumpy(HostBackend):
    """The backend of NumPy arrays in the memory of another backend's arrays; it is not registered."""

    name = "host"
    version = np.__version__
    kernels, step_kernels = HostKernels(numpy_passes), StepKernels(numpy_passes, numpy_steps)
    suits_steps = staticmethod(suits_numpy_steps)
    takes_addresses = False
    """Whether the fused steps take arrays by their addresses."""


@cache
def fastest() -> WithNumpy:
    """Return the backend, with Numba's kernels if Numba can be imported. The first call takes long for that import."""
    try:
        from mbn_cpu.kernels import numba_passes, numba_steps
    except ModuleNotFoundError:
        return WithNumpy()
    except Exception as error:  # noqa: BLE001 - the user has not requested Numba, so its errors are only logged
        message = "Numba does not work here, which makes mbn slower: %s: %s"
        logging.getLogger("mbn.numba").warning(message, type(error).__name__, error)
        return WithNumpy()

    class WithNumba(WithNumpy):
        kernels, step_kernels = HostKernels(numba_passes), StepKernels(numba_passes, numba_steps)
        suits_steps = staticmethod(suits_numba_steps)
        takes_addresses = True

    return WithNumba()
