"""A pool of threads for the kernels.

It must change nothing but the time that a call takes: tasks are cut and combined in the same way for every number of
threads, the caller waits for all of them whatever happens, and a process that forks or never needs a second thread
sees none. Tasks have to release the interpreter's lock for most of their time.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

from mbn.threads import get_num_threads, num_processors

_pool: ThreadPoolExecutor | None = None
_limit: ContextVar[int | None] = ContextVar("mbn_cpu.threads.limited", default=None)


@contextmanager
def limited(num_threads: int) -> Iterator[None]:
    """Use no more than so many threads within a ``with`` block, as a framework of the caller's says."""
    token = _limit.set(num_threads)
    try:
        yield
    finally:
        _limit.reset(token)


def run(task: Callable[[int], object], count: int, at_least: int = 1) -> None:
    """Call ``task(i)`` for each i below ``count``, in no particular order, in the context of the caller.

    Args:
        task: what to do.
        count: how often.
        at_least: how many tasks are worth a thread: it takes up to 50 microseconds to wake up.

    Raises:
        BaseException: what a task raised first; the others that have not begun are then left out.
    """
    num_helpers = min(_num_threads(), count // at_least) - 1
    if num_helpers <= 0:
        for i in range(count):
            task(i)
        return
    waiting = deque(range(count))

    def work() -> None:
        try:
            while (i := _next(waiting)) is not None:
                task(i)
        except BaseException:
            waiting.clear()
            raise

    helpers = [_executor().submit(copy_context().run, work) for _ in range(num_helpers)]
    try:
        work()
    finally:  # nothing may be written to any more once the caller has gone on
        waiting.clear()
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _next(waiting: deque[int]) -> int | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread took the last
        return None


def _num_threads() -> int:
    limit = _limit.get()
    return get_num_threads() if limit is None else min(limit, get_num_threads())


def _executor() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool for the process
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, num_processors() - 1), thread_name_prefix="mbn")
    return _pool


def _forget() -> None:
    """Leave the pool to the parent: a fork takes none of its threads along."""
    global _pool  # noqa: PLW0603 - as above
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
