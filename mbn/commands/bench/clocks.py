"""How a call is timed where it computes: by the host's clock, by a device's events, or many queued calls at a time.

A device works through a queue, and a host clock around one call would time the queue's ends. What a device reads must
not lie in its cache, so where one set of arrays is small, calls take turns on several. This module knows no framework.
"""

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from mbn.commands.bench import memory
from mbn.commands.bench.calls import Call

TURN = 0.1
"""Seconds that a turn takes at least."""
_SAMPLE = 50e-6
"""Seconds of a sample at least on the host: shorter calls are timed several at a time, so that its clock's own time is
small."""
_SAMPLES = 3
"""In a turn at least, on the host."""
_WARM_UP = 0.05
"""Seconds that a device works before it is timed, until it runs at its full speed."""
_ROTATED = 256 * 2**20
"""Bytes of input that calls on a device take turns on: several times the cache of any."""
_SETS = 32
"""Of arrays at most. Inputs that are too small for _ROTATED take less time than a launch, wherever they lie."""


class Clock(ABC):
    """Times calls where they are computed."""

    waits: ClassVar[bool] = False
    """Whether the outputs of a call have to be there when it returns."""
    captures: ClassVar[bool] = False
    """Whether ``captured`` is to be had."""

    @abstractmethod
    def sets(self, nbytes: int) -> int:
        """Return how many sets of arrays calls have to take turns on, for inputs of this size."""

    @abstractmethod
    def seconds(self, calls: Sequence[Call]) -> float:
        """Return the time of a call. ``calls`` do the same work, each on its own set of arrays."""

    @abstractmethod
    def beyond_arrays(self, call: Call) -> int | None:
        """Return by how many bytes memory grew during a call, less its outputs; None where nothing tells."""

    def captured(self, call: Call) -> Call:
        """Return a call that has the device repeat what this one does, without the host's part: as a CUDA graph."""
        raise NotImplementedError


class HostClock(Clock):
    """The host's clock, around calls that return when all is done."""

    waits: ClassVar[bool] = True

    def sets(self, nbytes: int) -> int:
        """Return 1."""
        return 1

    def seconds(self, calls: Sequence[Call]) -> float:
        """Return the median over about a tenth of a second."""
        (call,) = calls
        once = elapsed(call, 1)  # caches and threads wake up
        number = max(1, round(_SAMPLE / max(once, 1e-9)))
        samples: list[float] = []
        end = time.perf_counter() + TURN
        while len(samples) < _SAMPLES or time.perf_counter() < end:
            samples.append(elapsed(call, number))
        return statistics.median(samples)

    def beyond_arrays(self, call: Call) -> int | None:
        """Return the growth of the process; see ``mbn.commands.bench.memory``."""
        return memory.beyond_arrays(call)


class DeviceClock(Clock):
    """The median over many intervals in which the device is busy with one call after another."""

    interval: ClassVar[float]
    """Seconds of an interval at least."""
    intervals: ClassVar[int]
    """In a turn at least."""

    @abstractmethod
    def intervals_of(self, calls: Call, number: int) -> list[float]:
        """Call ``calls`` a number of times, and return how long the device took each time, in seconds."""

    def sets(self, nbytes: int) -> int:
        """Return so many that no cache holds what a call is about to read."""
        return min(_SETS, math.ceil(_ROTATED / nbytes))

    def seconds(self, calls: Sequence[Call]) -> float:
        """Return the median, after a warm-up. All calls have their turn in every interval."""
        number = 1
        self.intervals_of(lambda: _last(calls, 1), 1)
        while (busy := sum(self.intervals_of(lambda: _last(calls, 1), number))) < _WARM_UP:
            number *= 2
        turns = math.ceil(self.interval * number / busy)
        intervals = max(self.intervals, math.ceil(TURN * number / (busy * turns)))
        return statistics.median(self.intervals_of(lambda: _last(calls, turns), intervals)) / (turns * len(calls))


class EventClock(DeviceClock):
    """Events that the device records when it comes to them in its queue."""

    interval: ClassVar[float] = 0.5e-3  # events are exact to half a microsecond
    intervals: ClassVar[int] = 20

    @abstractmethod
    def record(self) -> Any:
        """Queue an event, and return it."""

    @abstractmethod
    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two events, once the device has recorded both."""

    def intervals_of(self, calls: Call, number: int) -> list[float]:
        """Queue all calls with an event after each round of them, and wait only then."""
        events = [self.record()]
        for _ in range(number):
            calls()
            events.append(self.record())
        return [self.between(start, end) for start, end in pairwise(events)]


class QueueClock(DeviceClock):
    """The host's clock around many queued calls, where a framework has no events: it waits for the last of them."""

    interval: ClassVar[float] = 20e-3  # to wait takes the host tens of microseconds
    intervals: ClassVar[int] = 5

    def __init__(self, wait: Callable[[Any], object]) -> None:
        self._wait = wait

    def intervals_of(self, calls: Call, number: int) -> list[float]:
        """Wait after each round of calls."""
        return [elapsed(lambda: self._wait(calls()), 1) for _ in range(number)]

    def beyond_arrays(self, call: Call) -> int | None:
        """Return None."""
        return None


def elapsed(call: Call, number: int) -> float:
    """Return the seconds of a call on the host's clock, as the mean of a number of them."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def _last(calls: Sequence[Call], turns: int) -> Any:
    result = None
    for _ in range(turns):
        for call in calls:
            result = None  # so that the outputs of two calls are never there together
            result = call()
    return result
