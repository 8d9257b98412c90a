"""What the processes of a benchmark tell each other: plain data."""

from collections.abc import Mapping
from typing import NamedTuple

from mbn.commands.bench.workloads import Workload


class Preparation(NamedTuple):
    """A question: to make ready for a workload, in these modes. The answer is Prepared or NotRun."""

    spec: str
    workload: Workload
    modes: tuple[str, ...]
    captured: bool = False
    """Time calls that the device repeats by itself, as a CUDA graph."""


class Turn(NamedTuple):
    """A question: to time the calls of a mode. The answer is the median of a call, in seconds, or NotRun."""

    mode: str


class Prepared(NamedTuple):
    """Who is ready, and what was to be seen once only; by mode."""

    version: str
    device: str
    first_call: Mapping[str, float]
    """Seconds of the first call of the process, compilation included; on fewer rows where no shape is compiled for."""
    memory: Mapping[str, int | None]
    """Bytes beyond the arrays at the peak of a call; see ``mbn.commands.bench.memory``."""
