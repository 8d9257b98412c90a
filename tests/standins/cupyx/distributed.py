"""Communicators of NCCL among threads. As NCCL does, a call returns before the others have come."""

from functools import partial

import cupy
from cupy._device import current_id, queue

_worlds = {}


def init_process_group(n_devices, rank, *, backend="nccl", host=None, port=None, use_mpi=False):
    return NCCLBackend(n_devices, rank, _worlds.setdefault((n_devices, port), [[] for _ in range(n_devices)]))


class NCCLBackend:
    """The communicator of one thread, on the device that is current when it is made."""

    def __init__(self, n_devices, rank, sent):
        self._n_devices, self.rank, self._sent, self._device_id = n_devices, rank, sent, current_id()
        self._comm = self

    def all_gather(self, in_array, out_array, count, stream=None):
        for array in (in_array, out_array):
            assert array.device.id == current_id() == self._device_id, "NCCL's arrays are on its device"
            assert array.flags.c_contiguous
            assert array.dtype == in_array.dtype
        assert out_array.size == self._n_devices * count
        own = self._sent[self.rank]
        own.append(in_array.get()[:count])
        queue().append(partial(self._is_gathered, len(own) - 1, out_array))

    def _is_gathered(self, number, out_array):
        if any(len(sent) <= number for sent in self._sent):
            return False
        out_array[...] = cupy.asarray([sent[number] for sent in self._sent])  # (size, count), as mbn has it
        return True

    def abort(self):
        queue().clear()
