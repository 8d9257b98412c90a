"""NumPy's backend: nothing but NumPy computes."""

from typing import ClassVar

import numpy as np

from mbn_cpu import blocked, small
from mbn_cpu.backend import HostBackend, HostKernels


class NumpyBackend(HostBackend):
    """The backend of NumPy arrays."""

    name: ClassVar[str] = "numpy"
    version = np.__version__
    kernels, fast, fused = HostKernels(blocked), small, HostKernels(blocked, small)
