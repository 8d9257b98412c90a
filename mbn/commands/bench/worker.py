"""One subject of a benchmark in a process of its own: prepared once, and then timed in each of its turns.

Imports, compilation and the start of threads, which happen once, are over before anything is timed.
"""

import os
import time
from collections.abc import Mapping, Sequence

from mbn.commands.bench.calls import Call
from mbn.commands.bench.clocks import elapsed
from mbn.commands.bench.messages import Preparation, Prepared, Turn
from mbn.commands.bench.peers import ENVIRONMENT
from mbn.commands.bench.subjects import Subject, subject
from mbn.commands.processes import NotRun, broken, serve
from mbn.registry import BackendUnavailableError

_SETTLE = 0.02
"""Seconds after which the threads of a framework, which wait for more work for a while, sleep."""


class Worker:
    """Answers questions about one subject; its errors become answers too."""

    def __init__(self) -> None:
        self._subjects: Sequence[Subject] = ()
        """The subject, and its twins where calls take turns on several sets of arrays."""
        self._captured: Mapping[str, Sequence[Call]] = {}
        """By mode, the CUDA graphs that are timed in place of calls, if any."""

    def answer(self, question: Preparation | Turn) -> Prepared | float | NotRun:
        """Answer the question for preparation and, after it, those for turns."""
        try:
            if isinstance(question, Turn):
                return self._seconds(question.mode)
            return self._prepared(question)
        except Exception as error:  # noqa: BLE001 - a framework may raise anything; the user reads it
            return broken(error)

    def _prepared(self, question: Preparation) -> Prepared | NotRun:
        spec, workload, modes, captured = question
        self._subjects, self._captured = (), {}  # frees their memory before the next ones take theirs
        try:
            first = subject(spec, workload.smaller())
            measured = subject(spec, workload)
            if captured and not measured.clock.captures:
                return NotRun(f"{spec} captures no calls as CUDA graphs", broken=False)
        except ModuleNotFoundError as error:
            return NotRun(f"{error.name} is not installed: pip install {error.name}", broken=False)
        except (BackendUnavailableError, NotImplementedError, ValueError) as error:
            return NotRun(str(error), broken=False)
        if first.compiles_for_each_shape:
            first = measured
        first_call = {mode: elapsed(first.step(mode), 1) for mode in modes}
        del first
        clock = measured.clock
        peaks = {mode: clock.beyond_arrays(measured.step(mode)) for mode in modes}
        self._subjects = [measured, *(measured.twin() for _ in range(1, clock.sets(workload.nbytes)))]
        if captured:
            self._captured = {mode: [clock.captured(each.call(mode)) for each in self._subjects] for mode in modes}
        return Prepared(measured.version, measured.device, first_call, peaks)

    def _seconds(self, mode: str) -> float:
        if not self._subjects:
            raise RuntimeError(f"{mode} comes after a Preparation")
        clock = self._subjects[0].clock
        seconds = clock.seconds(
            self._captured.get(mode) or [each.step(mode) if clock.waits else each.call(mode) for each in self._subjects]
        )
        time.sleep(_SETTLE)
        return seconds


if __name__ == "__main__":
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    serve(Worker().answer)
