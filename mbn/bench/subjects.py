"""Who is measured: mbn's layer on a backend, as its user calls it, or a peer.

This module knows no framework: what one asks of its users around a batch norm, ``mbn_peers`` knows.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np

import mbn
import mbn_peers
from mbn.bench.workloads import Workload
from mbn.contract import Array, Backend, layer_dtype

Call: TypeAlias = Callable[[], Any]
"""One call of what is measured; when it returns, its outputs have been computed."""


class Subject(ABC):
    """A batch norm with its arrays.

    A constructor raises NotImplementedError where the workload is none for it; the message says why.
    """

    compiles_for_each_shape: ClassVar[bool] = False
    version: str
    """Of the framework."""
    device: str

    @abstractmethod
    def step(self, mode: str) -> Call:
        """Switch to a mode, and return its call: of outputs alone, or for ``"backward"`` of gradients too."""


class Layer(Subject):
    """mbn's layer on a backend, with its own gradients: ``vjp`` and a pullback."""

    def __init__(self, backend: Backend, workload: Workload, device: str | None) -> None:
        can = backend.capabilities
        if workload.dtype not in can.dtypes:
            message = f"{backend.name} takes no {workload.dtype} here"
            raise NotImplementedError(message)
        if workload.masked and not can.masks:
            message = f"{backend.name} takes no masks"
            raise NotImplementedError(message)
        if workload.transposed and not can.strided:
            message = f"{backend.name} has no arrays that are not contiguous"
            raise NotImplementedError(message)
        self.version, self.device = backend.version, device or can.devices[0]
        self._backend, self._workload, self._device = backend, workload, device
        dtype = layer_dtype(workload.dtype)
        self.layer = mbn.BatchNorm1d(
            workload.num_features, dtype=dtype, device=device, axis=workload.axis, backend=backend
        )
        self.x = self.own(workload.x())
        mask = workload.mask()
        self.masks: Mapping[str, Array] = {} if mask is None else {"mask": self.own(mask)}

    @cached_property
    def dy(self) -> Array:
        """The gradient of the output, which not every mode needs."""
        return self.own(self._workload.dy())

    def step(self, mode: str) -> Call:
        """Switch to a mode, and return its call."""
        layer, x, masks, wait = self.layer.train(mode != "eval"), self.x, self.masks, self.wait
        if mode != "backward":
            return lambda: wait(layer(x, **masks))
        dy = self.dy

        def backward() -> Any:
            y, pullback = layer.vjp(x, **masks)
            return wait((y, pullback(dy)))

        return backward

    def own(self, host: np.ndarray) -> Array:
        """Bring an array to where the layer is."""
        return self._backend.asarray(host, device=self._device)

    def wait(self, result: Any) -> Any:
        """Return the result of a call when it is there: its arrays can't reach the host before they are computed."""
        if not isinstance(self.x, np.ndarray):
            for array in arrays(result):
                self._backend.to_numpy(array[(slice(1),) * array.ndim])
        return result


def arrays(result: Any) -> list[Array]:
    """Return the arrays of a call's result, which are nested in tuples."""
    if isinstance(result, tuple):
        return [array for part in result for array in arrays(part)]
    return [] if result is None else [result]


def subject(spec: str, workload: Workload) -> Subject:
    """Return a subject with its arrays.

    Args:
        spec: a backend or a peer, ``NAME`` or ``NAME:DEVICE``.
        workload: what it is to normalise.

    Raises:
        NotImplementedError: the workload is none for it.
        BackendNotFoundError, BackendUnavailableError, ModuleNotFoundError, ValueError: it cannot run here.
    """
    name, _, device = spec.partition(":")
    if name in mbn_peers.PEERS:
        peer: Subject = _imported(mbn_peers.PEERS[name])(workload, device or None)
        return peer
    backend = mbn.get_backend(name)
    layer: Subject = _imported(mbn_peers.LAYERS.get(name, "mbn.bench.subjects:Layer"))(
        backend, workload, device or None
    )
    return layer


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
