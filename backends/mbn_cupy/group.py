"""The processes of a communicator of NCCL, or of MPI by way of the host, as a group."""

from typing import Any

import cupy

from mbn.contract import Group
from mbn_cpu.group import ENVIRONMENT_VARIABLE, completes, mpi_group, timeout


def cuda_group(given: Any) -> Group:
    """Return the group of a communicator of ``cupyx.distributed`` or of mpi4py.

    Raises:
        TypeError: ``given`` is no communicator.
        ValueError: this process is not part of the group.
    """
    kind = f"{type(given).__module__}.{type(given).__qualname__}"
    if kind.startswith("mpi4py."):
        return HostGroup(mpi_group("cupy", given))
    if not kind.startswith("cupyx.distributed"):
        raise TypeError(
            "the group of a layer on cupy is a communicator of cupyx.distributed.init_process_group or of mpi4py, or "
            f"an mbn.Group; not {kind}."
        )
    return NcclGroup(given)


class NcclGroup(Group):
    """The processes of a communicator of NCCL, one for each GPU, which exchange arrays in the current stream."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator

    @property
    def rank(self) -> int:
        return int(self._communicator.rank)

    @property
    def size(self) -> int:
        return int(self._communicator._n_devices)  # noqa: SLF001 - cupyx has no other name for it

    def gather(self, vector: cupy.ndarray) -> cupy.ndarray:
        seconds = timeout()
        with vector.device:
            rows = cupy.empty((self.size, vector.size))
            self._communicator.all_gather(vector, rows, vector.size)
            # Without this wait, a missing process would block the stream, and later calls, for good.
            event = cupy.cuda.Event(disable_timing=True)
            event.record()
            if completes(lambda: event.done, seconds):
                return rows
        self._communicator._comm.abort()  # noqa: SLF001 - cupyx has no other name for it
        raise TimeoutError(
            f"another process did not come after {seconds:g} s ({ENVIRONMENT_VARIABLE}), and the communicator is "
            "aborted. Each process has to call the layer equally often, with an empty batch, x[:0], where it has no "
            "data."
        )


class HostGroup(Group):
    """A group of the host, which copies arrays there and back."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def size(self) -> int:
        return self._group.size

    def gather(self, vector: cupy.ndarray) -> cupy.ndarray:
        with vector.device:
            return cupy.asarray(self._group.gather(vector.get()))
