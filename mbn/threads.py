"""How many threads mbn's own kernels may use, and how two threads keep out of each other's way.

The number is one for the process, which no framework's configuration depends on and which changes no bit of any result.
"""

import os
import threading
from typing import Any

ENVIRONMENT_VARIABLE = "MBN_NUM_THREADS"

_num_threads: int | None = None


def get_num_threads() -> int:
    """Return how many threads one call may use, the caller's included.

    It is what :func:`set_num_threads` has set, else the environment variable ``MBN_NUM_THREADS``, else the number of
    processors that this process may run on. More than these are never used.

    Raises:
        ValueError: the environment variable is no whole number of at least 1.
    """
    global _num_threads
    if _num_threads is None:
        _num_threads = _from_environment()
    return _num_threads


def check_environment() -> None:
    """Check the environment variable, unless it does not count. Nothing is settled yet: it may still change.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if _num_threads is None:
        _from_environment()


def set_num_threads(num_threads: int | None) -> None:
    """Say how many threads one call of a NumPy, Numba or, on the CPU, Torch layer may use, the caller's included.

    Results are the same to the bit for every number. JAX and the operations that Torch itself runs have their own.

    Args:
        num_threads: at least 1; more than there are processors counts as all of them. None takes what was set back.

    Raises:
        TypeError: it is no int.
        ValueError: it is less than 1.
    """
    global _num_threads
    if num_threads is not None and (isinstance(num_threads, bool) or not isinstance(num_threads, int)):
        raise TypeError(f"num_threads is an int or None, not {num_threads!r}.")
    _num_threads = None if num_threads is None else _checked("num_threads", num_threads)


def num_processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _from_environment() -> int:
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if not text:
        return num_processors()
    try:
        number = int(text)
    except ValueError:
        number = 0
    return _checked(f"the environment variable {ENVIRONMENT_VARIABLE}", number, text)


def _checked(name: str, number: int, given: Any = None) -> int:
    if number < 1:
        raise ValueError(f"{name} is a number of threads, at least 1, not {number if given is None else repr(given)}.")
    return min(number, num_processors())


class Exclusive:
    """A context in which one thread is at a time, for as long as a few vectors take to copy.

    An interrupt between two steps of leaving it, or a fork, may leave the lock taken with nobody inside. So whoever
    waits for long takes a new one.
    """

    _lock = threading.RLock()

    def __enter__(self) -> None:
        self._taken = Exclusive._lock
        if not self._taken.acquire(timeout=1):
            Exclusive._lock = self._taken = threading.RLock()
            self._taken.acquire()

    def __exit__(self, *_: object) -> None:
        self._taken.release()
