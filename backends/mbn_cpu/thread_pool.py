"""A pool of threads for the kernels.

It must change nothing but the time that a call takes: tasks are cut and combined in the same way for every number of
threads, the caller waits for all of them whatever happens, and a process that forks or never needs a second thread
sees none. Where no thread can be started, since the interpreter is shutting down or the system has no more, the caller
does the work alone. Tasks have to release the interpreter's lock for most of their time.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from mbn.threads import get_num_threads, num_processors

_pool: Executor | None = None
_limit: ContextVar[int | None] = ContextVar("mbn_cpu.thread_pool.limited", default=None)


@contextmanager
def limited(num_threads: int) -> Iterator[None]:
    """Use no more than so many threads within a ``with`` block, as a framework of the caller's says."""
    token = _limit.set(num_threads)
    try:
        yield
    finally:
        _limit.reset(token)


def run_tasks(task: Callable[[int], object], count: int, at_least: int = 1) -> None:
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

    # The pool may keep what it has refused, and begin it later: so each helper has its future before it is handed in.
    helpers: list[Future[None]] = [Future() for _ in range(num_helpers)]
    try:
        for helper in helpers:
            if not _handed_in(copy_context().run, _help, work, helper):
                break
        work()
    finally:  # nothing may be written to any more once the caller has gone on
        waiting.clear()
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _help(work: Callable[[], None], helper: Future[None]) -> None:
    """Work, unless the caller has taken it back, and leave the result or the error in the future."""
    if helper.set_running_or_notify_cancel():
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            helper.set_exception(error)
        else:
            helper.set_result(None)


def _next(waiting: deque[int]) -> int | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread took the last
        return None


def _num_threads() -> int:
    limit = _limit.get()
    return get_num_threads() if limit is None else min(limit, get_num_threads())


def _handed_in(*call: Any) -> bool:
    """Have a thread of the pool do something, and tell whether one could be found."""
    try:
        _executor().submit(*call)
    except (RuntimeError, ImportError):  # the interpreter is shutting down, or the system starts no more threads
        return False
    return True


def _executor() -> Executor:
    global _pool
    if _pool is None:
        # An interpreter that is shutting down refuses this import, and shall not refuse this module with it.
        from concurrent.futures.thread import ThreadPoolExecutor

        _pool = ThreadPoolExecutor(max(1, num_processors() - 1), thread_name_prefix="mbn")
    return _pool


def _forget() -> None:
    """Leave the pool to the parent: a fork takes none of its threads along."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
