"""The number of threads that mbn's own kernels may use, and a lock between threads.

There is one number for the process. It changes no framework's configuration, and no bit of any result.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

ENVIRONMENT_VARIABLE = "MBN_NUM_THREADS"

_num_threads: int | None = None
_limit: ContextVar[int | None] = ContextVar("mbn.threads.limited", default=None)


def get_num_threads() -> int:
    """Return how many threads one call may use, the caller's included.

    It is the number of :func:`set_num_threads`, else that of the environment variable ``MBN_NUM_THREADS``, else the
    number of processors that this process may run on; never more than these processors, nor than :func:`limited` says.

    Raises:
        ValueError: the environment variable is no integer of at least 1.
    """
    global _num_threads
    if _num_threads is None:
        _num_threads = _from_environment()
    limit = _limit.get()
    return _num_threads if limit is None else min(limit, _num_threads)


@contextmanager
def limited(num_threads: int) -> Iterator[None]:
    """Use at most ``num_threads`` within a ``with`` block: those that the caller's framework or scheduler allows."""
    outer = _limit.get()
    token = _limit.set(num_threads if outer is None else min(num_threads, outer))
    try:
        yield
    finally:
        _limit.reset(token)


def check_environment() -> None:
    """Check the environment variable, unless a number has been set. The variable may still change afterwards.

    Raises:
        ValueError: the environment variable is no integer of at least 1.
    """
    if _num_threads is None:
        _from_environment()


def set_num_threads(num_threads: int | None) -> None:
    """Set how many threads one call of a NumPy, Numba or, on the CPU, Torch layer may use, the caller's included.

    Results are the same to the bit for every number. JAX and Torch's own operations have their own numbers of threads.

    Args:
        num_threads: at least 1; a number beyond the processors counts as all of them. None restores the default.

    Raises:
        TypeError: ``num_threads`` is no int.
        ValueError: ``num_threads`` is less than 1.
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
    """A context that one thread at a time can enter, for as long as a few vectors take to copy.

    An interrupt while a thread leaves it, or a fork, may leave the lock taken by no thread. So a thread that has waited
    for a second replaces the lock by a new one.
    """

    _lock = threading.RLock()

    def __enter__(self) -> None:
        self._taken = Exclusive._lock
        if not self._taken.acquire(timeout=1):
            Exclusive._lock = self._taken = threading.RLock()
            self._taken.acquire()

    def __exit__(self, *_: object) -> None:
        self._taken.release()
