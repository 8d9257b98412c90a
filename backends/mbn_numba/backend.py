"""Numba's backend of NumPy arrays: loops that are compiled when they are first needed, and cached on disk."""

from typing import ClassVar

import numba

from mbn_cpu.backend import HostBackend
from mbn_cpu.kernels import numba_passes, numba_steps
from mbn_cpu.kernels.host import HostKernels


class NumbaBackend(HostBackend):
    """The backend that computes on NumPy arrays with what Numba compiles."""

    name: ClassVar[str] = "numba"
    version = numba.__version__
    kernels, steps, step_kernels = HostKernels(numba_passes), numba_steps, HostKernels(numba_passes, numba_steps)
