"""The messages between the processes of a benchmark: plain data."""

from collections.abc import Mapping
from typing import NamedTuple

from mbn.commands.bench.workloads import Workload


class Preparation(NamedTuple):
    """The question to prepare for a workload, in these modes. The answer is Prepared or NotRun."""

    spec: str
    workload: Workload
    modes: tuple[str, ...]
    captured: bool = False
    """Time a CUDA graph of each call, which the device repeats without the host."""


class Turn(NamedTuple):
    """The question to time the calls of a mode. The answer is the median of a call, in seconds, or NotRun."""

    mode: str


class Prepared(NamedTuple):
    """The answer of a subject that is ready, with the figures that are taken once; by mode."""

    version: str
    device: str
    first_call: Mapping[str, float]
    """Seconds of the first call of the process, with compilation; on fewer rows, unless each shape is compiled."""
    memory: Mapping[str, int | None]
    """Bytes beyond the arrays at the peak of a call; see ``mbn.commands.bench.memory``."""
