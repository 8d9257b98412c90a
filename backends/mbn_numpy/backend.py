"""NumPy's backend: nothing but NumPy computes."""

from typing import ClassVar

import numpy as np

from mbn_cpu.backend import HostBackend, HostKernels
from mbn_cpu.kernels import numpy_passes, numpy_steps


class NumpyBackend(HostBackend):
    """The backend of NumPy arrays."""

    name: ClassVar[str] = "numpy"
    version = np.__version__
    kernels, fast, fused = HostKernels(numpy_passes), numpy_steps, HostKernels(numpy_passes, numpy_steps)
