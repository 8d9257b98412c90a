"""Numba's backend of NumPy arrays: the kernels of ``mbn_cpu`` that Numba compiles at first use, and caches on disk."""

from typing import ClassVar

import numba

from mbn_cpu.backend import HostBackend, suits_numba_steps
from mbn_cpu.kernels import numba_passes, numba_steps
from mbn_cpu.kernels.host import HostKernels, StepKernels


class NumbaBackend(HostBackend):
    """The backend that computes on NumPy arrays with loops that Numba compiles."""

    name: ClassVar[str] = "numba"
    version = numba.__version__
    kernels, step_kernels = HostKernels(numba_passes), StepKernels(numba_passes, numba_steps)
    suits_steps = staticmethod(suits_numba_steps)
