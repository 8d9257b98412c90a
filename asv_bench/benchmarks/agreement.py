"""The errors of each backend against the oracle, so that the history shows a loss of digits like a loss of speed."""

import numpy as np

import mbn
from mbn.commands.bench.workloads import Workload
from mbn.conformance import derivatives, oracle, ulp
from mbn.contract import Array

from ._backends import NAMES, layer

SHAPE = (1024, 16)
OFFSETS = [1e4]
"""Offsets of x at which sums of squares, and float32 sums of values, have lost most of their digits."""


class Float32:
    """Largest errors of one training step and of one evaluation, measured as the conformance suite measures them."""

    params = (NAMES, OFFSETS)
    param_names = ("backend", "offset")
    unit = "ulp"

    def setup(self, name: str, offset: float) -> None:
        subject = layer(name, Workload(SHAPE))
        generator = np.random.default_rng(1)
        weight, bias, noise, running_var = generator.uniform(0.5, 2, (4, SHAPE[1])).astype(np.float32)
        running_mean = np.float32(offset) + noise
        x = np.float32(offset) + Workload(SHAPE).x()
        self._arguments = (x, running_mean, running_var, weight, bias)
        self._x, self._layer = subject.own(x), subject.layer
        self._layer.load_state_dict(
            {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}, strict=False
        )

    def track_train(self, *_: object) -> float:
        return _error(self._layer(self._x), self._step().y)

    def track_eval(self, *_: object) -> float:
        return _error(self._layer.eval()(self._x), oracle.evaluate(*self._arguments, eps=self._layer.eps))

    def track_running_mean(self, *_: object) -> float:
        self._layer(self._x)
        return _error(self._layer.running_mean, self._step().running_mean)

    def track_running_var(self, *_: object) -> float:
        self._layer(self._x)
        return _error(self._layer.running_var, self._step().running_var)

    def track_gradient(self, *_: object) -> float:
        x, _, _, weight, _ = self._arguments
        dy = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
        _, pullback = self._layer.vjp(self._x)
        exact = derivatives.gradients(x, dy, weight, eps=self._layer.eps)
        return max(
            ulp.relative_error(mbn.to_numpy(actual), truth) for actual, truth in zip(pullback(dy), exact, strict=False)
        )

    track_gradient.unit = "relative"

    def _step(self) -> oracle.Step:
        return oracle.train(*self._arguments, momentum=self._layer.momentum, eps=self._layer.eps)


def _error(actual: Array, exact: ulp.Exact) -> float:
    return round(ulp.error(mbn.to_numpy(actual), exact, "float32"), 2)
