"""Subjects measured side by side: each has a process of its own, and in each round each has a turn.

So a machine that gets slower slows down all subjects alike. A time is the median over the rounds, and a ratio the
median of the ratios within a round.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from mbn.commands import availability
from mbn.commands.bench.messages import Preparation, Prepared, Turn
from mbn.commands.bench.peers import FRAMEWORKS, HOST_ONLY, PEERS
from mbn.commands.bench.workloads import Workload
from mbn.commands.processes import NotRun, Process

ROUNDS = 7
LIMIT = tuple(PEERS)[-1]
"""The peer that is no batch norm: a copy, the limit of the speed of all others."""


class Timed(NamedTuple):
    """A subject that ran."""

    prepared: Prepared
    seconds: Mapping[str, Sequence[float]]
    """By mode: the time of a call in each round."""

    def median(self, mode: str) -> float:
        """Return the time of a call, in seconds."""
        return statistics.median(self.seconds[mode])

    def ratio(self, mode: str, other: "Timed") -> float:
        """Return the time of a call as a multiple of another subject's."""
        return statistics.median(a / b for a, b in zip(self.seconds[mode], other.seconds[mode], strict=True))


class Measurement(NamedTuple):
    """A workload on all subjects."""

    workload: Workload
    modes: tuple[str, ...]
    subjects: Mapping[str, Timed | NotRun]
    """By backend, as the user named it, then by peer; the limit last."""

    @property
    def timed(self) -> dict[str, Timed]:
        """The subjects that ran."""
        return {spec: found for spec, found in self.subjects.items() if isinstance(found, Timed)}

    @property
    def peers(self) -> list[str]:
        """The peers that ran, the limit included."""
        return [spec for spec in self.timed if spec.partition(":")[0] in PEERS]

    @property
    def limit(self) -> str:
        """The name of the limit, with its device if the subjects have one."""
        return next((spec for spec in self.subjects if spec.partition(":")[0] == LIMIT), LIMIT)

    def fastest_peer(self, mode: str) -> str | None:
        """Return the peer with the least time, without the limit; None where no peer ran."""
        peers = [spec for spec in self.peers if spec != self.limit]
        return min(peers, key=lambda spec: self.timed[spec].median(mode), default=None)


def subjects(backends: Sequence[str], device: str | None = None) -> list[str]:
    """Return the backends and the peers beside them, on the devices of the backends, and the limit last.

    Args:
        backends: each ``NAME`` or ``NAME:DEVICE``.
        device: the device of all backends; peers are on it too, as far as they can.
    """
    if device:
        peers = [peer for peer in PEERS if device == "cpu" or peer not in HOST_ONLY]
        return [*backends, *(f"{peer}:{device}" for peer in peers)]
    peers = []
    for peer in PEERS:
        named = [spec.partition(":") for spec in backends]
        devices = [device for name, _, device in named if name == FRAMEWORKS.get(peer)] or [""]
        peers += [f"{peer}:{device}" if device else peer for device in devices]
    return [*backends, *dict.fromkeys(peers)]


def placed(specs: Sequence[str]) -> list[str]:
    """Return the backends, each ``NAME:DEVICE``, that have the device."""
    return [spec for spec in specs if availability.refusal(spec) is None]


def measure(
    workload: Workload,
    specs: Sequence[str],
    modes: tuple[str, ...],
    advance: Callable[[str], object],
    rounds: int | None = None,
) -> Measurement:
    """Measure subjects on a workload.

    Args:
        workload: the input that they normalise.
        specs: the subjects; see :func:`mbn.commands.bench.subjects.subject`.
        modes: the modes that are timed.
        advance: called with a subject before it is prepared, and before its turn in each round.
        rounds: the number of rounds.
    """
    found: dict[str, Prepared | NotRun] = {}
    seconds: dict[str, dict[str, list[float]]] = {spec: {mode: [] for mode in modes} for spec in specs}
    with ExitStack() as stack:
        processes = {}
        for spec in specs:
            advance(spec)
            processes[spec] = stack.enter_context(Process("mbn.commands.bench.worker"))
            found[spec] = processes[spec].ask(Preparation(spec, workload, modes))
        for _ in range(ROUNDS if rounds is None else rounds):
            for mode in modes:
                for spec in specs:
                    if mode == modes[0]:
                        advance(spec)
                    if isinstance(found[spec], Prepared):
                        answer = processes[spec].ask(Turn(mode))
                        if isinstance(answer, NotRun):
                            found[spec] = answer
                        else:
                            seconds[spec][mode].append(answer)
    outcomes = {
        spec: Timed(outcome, seconds[spec]) if isinstance(outcome, Prepared) else outcome
        for spec, outcome in found.items()
    }
    return Measurement(workload, modes, outcomes)
