"""Torch: ``torch.nn.BatchNorm1d``, and mbn's layer on Torch's tensors, both called in the same way.

Without gradients their forward passes record nothing; with them, ``y.backward(dy)`` reaches x, weight and bias. Tensors
lie in memory of Torch's own, not of NumPy, which asks for huge pages.
"""

from functools import cached_property
from typing import Any

import torch

import mbn
from mbn.bench import subjects
from mbn.bench.subjects import Call, Subject
from mbn.bench.workloads import Workload


class Layer(subjects.Layer):
    """mbn's layer on Torch."""

    def step(self, mode: str) -> Call:
        return _step(self, self.layer, mode)

    def own(self, host: Any) -> torch.Tensor:
        return super().own(host).clone()

    def wait(self, result: Any) -> Any:
        return _wait(self, result)


class Module(Subject):
    """``torch.nn.BatchNorm1d``. Where the channels are last, it is called on a transposed view."""

    version = str(torch.__version__)

    def __init__(self, workload: Workload, device: str | None) -> None:
        if workload.masked:
            message = "torch.nn.BatchNorm1d takes no masks"
            raise NotImplementedError(message)
        self.device = device or "cpu"
        self._workload, self.masks = workload, {}
        dtype = torch.float64 if workload.dtype == "float64" else torch.float32
        self._module = torch.nn.BatchNorm1d(workload.num_features, device=self.device, dtype=dtype)
        self.x = self.own(workload.x())

    @cached_property
    def dy(self) -> torch.Tensor:
        """The gradient of the output."""
        return self.own(self._workload.dy())

    def step(self, mode: str) -> Call:
        return _step(self, self._module, mode)

    def own(self, host: Any) -> torch.Tensor:
        tensor = mbn.asarray(host, backend="torch", device=self.device).clone()
        is_last = self._workload.axis == -1 and tensor.ndim == 3  # noqa: PLR2004 - (N, L, C)
        return tensor.transpose(1, 2) if is_last else tensor


def _step(subject: Layer | Module, bn: Any, mode: str) -> Call:
    torch.set_grad_enabled(mode == "backward")
    bn.train(mode != "eval")
    x, masks = subject.x, subject.masks
    return _backward(subject, bn) if mode == "backward" else lambda: _wait(subject, bn(x, **masks))


def _backward(subject: Layer | Module, bn: Any) -> Call:
    x, dy, masks = subject.x.detach().requires_grad_(), subject.dy, subject.masks
    leaves = [x, *bn.parameters()]

    def backward() -> tuple[Any, ...]:
        for leaf in leaves:
            leaf.grad = None
        y = bn(x, **masks)
        y.backward(dy)
        return _wait(subject, (y, *(leaf.grad for leaf in leaves)))

    return backward


def _wait(subject: Layer | Module, result: Any) -> Any:
    if subject.x.is_cuda:
        torch.cuda.synchronize(subject.x.device)
    return result
