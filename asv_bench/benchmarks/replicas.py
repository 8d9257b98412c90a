"""Steps in two processes that share their statistics, the same steps alone, and a bare gather of the same size.

All three are measured in turn, once, before asv asks for single numbers.
"""

from mbn.commands.bench import replicas
from mbn.commands.bench.replica import ALONE, GATHER, SHARED
from mbn.commands.bench.replicas import MODES, Measurement, Shared
from mbn.commands.bench.workloads import Workload

NAMES = ["numpy", "numba", "torch"]
"""The backends whose replicas are processes on one machine."""
SHAPES = ((32, 64), (1024, 256))
MORE = "more"
"""The time that the shared step takes longer than the one alone."""
SIZE = 2


class Replicas:
    """Median time of a step, forward or forward and backward, or of a gather beside it."""

    params = (NAMES, list(MODES), [SHARED, ALONE, MORE, GATHER], [str(shape) for shape in SHAPES])
    param_names = ("backend", "mode", "what", "shape")
    timeout = 1800
    unit = "seconds"

    def setup_cache(self) -> dict[str, Measurement]:
        return {str(shape): replicas.measure(Workload(shape), SIZE, NAMES, MODES, lambda _: None) for shape in SHAPES}

    def setup(self, measurements: dict[str, Measurement], name: str, _: str, __: str, shape: str) -> None:
        self._found = measurements[shape].subjects[name]
        if not isinstance(self._found, Shared):
            raise NotImplementedError(self._found.why)

    def track_step(self, _: object, __: str, mode: str, what: str, ___: str) -> float:
        return self._found.more(mode) if what == MORE else self._found.median(mode, what)
