"""One subject of a benchmark, run as a process of its own: made ready once, then timed whenever it is its turn.

Whatever happens only once is over before anything is timed: imports, compilation, the start of threads.
"""

import statistics
import time

from mbn.bench import memory
from mbn.bench.messages import Preparation, Prepared, Turn
from mbn.bench.subjects import Call, Subject, subject
from mbn.isolation import NotRun, broken, serve
from mbn.registry import BackendUnavailableError

_SECONDS = 0.1
"""How long a turn takes at least."""
_SAMPLE = 50e-6
"""Seconds of a sample at least: shorter calls are timed several at a time, so that the clock's own time is small."""
_SAMPLES = 3
"""In a turn at least."""
_SETTLE = 0.02
"""Seconds until the threads of a framework, which wait for more work for a while, are asleep."""


class Worker:
    """Answers questions about one subject; nothing it raises gets out."""

    def __init__(self) -> None:
        self._subject: Subject | None = None

    def answer(self, question: Preparation | Turn) -> Prepared | float | NotRun:
        """Answer one question: first that for preparation, then turns."""
        try:
            return self._prepared(question) if isinstance(question, Preparation) else self._seconds(question.mode)
        except Exception as error:  # noqa: BLE001 - whatever a framework raises, the user is told
            return broken(error)

    def _prepared(self, question: Preparation) -> Prepared | NotRun:
        spec, workload, modes = question
        try:
            first = subject(spec, workload.smaller())
            self._subject = subject(spec, workload)
        except ModuleNotFoundError as error:
            return NotRun(f"{error.name} is not installed: pip install {error.name}", broken=False)
        except (BackendUnavailableError, NotImplementedError, ValueError) as error:
            return NotRun(str(error), broken=False)
        if first.compiles_for_each_shape:
            first = self._subject
        first_call = {mode: _timed(first.step(mode), 1) for mode in modes}
        del first
        peaks = {mode: memory.beyond_arrays(self._subject.step(mode)) for mode in modes}
        return Prepared(self._subject.version, self._subject.device, first_call, peaks)

    def _seconds(self, mode: str) -> float:
        if self._subject is None:
            message = f"{mode} comes after a Preparation"
            raise RuntimeError(message)
        seconds = median_seconds(self._subject.step(mode))
        time.sleep(_SETTLE)
        return seconds


def median_seconds(call: Call) -> float:
    """Return the time of a call, the end of its outputs included, as the median over about a tenth of a second."""
    once = _timed(call, 1)  # caches and threads wake up
    number = max(1, round(_SAMPLE / max(once, 1e-9)))
    samples: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(samples) < _SAMPLES or time.perf_counter() < end:
        samples.append(_timed(call, number))
    return statistics.median(samples)


def _timed(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


if __name__ == "__main__":
    serve(Worker().answer)
