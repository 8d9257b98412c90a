"""NumPy's backend: the kernels of ``mbn_cpu`` that use NumPy alone."""

from typing import ClassVar

import numpy as np

from mbn_cpu.backend import HostBackend, suits_numpy_steps
from mbn_cpu.kernels import numpy_passes, numpy_steps
from mbn_cpu.kernels.host import HostKernels, StepKernels


class NumpyBackend(HostBackend):
    """The backend of NumPy arrays."""

    name: ClassVar[str] = "numpy"
    version = np.__version__
    kernels, step_kernels = HostKernels(numpy_passes), StepKernels(numpy_passes, numpy_steps)
    suits_steps = staticmethod(suits_numpy_steps)
