"""The backends and their peers on the six shapes, as ``mbn bench`` measures them: in turn, each in its own process.

The measurement takes minutes, and is done once, before asv asks for single numbers.
"""

from mbn.commands.bench import measurement, peers
from mbn.commands.bench.measurement import Measurement, Timed
from mbn.commands.bench.workloads import MODES, SHAPES, Workload

from ._backends import NAMES

SUBJECTS = [*NAMES, *peers.PEERS]
_SHAPES = [str(shape) for shape in SHAPES]


class _SideBySide:
    param_names = ("subject", "mode", "shape")
    timeout = 1800

    def setup_cache(self) -> dict[str, Measurement]:
        return {str(shape): measurement.measure(Workload(shape), SUBJECTS, MODES, lambda _: None) for shape in SHAPES}

    def setup(self, measurements: dict[str, Measurement], subject: str, _: str, shape: str) -> None:
        self._timed = measurements[shape].subjects[subject]
        if not isinstance(self._timed, Timed):
            raise NotImplementedError(self._timed.why)


class Time(_SideBySide):
    """Median time of a step, forward or forward and backward."""

    params = (SUBJECTS, list(MODES), _SHAPES)
    unit = "seconds"

    def track_step(self, _: object, __: str, mode: str, ___: str) -> float:
        return self._timed.median(mode)


class Copies(_SideBySide):
    """The same as a multiple of the time of a copy of x in the same round.

    On another machine, or beside other work, both change; where this figure changes, the code has.
    """

    params = ([subject for subject in SUBJECTS if subject != measurement.LIMIT], list(MODES), _SHAPES)
    unit = "copies"

    def track_step(self, measurements: dict[str, Measurement], _: str, mode: str, shape: str) -> float:
        return self._timed.ratio(mode, measurements[shape].timed[measurement.LIMIT])


class Memory(_SideBySide):
    """The peak of a step's memory beyond inputs and outputs."""

    params = (SUBJECTS, list(MODES), ["(65536, 256)"])
    unit = "bytes"

    def track_peak(self, _: object, __: str, mode: str, ___: str) -> int | None:
        return self._timed.prepared.memory[mode]
