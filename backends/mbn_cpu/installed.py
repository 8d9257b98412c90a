"""The fastest arithmetic on host memory that is installed, for backends whose own framework is slower there."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np

from mbn.contract import numpy_dtype
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
    halves: ClassVar[dict[str, np.dtype]] = {}
    """The dtypes of 16 bits that the passes convert faster than copies of whole arrays."""


@cache
def fastest() -> WithNumpy:
    """Return the backend, with Numba's kernels if Numba can be imported. The first call takes long for that import."""
    try:
        from mbn_cpu.kernels import numba_halves, numba_passes, numba_steps
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
        halves = _convertible(numba_halves.of)

    return WithNumba()


def _convertible(conversions_of: Callable[[np.dtype], Any]) -> dict[str, np.dtype]:
    """Return the halves that NumPy knows and for which there are conversions; bfloat16 needs ml_dtypes."""
    dtypes = {name: numpy_dtype(name) for name in {"float16", "bfloat16"} & HostBackend.capabilities.dtypes}
    return {name: dtype for name, dtype in dtypes.items() if conversions_of(dtype) is not None}
