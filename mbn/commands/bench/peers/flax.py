"""flax: an ``nnx.BatchNorm`` with its defaults, the fast variance too, in a compiled step as mbn's layer has."""

from typing import Any

import flax
import jax
import numpy as np
from flax import nnx

import mbn
from mbn.commands.bench.calls import Call
from mbn.commands.bench.peers.jax import JaxSubject, Steps
from mbn.commands.bench.workloads import FORWARD, Workload


class Module(JaxSubject):
    """``flax.nnx.BatchNorm``. Its channels are last, as in flax; the size of x is the same for every axis."""

    version = flax.__version__

    def __init__(self, workload: Workload, device: str | None) -> None:
        if workload.masked or workload.dtype == "float64":
            raise NotImplementedError("no step of nnx.BatchNorm with a mask or float64 is measured")
        self.workload, self._device = workload, device
        self.device = str(next(iter(self.x.devices())))
        module = nnx.BatchNorm(workload.num_features, dtype=self.x.dtype, rngs=nnx.Rngs(0))
        graph, *states = nnx.split(module, nnx.Param, ...)
        self._params, self._state = states

        def forward(params: Any, state: Any, x: Any, *, training: bool) -> tuple[Any, Any]:
            module = nnx.merge(graph, params, state, copy=True)  # by value: its variables are of this trace
            y = module(x, use_running_average=not training)
            return y, nnx.split(module, nnx.Param, ...)[-1]

        self._steps = Steps(forward, {})

    def call(self, mode: str) -> Call:
        dy = None if mode in FORWARD else self.dy
        return self._steps.call(mode, self._params, self._state, self.x, dy)

    def own(self, host: np.ndarray) -> jax.Array:
        array: jax.Array = mbn.asarray(np.moveaxis(host, self.workload.axis, -1), backend="jax", device=self._device)
        return array
