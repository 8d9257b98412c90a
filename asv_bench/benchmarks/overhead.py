"""The overhead of the frontend: a call on an input so small that it is mostly overhead."""

from timeit import repeat, timeit
from typing import Any

import mbn
from mbn.commands.bench.workloads import Workload
from mbn.contract import Batch, Settings
from mbn.step.forward import forward
from mbn.step.masks import Masking

from ._backends import NAMES, layer

SHAPE = (32, 64)
CALLS = 5
REPEATS = 1000


class Call:
    """The layer's call, less the backend's work in it."""

    params = (NAMES, ["train", "eval"])
    param_names = ("backend", "mode")
    unit = "seconds"

    def setup(self, name: str, mode: str) -> None:
        subject = layer(name, Workload(SHAPE))
        self._backend, self._wait = mbn.get_backend(name), subject.wait
        self._training = mode == "train"
        self._x = subject.x
        self._layer = subject.layer.train(self._training)
        self._params, self._state, self._settings = (
            self._layer.params,
            self._layer.state,
            Settings(None, "float32", 1e-5, 0.1, 1, 1),
        )
        self._call_layer()
        self._call_backend()

    def track_overhead(self, *_: str) -> float:
        # Taken in turns, both see the same machine; whatever disturbs a measurement only ever makes it longer.
        pairs = [
            (timeit(self._call_layer, number=CALLS), timeit(self._call_backend, number=CALLS)) for _ in range(REPEATS)
        ]
        layer, backend = map(min, zip(*pairs, strict=True))
        return (layer - backend) / CALLS

    def _call_layer(self) -> None:
        self._wait(self._layer(self._x))

    def _call_backend(self) -> None:
        state = self._state
        batch = Batch(self._x)
        kernels, batch = self._backend.kernels_for(
            "train" if self._training else "evaluate", batch, None, (self._params, state)
        )
        y, *_ = self._backend.forward(kernels, batch, self._params, state, self._settings, self._training, None, False)
        self._wait(y)


class Stage:
    """The stages of a call: the call contains the step, and the step contains the others.

    A step checks x; it makes sample weights of the mask, chooses the kernels and has them compute.
    """

    params = (
        ["numpy", "numba", "torch"],
        ["train", "eval"],
        ["plain", "masked"],
        ["call", "step", "weights", "choice", "kernels"],
    )
    param_names = ("backend", "mode", "input", "stage")
    unit = "seconds"

    def setup(self, name: str, mode: str, kind: str, stage: str) -> None:
        subject = layer(name, Workload(SHAPE, masked=kind == "masked"))
        if subject.device != "cpu" or (stage, kind) == ("weights", "plain"):
            raise NotImplementedError("this input has no such stage here")
        backend, x, training = mbn.get_backend(name), subject.x, mode == "train"
        bn = subject.layer.train(training)
        params, state, settings = bn.params, bn.state, bn._storage.settings  # noqa: SLF001
        masking = Masking.of(subject.masks.get("mask"), None, None)
        weights = None if masking is None else masking.combined(backend, x, settings)
        choice: Any = "train" if training else "evaluate", Batch(x, weights), None, (params, state)
        chosen = *backend.kernels_for(*choice), params, state, settings, training, None, False
        self._call = {
            "call": lambda: bn(x, **subject.masks),
            "step": lambda: forward(backend, x, params, state, settings, training=training, masking=masking),
            "weights": lambda: masking.combined(backend, x, settings),
            "choice": lambda: backend.kernels_for(*choice),
            "kernels": lambda: backend.forward(*chosen),
        }[stage]

    def track_time(self, *_: str) -> float:
        return min(repeat(self._call, number=CALLS, repeat=REPEATS)) / CALLS
