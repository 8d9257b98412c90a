"""The textbook formula in NumPy."""

from typing import Any

import numpy as np

from mbn.commands.bench.calls import Call
from mbn.commands.bench.subjects import Subject
from mbn.commands.bench.workloads import Workload
from mbn.contract import layer_dtype

_MOMENTUM, _EPS = 0.1, 1e-5


class Formula(Subject):
    """The formula of the paper, and of its gradient, in whole-array expressions.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), section 3.
    """

    version = np.__version__
    device = "cpu"

    def __init__(self, workload: Workload, device: str | None) -> None:
        if device not in (None, "cpu") or workload.masked:
            raise NotImplementedError(
                "the formula takes no masks" if workload.masked else "the formula is on the CPU alone"
            )
        self.workload = workload
        ndim = len(workload.shape)
        self._axes = tuple(axis for axis in range(ndim) if axis != workload.axis % ndim)
        shape = [1] * ndim
        shape[workload.axis] = workload.num_features
        dtype = layer_dtype(workload.dtype)
        self._weight, self._running_var = np.ones(shape, dtype), np.ones(shape, dtype)
        self._bias, self._running_mean = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def call(self, mode: str) -> Call:
        if mode == "pullback":
            residuals = self._normalised()
            return lambda: self._gradients(*residuals)
        return {"train": self._train, "eval": self._evaluate, "backward": self._backward}[mode]

    def own(self, host: np.ndarray) -> np.ndarray:
        return host

    def _normalised(self) -> tuple[np.ndarray, np.ndarray]:
        mean, var = self.x.mean(self._axes, keepdims=True), self.x.var(self._axes, keepdims=True)
        self._running_mean = (1 - _MOMENTUM) * self._running_mean + _MOMENTUM * mean
        self._running_var = (1 - _MOMENTUM) * self._running_var + _MOMENTUM * var
        std = np.sqrt(var + _EPS)
        return (self.x - mean) / std, std

    def _train(self) -> np.ndarray:
        xhat, _ = self._normalised()
        return xhat * self._weight + self._bias

    def _evaluate(self) -> np.ndarray:
        xhat: np.ndarray = (self.x - self._running_mean) / np.sqrt(self._running_var + _EPS)
        return xhat * self._weight + self._bias

    def _backward(self) -> tuple[Any, ...]:
        xhat, std = self._normalised()
        return xhat * self._weight + self._bias, *self._gradients(xhat, std)

    def _gradients(self, xhat: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, ...]:
        dy, count = self.dy, self.x.size // self._weight.size
        dbias, dweight = dy.sum(self._axes, keepdims=True), (dy * xhat).sum(self._axes, keepdims=True)
        dx = self._weight / std * (dy - dbias / count - xhat * dweight / count)
        return dx, dweight, dbias
