"""Replicas in threads of one process."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 60
"""Seconds after which a replica that waits for others gives up."""


class ThreadGroup:
    """A group whose replicas are threads."""

    def __init__(self, size: int) -> None:
        self._size, self._values = size, [None] * size
        self._barrier = threading.Barrier(size, timeout=PATIENCE)
        self._own = threading.local()

    @property
    def rank(self) -> int:
        return self._own.rank

    def gather(self, values: T) -> Sequence[T]:
        self._values[self.rank] = values
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()  # no thread writes again before all have read
        return found

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return the results of a function of the rank; if a replica raises an error, the others stop waiting."""

        def replica(rank: int) -> Any:
            self._own.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self._size) as pool:
            futures = [pool.submit(replica, rank) for rank in range(self._size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:  # preferably the first cause, not a consequence of it in another replica
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]
