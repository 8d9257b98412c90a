"""The subjects of a benchmark: mbn's layer on a backend, called as a user calls it, or a peer.

This module knows no framework. The modules of the peers know how a user of their framework calls a batch norm.
"""

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

import mbn
from mbn.commands.bench import peers
from mbn.commands.bench.calls import Call, arrays
from mbn.commands.bench.clocks import Clock, HostClock
from mbn.commands.bench.workloads import FORWARD, PULLBACK, Workload
from mbn.contract import Array, Backend, layer_dtype


class Subject(ABC):
    """A batch norm with its arrays.

    A constructor raises NotImplementedError for a workload that the subject cannot take, with the reason.
    """

    compiles_for_each_shape: ClassVar[bool] = False
    clock: Clock = HostClock()
    """The clock for its calls, of the device that computes them."""
    version: str
    """Of the framework."""
    device: str
    workload: Workload

    @abstractmethod
    def own(self, host: np.ndarray) -> Array:
        """Bring an array to the subject's device."""

    @abstractmethod
    def call(self, mode: str) -> Call:
        """Switch to a mode and return its call, which may return before its outputs have been computed.

        The outputs are y, in mode ``"backward"`` the gradients too, and in mode ``"pullback"`` the gradients alone.
        """

    @cached_property
    def x(self) -> Array:
        """The input."""
        return self.own(self.workload.x())

    @cached_property
    def dy(self) -> Array:
        """The gradient of the output, which two modes need."""
        return self.own(self.workload.dy())

    def wait(self, result: Any) -> Any:
        """Wait until the result of a call has been computed, and return it."""
        return result

    def step(self, mode: str) -> Call:
        """Switch to a mode and return its call, which returns after its outputs have been computed."""
        call, wait = self.call(mode), self.wait
        return call if type(self).wait is Subject.wait else lambda: wait(call())

    def twin(self) -> Self:
        """Return a copy with an input and a gradient of its own, which shares all else with this subject."""
        other = copy.copy(self)
        for name in ("x", "dy"):
            vars(other).pop(name, None)
        return other


class Layer(Subject):
    """mbn's layer on a backend, with its own gradients: ``vjp`` and a pullback."""

    def __init__(self, backend: Backend, workload: Workload, device: str | None) -> None:
        can = backend.capabilities
        if workload.dtype not in can.dtypes:
            raise NotImplementedError(f"{backend.name} takes no {workload.dtype} here")
        if workload.masked and not can.masks:
            raise NotImplementedError(f"{backend.name} takes no masks")
        if workload.transposed and not can.strided:
            raise NotImplementedError(f"{backend.name} has no arrays that are not contiguous")
        self.version, self.device = backend.version, device or can.devices[0]
        self.workload = workload
        self._backend, self._device = backend, device
        dtype = layer_dtype(workload.dtype)
        self.layer = mbn.BatchNorm1d(
            workload.num_features, dtype=dtype, device=device, axis=workload.axis, backend=backend
        )
        mask = workload.mask()
        self.masks: Mapping[str, Array] = {} if mask is None else {"mask": self.own(mask)}

    def call(self, mode: str) -> Call:
        """Switch to a mode, and return its call."""
        layer, x, masks = self.layer.train(mode != "eval"), self.x, self.masks
        if mode in FORWARD:
            return lambda: layer(x, **masks)
        dy = self.dy
        if mode == PULLBACK:
            _, pullback = layer.vjp(x, **masks)
            return lambda: pullback(dy)

        def backward() -> Any:
            y, pullback = layer.vjp(x, **masks)
            return y, pullback(dy)

        return backward

    def own(self, host: np.ndarray) -> Array:
        """Bring an array to the layer's device."""
        return self._backend.asarray(host, device=self._device)

    def wait(self, result: Any) -> Any:
        """Wait until the result of a call has been computed: a value of each of its arrays is brought to the host."""
        if not isinstance(self.x, np.ndarray):
            for array in arrays(result):
                self._backend.to_numpy(array[(slice(1),) * array.ndim])
        return result


def subject(spec: str, workload: Workload) -> Subject:
    """Return a subject with its arrays.

    Args:
        spec: a backend or a peer, ``NAME`` or ``NAME:DEVICE``.
        workload: the input that it normalises.

    Raises:
        NotImplementedError: the subject cannot take the workload.
        BackendNotFoundError, BackendUnavailableError, ModuleNotFoundError, ValueError: it cannot run here.
    """
    name, _, device = spec.partition(":")
    if name in peers.PEERS:
        peer: Subject = _imported(peers.PEERS[name])(workload, device or None)
        return peer
    backend = mbn.get_backend(name)
    layer: Subject = _imported(peers.LAYERS.get(name, "mbn.commands.bench.subjects:Layer"))(
        backend, workload, device or None
    )
    return layer


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
