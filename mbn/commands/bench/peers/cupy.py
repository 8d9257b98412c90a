"""CuPy: mbn's layer, and the copy that is the limit, timed by CUDA's events, as calls and as CUDA graphs."""

from typing import Any, ClassVar

import cupy
import numpy as np

import mbn
from mbn.commands.bench import subjects
from mbn.commands.bench.calls import Call, output_bytes
from mbn.commands.bench.clocks import EventClock
from mbn.commands.bench.subjects import Subject
from mbn.commands.bench.workloads import Workload
from mbn.contract import Backend


class Clock(EventClock):
    """The events of CuPy's current stream, on a device that it makes the current one of its process."""

    captures: ClassVar[bool] = True

    def __init__(self, x: cupy.ndarray) -> None:
        x.device.use()

    def record(self) -> Any:
        event = cupy.cuda.Event()
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) / 1e3

    def beyond_arrays(self, call: Call) -> int:
        """Return the growth of the memory pool: it begins without free blocks and keeps those that a call frees."""
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        outputs = output_bytes(call())
        return max(0, pool.total_bytes() - before - outputs)

    def captured(self, call: Call) -> Call:
        """Capture a call in a stream and in memory of its own, which the graph keeps as long as it is replayed."""
        stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        cupy.cuda.Device().synchronize()  # the stream waits for no other
        with stream, cupy.cuda.using_allocator(pool.malloc):
            for _ in range(_WARM_UP):
                call()
            stream.synchronize()
            stream.begin_capture()
            try:
                call()
            finally:
                graph = stream.end_capture()

        def replay(_: Any = pool) -> None:
            graph.launch()

        return replay


_WARM_UP = 3
"""Calls before a capture, which compile the kernels and fill the pool with all blocks that a call needs."""


class Layer(subjects.Layer):
    """mbn's layer on CuPy."""

    def __init__(self, backend: Backend, workload: Workload, device: str | None) -> None:
        super().__init__(backend, workload, device)
        self.clock = Clock(self.x)

    def wait(self, result: Any) -> Any:
        cupy.cuda.get_current_stream().synchronize()
        return result


class Copy(Subject):
    """A copy of x by CUDA, from device memory to device memory."""

    version = cupy.__version__

    def __init__(self, workload: Workload, device: str | None) -> None:
        self.workload, self._device = workload, device
        self.clock = Clock(self.x)
        self.device = f"cuda:{self.x.device.id}"
        self._copy = cupy.empty_like(self.x)

    def call(self, mode: str) -> Call:
        x, copy = self.x, self._copy
        return lambda: copy.data.copy_from_device_async(x.data, x.nbytes)

    def own(self, host: np.ndarray) -> cupy.ndarray:
        bits = np.ascontiguousarray(host).view(f"u{host.itemsize}")  # a copy is the same for every dtype
        array: cupy.ndarray = mbn.asarray(bits, backend="cupy", device=self._device)
        return array

    def wait(self, result: Any) -> Any:
        cupy.cuda.get_current_stream().synchronize()
        return result
