"""The backends on a GPU, beside torch.nn, flax and the GPU's own copy; without a GPU all are "n/a".

``asv_bench/gpu.py`` measures the same on a machine that has no asv, and writes results as asv would.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mbn.commands.bench.measurement import LIMIT, Timed
from mbn.commands.bench.messages import Preparation, Prepared, Turn
from mbn.commands.bench.workloads import MODES as DEFAULT_MODES
from mbn.commands.bench.workloads import PASSES, PULLBACK, Workload
from mbn.commands.processes import NotRun, Process

SUBJECTS = ["cupy", "torch", "jax", "torch.nn", "flax.nnx", LIMIT]
MODES = [*DEFAULT_MODES, PULLBACK]
ROUNDS = 2
"""The number of measurements of each mode; their spread tells how reliable they are."""

_LARGE = 2**30


class Input(NamedTuple):
    """A workload, and whether it is captured as a CUDA graph."""

    workload: Workload
    captured: bool = False


INPUTS = {
    **{
        f"{shape} {dtype}": Input(Workload(shape, dtype))
        for shape in ((4096, 256, 1024), (1048576, 256))
        for dtype in ("float32", "bfloat16", "float16")
    },
    **{f"{shape} float32": Input(Workload(shape)) for shape in ((256, 128, 1024), (65536, 256), (1024, 256), (32, 64))},
    **{f"{shape} float32, CUDA graph": Input(Workload(shape), captured=True) for shape in ((1024, 256), (32, 64))},
}
"""Large inputs come first, so that the memory pool they fill serves the smaller ones."""

Outcomes = dict[tuple[str, str], Timed | NotRun]
"""Outcomes by subject and input."""


def modes(subject: str, given: Input) -> list[str]:
    """Return the measured modes: the copy is the same in all, and a pullback cannot be captured without its forward."""
    if subject == LIMIT:
        return ["eval"]
    return [mode for mode in MODES if not (given.captured and mode == PULLBACK)]


def measure(subjects: Iterable[str], inputs: dict[str, Input], device: str) -> Iterator[Outcomes]:
    """Measure one subject after another, each in a process that has the device to itself; yield all outcomes so far.

    A subject gets all inputs in one process, and a new process after an error, since CUDA does not recover.
    """
    found: Outcomes = {}
    for subject in subjects:
        process = Process("mbn.commands.bench.worker")
        for name, given in inputs.items():
            outcome = _outcome(process, f"{subject}:{device}", given, modes(subject, given))
            found[subject, name] = outcome
            if isinstance(outcome, NotRun) and outcome.broken:
                process.close()
                process = Process("mbn.commands.bench.worker")
        process.close()
        yield found


def _outcome(process: Process, spec: str, given: Input, wanted: list[str]) -> Timed | NotRun:
    prepared = process.ask(Preparation(spec, given.workload, tuple(wanted), given.captured))
    if not isinstance(prepared, Prepared):
        return prepared
    seconds: dict[str, list[float]] = {mode: [] for mode in wanted}
    for _ in range(ROUNDS):
        for mode in wanted:
            answer = process.ask(Turn(mode))
            if isinstance(answer, NotRun):
                return answer
            seconds[mode].append(answer)
    return Timed(prepared, seconds)


Values = dict[tuple[str, str, str], float]
"""Values by subject, mode and input."""


def medians(found: Outcomes) -> Values:
    """Return the median seconds of a call."""
    return {
        (subject, mode, name): timed.median(mode)
        for (subject, name), timed in found.items()
        if isinstance(timed, Timed)
        for mode in timed.seconds
    }


def peaks(found: Outcomes) -> Values:
    """Return the bytes beyond arrays, for the subjects that tell them."""
    return {
        (subject, mode, name): peak
        for (subject, name), timed in found.items()
        if isinstance(timed, Timed)
        for mode, peak in timed.prepared.memory.items()
        if peak is not None
    }


def bandwidth(seconds: Values) -> float | None:
    """Return the bytes per second that the device's largest copy reads and writes; None below 1 GiB."""
    copies = [(INPUTS[name].workload.nbytes, time) for (subject, _, name), time in seconds.items() if subject == LIMIT]
    nbytes, time = max(copies, default=(0, 0.0))
    return 2 * nbytes / time if nbytes >= _LARGE else None


def times_ideal(seconds: Values) -> Values:
    """Return the seconds of a call relative to the ideal: its necessary passes over memory at that bandwidth."""
    speed = bandwidth(seconds)
    return {
        (subject, mode, name): time * speed / (PASSES[mode] * INPUTS[name].workload.nbytes)
        for (subject, mode, name), time in seconds.items()
        if speed
    }


class Step:
    """A step on a GPU, in seconds and against the ideal time."""

    params = (SUBJECTS, MODES, list(INPUTS))
    param_names = ("subject", "mode", "x")
    timeout = 1800
    version = "1"

    def setup_cache(self) -> Outcomes:
        *_, found = measure(SUBJECTS, INPUTS, "cuda")
        return found

    def setup(self, found: Outcomes, subject: str, mode: str, name: str) -> None:
        self._key, self._found = (subject, mode, name), found
        if self._key not in medians(found):
            message = f"{subject} was not measured in mode {mode} on {name}"
            raise NotImplementedError(message)

    def track_seconds(self, *_: object) -> float:
        return medians(self._found)[self._key]

    def track_times_ideal(self, *_: object) -> float:
        return times_ideal(medians(self._found)).get(self._key, math.nan)

    def track_peak(self, *_: object) -> float:
        return peaks(self._found).get(self._key, math.nan)

    track_seconds.unit = "seconds"
    track_times_ideal.unit = "times the ideal"
    track_peak.unit = "bytes"


def results(found: Outcomes, known: dict[str, Values]) -> dict[str, Values]:
    """Return asv's results by benchmark: the known results, replaced by those that were measured now."""

    def merged(benchmark: str, values: Values) -> Values:
        before = known.get(benchmark, {})
        return {key: value for key, value in before.items() if (key[0], key[2]) not in found} | values

    seconds = merged("gpu.Step.track_seconds", medians(found))
    return {
        "gpu.Step.track_seconds": seconds,
        "gpu.Step.track_times_ideal": times_ideal(seconds),
        "gpu.Step.track_peak": merged("gpu.Step.track_peak", peaks(found)),
    }
