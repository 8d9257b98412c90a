"""Clocks for calls: the host's clock, the events of a device, and the host's clock around many queued calls.

A device works through a queue, and the host's clock around one call would time the queue alone. The inputs of a call
must not lie in the device's cache, so calls take turns on several sets of arrays where one set is small. This module
knows no framework.
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
"""The least seconds of a turn."""
_SAMPLE = 50e-6
"""The least seconds of a sample on the host. Shorter calls are timed several at a time, so that the time of the clock
itself is small beside them."""
_SAMPLES = 3
"""The least number of samples in a turn, on the host."""
_WARM_UP = 0.05
"""Seconds of work before a device is timed, after which it runs at its full speed."""
_ROTATED = 256 * 2**20
"""Bytes of input that calls on a device take turns on: several times the largest cache of a device."""
_SETS = 32
"""The most sets of arrays. Smaller inputs take less time than a launch, in the cache or out of it."""


class Clock(ABC):
    """Times calls where they are computed."""

    waits: ClassVar[bool] = False
    """Whether a call has to return after its outputs have been computed."""
    captures: ClassVar[bool] = False
    """Whether the clock has ``captured``."""

    @abstractmethod
    def sets(self, nbytes: int) -> int:
        """Return the number of sets of arrays that calls take turns on, for inputs of this size."""

    @abstractmethod
    def seconds(self, calls: Sequence[Call]) -> float:
        """Return the time of a call. ``calls`` do the same work, each on its own set of arrays."""

    @abstractmethod
    def beyond_arrays(self, call: Call) -> int | None:
        """Return the growth of memory in bytes during a call, less its outputs; None where it cannot be measured."""

    def captured(self, call: Call) -> Call:
        """Return a call in which the device repeats the work of this one without the host: a CUDA graph."""
        raise NotImplementedError


class HostClock(Clock):
    """The host's clock, around calls that return after their work."""

    waits: ClassVar[bool] = True

    def sets(self, nbytes: int) -> int:
        """Return 1."""
        return 1

    def seconds(self, calls: Sequence[Call]) -> float:
        """Return the median over about a tenth of a second."""
        (call,) = calls
        once = elapsed(call, 1)  # warms up caches and threads too
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
    """The median over many intervals, in which the device works on one call after another."""

    interval: ClassVar[float]
    """The least seconds of an interval."""
    intervals: ClassVar[int]
    """The least number of intervals in a turn."""

    @abstractmethod
    def intervals_of(self, calls: Call, number: int) -> list[float]:
        """Call ``calls`` a number of times, and return the seconds of the device for each time."""

    def sets(self, nbytes: int) -> int:
        """Return so many that no cache holds the inputs of the next call."""
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
    """Events that the device records when it reaches them in its queue."""

    interval: ClassVar[float] = 0.5e-3  # events are exact to half a microsecond
    intervals: ClassVar[int] = 20

    @abstractmethod
    def record(self) -> Any:
        """Queue an event, and return it."""

    @abstractmethod
    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two events, once the device has recorded both."""

    def intervals_of(self, calls: Call, number: int) -> list[float]:
        """Queue all calls, with an event after each round of them, and wait once at the end."""
        events = [self.record()]
        for _ in range(number):
            calls()
            events.append(self.record())
        return [self.between(start, end) for start, end in pairwise(events)]


class QueueClock(DeviceClock):
    """The host's clock around many queued calls and the wait for the last, for a framework without events."""

    interval: ClassVar[float] = 20e-3  # a wait takes the host tens of microseconds
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
            result = None  # frees the outputs before the next call makes its own
            result = call()
    return result
