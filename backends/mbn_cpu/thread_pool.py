"""A pool of threads for the kernels.

The pool must change nothing but the time that a call takes: tasks are the same for every number of threads, the caller
waits for all of them, even after an error, and no thread is started before a call needs a second one, nor kept in a
forked child. Where no thread can be started, since the interpreter is shutting down or the system has no more threads,
the caller executes all tasks itself. Tasks have to release the interpreter's lock for most of their time.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from contextvars import copy_context
from functools import partial
from typing import Any

from mbn.threads import get_num_threads, num_processors

CHUNK = 1 << 18
"""The number of values of x that Numba's loops take at a time: enough for a task of a thread.

The sums of a chunk are added up on their own, so the bits of all sums depend on this number.
"""
_pool: Executor | None = None


def run_tasks(task: Callable[[int], object], count: int, at_least: int = 1, *, backward: bool = False) -> None:
    """Call ``task(i)`` for each i below ``count``, in no particular order, in the context of the caller.

    The caller begins at the first task and the other threads at the last, so that in the next call each finds most
    values of its tasks in its own cache. Two threads meet in the middle; a call backward begins in the middle.

    Args:
        task: a function of the task's number.
        count: the number of tasks.
        at_least: the least number of tasks per thread: a thread takes up to 50 microseconds to wake up.
        backward: whether each thread begins with the tasks that it ends with otherwise.

    Raises:
        BaseException: the first error of a task; tasks that have not begun are then not executed.
    """
    num_helpers = min(get_num_threads(), count // at_least) - 1
    middle = count // 2 if num_helpers > 0 else 0
    numbers = range(count)
    order = (*numbers[:middle][::-1], *numbers[middle:][::-1]) if backward else numbers
    if num_helpers <= 0:
        for i in order:
            task(i)
        return
    waiting = deque(order)

    def work(take: Callable[[], int]) -> None:
        try:
            while (i := _next(take)) is not None:
                task(i)
        except BaseException:
            waiting.clear()
            raise

    # The pool may keep a call that it has refused, and begin it later: so each helper has its own future, which the
    # caller can cancel, before it is submitted.
    helpers: list[Future[None]] = [Future() for _ in range(num_helpers)]
    try:
        for helper in helpers:
            if not _handed_in(copy_context().run, _help, partial(work, waiting.pop), helper):
                break
        work(waiting.popleft)
    finally:  # no helper may write to an array after the caller has returned
        waiting.clear()
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _help(work: Callable[[], None], helper: Future[None]) -> None:
    """Execute tasks, unless the caller has cancelled the helper; store the end or the error in its future."""
    if helper.set_running_or_notify_cancel():
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            helper.set_exception(error)
        else:
            helper.set_result(None)


def _next(take: Callable[[], int]) -> int | None:
    try:
        return take()
    except IndexError:  # another thread took the last
        return None


def _handed_in(*call: Any) -> bool:
    """Submit a call to the pool, and tell whether the pool took it."""
    try:
        _executor().submit(*call)
    except (RuntimeError, ImportError):  # the interpreter is shutting down, or the system starts no more threads
        return False
    return True


def _executor() -> Executor:
    global _pool
    if _pool is None:
        # An interpreter that is shutting down refuses this import; at the top of the file it would refuse this module.
        from concurrent.futures.thread import ThreadPoolExecutor

        _pool = ThreadPoolExecutor(max(1, num_processors() - 1), thread_name_prefix="mbn")
    return _pool


def _forget() -> None:
    """Drop the pool in a forked child, which has none of its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
