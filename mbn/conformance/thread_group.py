"""Replicas in threads of one process, so that the suite can divide a batch on every backend."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mbn.contract import Array, Group

PATIENCE = 60.0
"""Seconds after which a replica that waits for others gives up."""


class ThreadGroup(Group):
    """A group whose replicas are threads: ``ThreadGroup(3).run(function)`` calls a function of the rank in each."""

    def __init__(self, size: int, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._changed = threading.Condition()
        self._sent: list[list[Any]] = [[] for _ in range(size)]
        self._has_ended = [False] * size
        self._own = threading.local()

    @property
    def rank(self) -> int:
        """The number of the replica of this thread."""
        rank: int = self._own.rank
        return rank

    @property
    def size(self) -> int:
        """The number of replicas."""
        return len(self._sent)

    @property
    def lengths(self) -> list[int]:
        """The lengths of the vectors that rank 0 has sent."""
        return [vector.shape[0] for vector in self._sent[0]]

    def gather(self, vector: Array) -> Array:
        """Return the vectors of all threads, as :meth:`mbn.Group.gather` does."""
        with self._changed:
            own = self._sent[self.rank]
            own.append(vector)
            number = len(own)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._all_sent(number) or self._missing(number), self._patience)
            if not self._all_sent(number):
                missing = [rank for rank, vectors in enumerate(self._sent) if len(vectors) < number]
                raise TimeoutError(f"ranks {missing} did not come")
            vectors = [others[number - 1] for others in self._sent]
        lengths = [other.shape[0] for other in vectors]
        assert len(set(lengths)) == 1, f"vectors of lengths {lengths}, with which engines crash"
        namespace = sys.modules[type(vector).__module__.partition(".")[0]]
        return namespace.stack(vectors)

    def _all_sent(self, number: int) -> bool:
        return all(len(vectors) >= number for vectors in self._sent)

    def _missing(self, number: int) -> bool:
        """Tell whether a replica has ended that the others wait for."""
        return any(ended and len(vectors) < number for ended, vectors in zip(self._has_ended, self._sent, strict=True))

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return the results of a function of the rank; raise the first error of a rank, if any."""
        results = self.outcomes(function)
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, TimeoutError)):
            raise error  # preferably the cause, not a consequence of it in another replica
        return results

    def outcomes(self, function: Callable[[int], Any]) -> list[Any]:
        """Return the results of a function of the rank, or the errors that it raised."""

        def replica(rank: int) -> Any:
            self._own.rank = rank
            try:
                return function(rank)
            except BaseException as error:  # noqa: BLE001 - it is returned
                return error
            finally:
                with self._changed:
                    self._has_ended[rank] = True
                    self._changed.notify_all()

        self._has_ended = [False] * self.size
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(replica, range(self.size)))
