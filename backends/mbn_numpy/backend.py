"""NumPy's backend: nothing but NumPy computes."""

from typing import ClassVar

import numpy as np

from mbn_cpu.backend import HostBackend
from mbn_cpu.kernels import numpy_passes, numpy_steps
from mbn_cpu.kernels.host import HostKernels


class NumpyBackend(HostBackend):
    """The backend of NumPy arrays."""

    name: ClassVar[str] = "numpy"
    version = np.__version__
    kernels, steps, step_kernels = HostKernels(numpy_passes), numpy_steps, HostKernels(numpy_passes, numpy_steps)
