"""Torch: ``torch.nn.BatchNorm1d``, and mbn's layer on Torch's tensors, both called in the same way.

In modes without gradients autograd records nothing; in the others ``y.backward(dy)`` computes the gradients of x,
weight and bias. Tensors lie in Torch's own memory: NumPy's may have huge pages, which would be an advantage. On CUDA
calls are timed by events.
"""

from typing import Any, ClassVar

import numpy as np
import torch

import mbn
from mbn.commands.bench import clocks, subjects
from mbn.commands.bench.calls import Call, output_bytes
from mbn.commands.bench.clocks import EventClock
from mbn.commands.bench.subjects import Subject
from mbn.commands.bench.workloads import FORWARD, PULLBACK, Workload


class Clock(EventClock):
    """The events of Torch's current stream, on a device that it makes the current one of its process."""

    captures: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)

    def record(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        seconds: float = start.elapsed_time(end) / 1e3
        return seconds

    def beyond_arrays(self, call: Call) -> int:
        """Return the growth of memory at the peak, as Torch's allocator counts it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = output_bytes(call())
        return max(0, torch.cuda.max_memory_allocated() - before - outputs)

    def captured(self, call: Call) -> Call:
        """Capture a call in a stream of its own, after some calls in it, and in the graph's own memory."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        replay: Call = graph.replay
        return replay


_WARM_UP = 3
"""Calls before a capture, which compile the kernels."""


class TorchSubject(Subject):
    """A subject on Torch."""

    masks: Any

    @property
    def clock(self) -> clocks.Clock:  # type: ignore[override]  # it depends on x
        return Clock(self.x.device) if self.x.is_cuda else clocks.HostClock()

    def wait(self, result: Any) -> Any:
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)
        return result


class Layer(TorchSubject, subjects.Layer):
    """mbn's layer on Torch."""

    def call(self, mode: str) -> Call:
        return _call(self, self.layer, mode)

    def own(self, host: np.ndarray) -> torch.Tensor:
        tensor: torch.Tensor = super().own(host).clone()
        return tensor


class Module(TorchSubject):
    """``torch.nn.BatchNorm1d``. Where the channels are last, it is called on a transposed view."""

    version = str(torch.__version__)

    def __init__(self, workload: Workload, device: str | None) -> None:
        if workload.masked:
            raise NotImplementedError("torch.nn.BatchNorm1d takes no masks")
        self.workload, self._device, self.masks = workload, device or "cpu", {}
        self.device = str(self.x.device)
        dtype = torch.float64 if workload.dtype == "float64" else torch.float32
        self._module = torch.nn.BatchNorm1d(workload.num_features, device=self.device, dtype=dtype)

    def call(self, mode: str) -> Call:
        return _call(self, self._module, mode)

    def own(self, host: np.ndarray) -> torch.Tensor:
        tensor: torch.Tensor = mbn.asarray(host, backend="torch", device=self._device).clone()
        is_last = self.workload.axis == -1 and tensor.ndim == 3
        return tensor.transpose(1, 2) if is_last else tensor


class Copy(TorchSubject):
    """A copy of x within the memory of a device."""

    version = str(torch.__version__)

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload, self._device = workload, device
        self.device = str(self.x.device)
        self._copy = torch.empty_like(self.x)

    def call(self, mode: str) -> Call:
        x, copy = self.x, self._copy
        return lambda: copy.copy_(x)

    def own(self, host: np.ndarray) -> torch.Tensor:
        tensor: torch.Tensor = mbn.asarray(host, backend="torch", device=self._device)
        return tensor


def _call(subject: TorchSubject, bn: Any, mode: str) -> Call:
    torch.set_grad_enabled(mode not in FORWARD)
    bn.train(mode != "eval")
    x, masks = subject.x, subject.masks
    if mode in FORWARD:
        return lambda: bn(x, **masks)
    x, dy = x.detach().requires_grad_(), subject.dy
    leaves = [x, *bn.parameters()]
    if mode == PULLBACK:
        y = bn(x, **masks)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def backward() -> tuple[Any, ...]:
        for leaf in leaves:
            leaf.grad = None
        y = bn(x, **masks)
        y.backward(dy)
        return y, *(leaf.grad for leaf in leaves)

    return backward
