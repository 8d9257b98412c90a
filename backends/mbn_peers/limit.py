"""The limit: reading the input once and writing it once, into memory that is there already."""

import numpy as np

from mbn.bench.subjects import Call, Subject
from mbn.bench.workloads import Workload


class Copy(Subject):
    """A copy of x, in every mode."""

    version = np.__version__
    device = "cpu"

    def __init__(self, workload: Workload, device: str | None) -> None:
        if device:
            message = "the copy is one of NumPy's, on the CPU"
            raise NotImplementedError(message)
        self._x = workload.x()
        self._copy = np.zeros_like(self._x)

    def step(self, mode: str) -> Call:  # noqa: ARG002 - it is always the same
        x, copy = self._x, self._copy
        return lambda: np.copyto(copy, x)
