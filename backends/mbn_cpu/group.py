"""The processes of an MPI communicator as a group."""

import math
import os
import sys
import time
from functools import partial
from typing import Any

import numpy as np

from mbn.contract import Group

ENVIRONMENT_VARIABLE = "MBN_GROUP_TIMEOUT"
"""The environment variable of the seconds after which a missing process is an error."""
_DEFAULT_TIMEOUT = 300.0
_BUSY_TESTS = 50
"""Tests of a request without a pause: a gather among processes of one machine takes a few microseconds."""
_YIELDING, _LONGEST_PAUSE = 5e-3, 1e-3
"""Seconds in which a process that waits lets others compute but does not sleep, since it wakes up late; and the
longest sleep after them."""
_TAG = 27182
"""The tag of the messages by which processes that have waited in vain find each other."""
_GRACE = 2.0
"""Seconds in which these messages arrive."""
_PROBING = 1e-3
"""Seconds in which a late process finds a message that has arrived."""
_let_others_run = getattr(os, "sched_yield", partial(time.sleep, 0))
_pending: list[Any] = []
"""Requests that no process will complete, with their memory, which MPI may still write to."""
_completed: dict[int, float] = {}
"""The time of the last gather in each communicator, by its handle."""
_abandoned: set[int] = set()
"""Communicators in which a process was missing: there, the next gathers of two processes would not be the same."""
_NEW_COMMUNICATOR = "Continue with a new communicator: bn.group = communicator.Dup()."


def mpi_group(name: str, given: Any) -> "MpiGroup":
    """Return the group of a communicator, or of all processes for True; ``name`` is the backend's.

    Raises:
        TypeError: ``given`` is no communicator.
        ValueError: this process is not part of the communicator.
        ImportError: mpi4py is not installed.
    """
    kind = f"{type(given).__module__}.{type(given).__qualname__}"
    if given is not True and not kind.startswith("mpi4py."):
        raise TypeError(
            f"the group of a layer on {name} is a communicator of mpi4py, an mbn.Group, or True for MPI.COMM_WORLD; "
            f"not {kind}."
        )
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise ImportError(
            f"group=True on {name} is MPI's world, and mpi4py is not installed: pip install 'mbn-batchnorm[mpi]'."
        ) from error
    communicator = MPI.COMM_WORLD if given is True else given
    if given is True and communicator.size == 1 and _has_torch_world():
        raise TypeError(
            f"group=True on {name} is MPI's world, which is this process alone, and torch.distributed connects it with "
            "others: give a torch.Tensor or backend='torch' for these, or a communicator of mpi4py."
        )
    if communicator == MPI.COMM_NULL:
        raise ValueError("this process is not part of the group: its communicator is MPI.COMM_NULL.")
    if not isinstance(communicator, MPI.Intracomm):
        raise TypeError(f"the group of a layer is an intracommunicator of mpi4py, not {kind}.")
    return MpiGroup(communicator, MPI.Status())


def _has_torch_world() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class MpiGroup(Group):
    """The processes of a communicator, which exchange NumPy arrays."""

    def __init__(self, communicator: Any, status: Any) -> None:
        self._communicator, self._status = communicator, status

    @property
    def rank(self) -> int:
        return int(self._communicator.Get_rank())

    @property
    def size(self) -> int:
        return int(self._communicator.Get_size())

    def gather(self, vector: np.ndarray) -> np.ndarray:
        seconds, handle = timeout(), self._communicator.handle
        if time.monotonic() - _completed.get(handle, -math.inf) > seconds:
            self._raise_if_late(handle)
        rows = np.empty((self.size, len(vector)))
        request = self._communicator.Iallgather(vector, rows)
        try:
            is_complete = completes(request.Test, seconds)
        except BaseException:  # an interrupt, say, while MPI writes to the memory
            _pending.append((request, vector, rows))
            raise
        if not is_complete:
            _pending.append((request, vector, rows))
            _completed[handle] = -math.inf
            _abandoned.add(handle)
            raise TimeoutError(
                f"{self._missing()} after {seconds:g} s ({ENVIRONMENT_VARIABLE}). Each process has to call the layer "
                "equally often, with an empty batch, x[:0], where it has no data."
            )
        _completed[handle] = time.monotonic()
        return rows

    def _raise_if_late(self, handle: int) -> None:
        """Check that no process has given up. With the vectors that it has sent, a gather would complete here alone."""
        if handle in _abandoned:
            raise TimeoutError(f"an earlier gather did not complete. {_NEW_COMMUNICATOR}")
        if completes(partial(self._communicator.Iprobe, tag=_TAG, status=self._status), _PROBING):
            raise TimeoutError(f"rank {self._status.source} has waited in vain for this process. {_NEW_COMMUNICATOR}")

    def _missing(self) -> str:
        """Return which processes do not wait as this one does, by messages among those that do."""
        others = {rank for rank in range(self.size) if rank != self.rank}
        token = np.zeros(1)
        _pending.append((token, [self._communicator.Isend(token, rank, _TAG) for rank in others]))
        received = np.empty(1)

        def is_complete() -> bool:
            for rank in tuple(others):
                if self._communicator.Iprobe(rank, _TAG):
                    self._communicator.Recv(received, rank, _TAG)
                    others.remove(rank)
            return not others

        if completes(is_complete, _GRACE):
            return "the processes missed each other"
        return f"rank{'s' * (len(others) > 1)} {', '.join(map(str, sorted(others)))} did not come"


def timeout() -> float:
    """Return the seconds after which a missing process is an error.

    Raises:
        ValueError: the environment variable is no number above 0.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is a number of seconds above 0, not {text!r}.")
    return seconds


def completes(is_complete: Any, seconds: float) -> bool:
    """Call a function until it returns True; return False after some seconds."""
    for _ in range(_BUSY_TESTS):
        if is_complete():
            return True
    start, pause = time.monotonic(), 1e-5
    while (waited := time.monotonic() - start) < seconds:
        if is_complete():
            return True
        if waited < _YIELDING:
            _let_others_run()
        else:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    return bool(is_complete())
