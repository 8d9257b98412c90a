"""Numba's backend of NumPy arrays: loops that are compiled when they are first needed, and cached on disk."""

from typing import ClassVar

import numba

from mbn_cpu import compiled, fused
from mbn_cpu.backend import HostBackend, HostKernels


class NumbaBackend(HostBackend):
    """The backend that computes on NumPy arrays with what Numba compiles."""

    name: ClassVar[str] = "numba"
    version = numba.__version__
    kernels, fast, fused = HostKernels(compiled), fused, HostKernels(compiled, fused)
