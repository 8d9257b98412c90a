"""flax: an ``nnx.BatchNorm`` as it is by default, with its fast variance, in a step that is compiled as mbn's is."""

from typing import Any, ClassVar

import flax
import jax
import numpy as np
from flax import nnx

import mbn
from mbn.bench.subjects import Call, Subject
from mbn.bench.workloads import Workload
from mbn_peers.jax import Steps


class Module(Subject):
    """``flax.nnx.BatchNorm``. Its channels are last, where flax has them; x has the same size whatever its axis."""

    version = flax.__version__
    compiles_for_each_shape: ClassVar[bool] = True

    def __init__(self, workload: Workload, device: str | None) -> None:
        if workload.masked or workload.dtype == "float64":
            message = "no step of nnx.BatchNorm with a mask or float64 is measured"
            raise NotImplementedError(message)
        self._workload, self._device = workload, device
        self._x = self._own(workload.x())
        self.device = str(next(iter(self._x.devices())))
        module = nnx.BatchNorm(workload.num_features, dtype=self._x.dtype, rngs=nnx.Rngs(0))
        graph, self._params, self._state = nnx.split(module, nnx.Param, ...)

        def forward(params: Any, state: Any, x: Any, *, training: bool) -> tuple[Any, Any]:
            module = nnx.merge(graph, params, state, copy=True)  # by value: its variables are of this trace
            y = module(x, use_running_average=not training)
            return y, nnx.split(module, nnx.Param, ...)[2]

        self._steps = Steps(forward, {})

    def step(self, mode: str) -> Call:
        dy = self._own(self._workload.dy()) if mode == "backward" else None
        return self._steps.call(mode, self._params, self._state, self._x, dy)

    def _own(self, host: np.ndarray) -> jax.Array:
        array: jax.Array = mbn.asarray(np.moveaxis(host, self._workload.axis, -1), backend="jax", device=self._device)
        return array
