"""The cost of shared statistics: each backend's step in several processes that share them, and in each alone.

The ranks of a backend have a turn with the shared step, the one alone and a bare gather in each round, so that a
machine that gets slower slows down all three alike.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mbn.commands import availability, records
from mbn.commands.bench import report
from mbn.commands.bench.engines import ENGINES
from mbn.commands.bench.replica import ALONE, GATHER, SHARED
from mbn.commands.bench.workloads import Workload
from mbn.commands.output import milliseconds, not_run, print_filled, table
from mbn.commands.processes import NotRun

MODES = ("train", "backward")
"""The modes in which replicas exchange anything."""
ROUNDS = 21
LOCAL = {"UCX_TLS": "self,shm"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
"""The environment in which MPICH and gloo talk to this machine alone."""
_PATIENCE = 600
"""Seconds that the ranks of a backend may take."""
_EXPLANATION = """\
Medians over rounds in which the shared step, the one alone and a bare gather had a turn. "us more": the shared step \
less the one alone; "us gather": the engine's own gather of a vector as long as that of the forward pass.
"""


class Shared(NamedTuple):
    """A backend that ran."""

    version: str
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    """By mode, and ``SHARED`` or ``ALONE``: the time of a call in each round."""
    gather: Sequence[float]
    """The time of a bare gather in each round."""

    def median(self, mode: str, kind: str) -> float:
        """Return the time of a step, or with ``GATHER`` of a bare gather, in seconds."""
        return statistics.median(self.gather if kind == GATHER else self.seconds[mode][kind])

    def more(self, mode: str) -> float:
        """Return the time that the shared step takes longer than the one alone."""
        kinds = self.seconds[mode]
        return statistics.median(a - b for a, b in zip(kinds[SHARED], kinds[ALONE], strict=True))


class Measurement(NamedTuple):
    """A workload in several processes, on each backend."""

    workload: Workload
    size: int
    modes: tuple[str, ...]
    subjects: Mapping[str, Shared | NotRun]

    @property
    def shared(self) -> dict[str, Shared]:
        """The backends that ran."""
        return {name: found for name, found in self.subjects.items() if isinstance(found, Shared)}


def measure(
    workload: Workload,
    size: int,
    backends: Sequence[str],
    modes: tuple[str, ...],
    advance: Callable[[str], object],
    rounds: int | None = None,
) -> Measurement:
    """Measure backends in ``size`` processes, each with a batch of the workload.

    Args:
        workload: the input of each process.
        size: the number of processes.
        backends: their names.
        modes: some of ``MODES``.
        advance: called with a backend before its turn.
        rounds: the number of rounds.
    """
    found = {}
    for name in backends:
        advance(name)
        found[name] = _measured(name, workload, size, modes, ROUNDS if rounds is None else rounds)
    return Measurement(workload, size, modes, found)


def _measured(name: str, workload: Workload, size: int, modes: tuple[str, ...], rounds: int) -> Shared | NotRun:
    engine, refused = ENGINES.get(name), availability.refusal(name)
    if refused is not None:
        return refused
    if engine is None:
        return NotRun("its replicas are no processes that this command starts", broken=False)
    start = launcher(size) if engine.has_launcher else []
    if start is None or (start and find_spec("mpi4py") is None):
        return NotRun("MPI needs mpi4py and mpiexec: pip install 'mbn-batchnorm[mpi]' mpich", broken=False)
    with TemporaryDirectory() as folder:
        asked = {
            "backend": name,
            "workload": workload._asdict(),
            "modes": modes,
            "rounds": rounds,
            "size": size,
            "file": str(Path(folder) / "store"),
        }
        commands = [
            [*start, sys.executable, "-m", "mbn.commands.bench.replica", json.dumps(asked | {"rank": rank})]
            for rank in range(1 if start else size)
        ]
        answer = _answer(commands, size)
    return answer if isinstance(answer, NotRun) else Shared(answer["version"], answer["seconds"], answer[GATHER])


def launcher(size: int) -> list[str] | None:
    """Return the command that starts ranks of MPI on this machine; None where there is none.

    MPICH's ``mpiexec.gforker`` listens to no network. Wheels have their commands beside Python.
    """
    for folder in (str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)):
        for name in ("mpiexec.gforker", "mpiexec"):
            if found := shutil.which(name, path=folder):
                return [found, "-n", str(size)]
    return None


def _answer(commands: Sequence[Sequence[str]], size: int) -> Any:
    """Return what rank 0 prints, or NotRun with the last words of the first rank that failed."""
    threads = str(max(1, (os.cpu_count() or 1) // size))
    environment = {"MBN_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, **LOCAL, **os.environ}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=_PATIENCE) for process in processes]
    except BaseException as error:
        for process in processes:
            process.terminate()  # which mpiexec passes on to the ranks
        for process in processes:
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return NotRun(f"its processes took more than {_PATIENCE} s", broken=True)
        raise
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            lines = [line for line in errors.splitlines() if ": " in line] or errors.splitlines() or [""]
            return NotRun(f"a process ended with exit code {process.returncode}: {lines[-1]}", broken=True)
    return json.loads(outputs[0][0])


def to_json(measurement: Measurement) -> str:
    """Return the measurement as a JSON document: seconds of each mode, of the shared step, the one alone, a gather."""
    return records.to_json(
        {
            "workload": measurement.workload._asdict(),
            "replicas": measurement.size,
            "modes": measurement.modes,
            "subjects": [
                {"subject": name, **_outcome(measurement, found)} for name, found in measurement.subjects.items()
            ],
        }
    )


def _outcome(measurement: Measurement, found: Shared | NotRun) -> dict[str, Any]:
    if isinstance(found, NotRun):
        return records.not_run(found)
    kinds = (SHARED, ALONE, GATHER)
    return {
        "status": "ran",
        "version": found.version,
        "seconds_per_call": {mode: {kind: found.median(mode, kind) for kind in kinds} for mode in measurement.modes},
        "seconds_more": {mode: found.more(mode) for mode in measurement.modes},
        "seconds_by_round": {**found.seconds, GATHER: found.gather},
    }


def show(console: Console, measurement: Measurement) -> None:
    """Print the backends that did not run, and a table for each mode."""
    reasons = {name: [found] for name, found in measurement.subjects.items() if isinstance(found, NotRun)}
    print_filled(console, not_run("backend", reasons))
    if not measurement.shared:
        return
    text = report.described(measurement.workload)
    console.print(f"{measurement.size} processes, each with {text}", style="bold")
    console.print(_EXPLANATION)
    for mode in measurement.modes:
        console.print(report.TITLES[mode], style="bold")
        print_filled(console, _times(measurement, mode))


def _times(measurement: Measurement, mode: str) -> Table:
    made = table("backend", "engine", "version", numbers=("ms alone", "ms shared", "us more", "us gather"))
    for name, found in measurement.shared.items():
        times = (milliseconds(found.median(mode, kind)) for kind in (ALONE, SHARED))
        microseconds = (f"{1e6 * seconds:.1f}" for seconds in (found.more(mode), found.median(mode, GATHER)))
        made.add_row(name, ENGINES[name].name, found.version, *times, *microseconds)
    return made
