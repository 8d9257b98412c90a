"""A layer as a module of Torch, an instance of ``torch.nn.BatchNorm1d`` for all of Torch's tools.

The module registers the layer's tensors, so optimizers, ``state_dict``, replication and export find them. A tool that
replaces them for one call, as ``torch.func.functional_call`` does, has its own tensors used and gets none back.
"""

import copy
import sys
from collections.abc import Callable
from operator import is_not
from typing import Any, Self

import torch

from mbn.contract import Backend, Params, State

_CONVERSION: Any = vars(torch.nn.SyncBatchNorm)["convert_sync_batchnorm"].__func__.__code__
"""The code by which torch converts every subclass of its own batch norms; that asks for ``num_features`` first."""
_HALVES = torch.float16, torch.bfloat16


class BatchNorm1d(torch.nn.BatchNorm1d):
    """A layer of mbn as a module of Torch, made by :meth:`mbn.BatchNorm1d.as_module`.

    Its parameters and buffers are the layer's tensors. In training, the running statistics are updated in place, all of
    them in one operation; a step that activation checkpointing repeats updates none. Moves of the module and loads into
    it change the layer too. An assignment to an attribute (``module.weight = ...``) changes the module alone.

    ``to``, ``half`` and similar methods move the module, but parameters and statistics stay at least float32, which the
    arithmetic needs even where inputs are float16 or bfloat16, and the count of batches stays an integer.

    Attributes:
        layer: the module's own layer, with its arguments and whether it is frozen.
    """

    def __init__(self, backend: Backend, layer: Any, adopt: Callable[[Params, State], None]) -> None:
        """Make the module of a layer; ``adopt`` makes the layer, and all that share its tensors, hold other tensors."""
        torch.nn.Module.__init__(self)
        self.layer = layer
        self.training = layer.training
        self.affine, self.track_running_stats = layer.affine, layer.track_running_stats
        self._backend, self._adopt = backend, adopt
        for name, parameter in layer.params._asdict().items():
            self.register_parameter(name, parameter)
        for name, buffer in layer.state._asdict().items():
            self.register_buffer(name, _writable(buffer))
        self._share()

    @property
    def num_features(self) -> int:  # type: ignore[override]  # Torch's is an attribute
        """The number of channels.

        Raises:
            TypeError: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` asks for it.
        """
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _CONVERSION:  # noqa: SLF001 - see below
            raise TypeError(
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm would replace a module of mbn by one of torch, without "
                "its axis, correction and freeze(). Call mbn.synchronize(model, process_group) instead: it gives each "
                "module of mbn the group."
            )
        return self.layer.num_features

    @property
    def eps(self) -> float:
        """The number added to the variance."""
        return self.layer.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.layer.eps = value

    @property
    def momentum(self) -> float | None:
        """The weight of the new value in the running statistics, or None for the average over all batches."""
        return self.layer.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self.layer.momentum = value

    @property
    def group(self) -> Any:
        """The group whose replicas share the statistics of their batches; see :attr:`mbn.BatchNorm1d.group`."""
        return self.layer.group

    @group.setter
    def group(self, value: Any) -> None:
        self.layer.group = value

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002 - torch's name
        *,
        mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        sample_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalise ``input``; in training, update the running statistics.

        Args:
            input, mask, lengths, sample_weight: as in a call of :class:`mbn.BatchNorm1d`.

        Raises:
            TypeError, ValueError, RuntimeError: as there.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._node(input, mask=mask, lengths=lengths, sample_weight=sample_weight)
        params, before = self._tensors()
        if before.running_mean is None or not self.track_running_stats:
            before = self._used(before)
        layer, state, count = self.layer, before, before.num_batches_tracked
        if count is not None and (count.ndim or count.is_floating_point()):
            layer, state = self._without_count(before)
        y, after = layer.apply(
            params, state, input, training=self.training, mask=mask, lengths=lengths, sample_weight=sample_weight
        )
        if state is not before:
            after = after._replace(num_batches_tracked=count + 1 if self._trains() else count)
        if any(map(is_not, after, before)) and self._backend.stores(before, after):
            self._backend.write(before, after)
        return y

    def extra_repr(self) -> str:
        """Return the layer's arguments as text, with the module's own ``affine`` and ``track_running_stats``."""
        text = repr(self.layer).partition("(")[2][:-1]
        for name in ("affine", "track_running_stats"):
            text = text.replace(f"{name}={getattr(self.layer, name)}", f"{name}={getattr(self, name)}")
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied module, whose tensors may be on another device, and share them with its layer."""
        super().__setstate__(state)
        self._share()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: _kept(tensor, fn(tensor)), recurse)
        self._share()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the entries with this prefix, which replace the tensors if ``assign=True``."""
        for name in (*Params._fields, *State._fields):
            value = state_dict.get(prefix + name)
            if isinstance(value, torch.Tensor) and value.dtype in _HALVES:
                state_dict[prefix + name] = value.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._share()

    def __prepare_scriptable__(self) -> Self:
        """Reject ``torch.jit.script``, which would have to compile all of mbn."""
        raise RuntimeError(
            "torch.jit.script cannot compile a module of mbn. Compile Torch's own modules, "
            "mbn.replace_batchnorm(model, back=True); or use torch.jit.trace or torch.export."
        )

    def _node(self, x: torch.fx.Proxy, **masks: Any) -> Any:
        """Return the output as a node of a graph of ``torch.fx``: the module is a leaf, as Torch's own modules are."""
        tracer: Any = x.tracer
        name = tracer.path_of_module(self)
        if not name:
            raise TypeError(
                "torch.fx cannot trace this module by itself, since it is a leaf of graphs: put it into a model, "
                "torch.nn.Sequential(module) say."
            )
        given = {key: value for key, value in masks.items() if value is not None}
        return tracer.create_proxy("call_module", name, (x,), given)

    def _trains(self) -> bool:
        return self.training and not self.layer._frozen  # noqa: SLF001 - the module is a part of the layer

    def _used(self, state: State) -> State:
        """Return the running statistics that a call uses and updates, by the rules of Torch's modules.

        With ``track_running_stats = False`` training does not update them; where both are None, evaluation normalises
        by the statistics of the batch.
        """
        if self._trains():
            return state if self.track_running_stats else State(None, None, None)
        return State(None, None, None) if state.running_mean is None and state.running_var is None else state

    def _without_count(self, state: State) -> tuple[Any, State]:
        """Return a layer and statistics without ``num_batches_tracked``, for a call with a count that no layer takes.

        Averaged models (``torch.optim.swa_utils``) have a floating-point count, which the module increments as Torch's
        does.
        """
        layer = self.layer
        if layer.momentum is None:
            layer = copy.copy(layer)
            layer.momentum = 1 / float(state.num_batches_tracked + 1)
        return layer, state._replace(num_batches_tracked=None)

    def _tensors(self) -> tuple[Params, State]:
        return Params(self.weight, self.bias), State(self.running_mean, self.running_var, self.num_batches_tracked)

    def _share(self) -> None:
        """Make the layer hold the module's tensors."""
        self._adopt(*self._tensors())


def _writable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor that training can write to: a copy if ``tensor`` was made in ``torch.inference_mode``."""
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(mode=False):
        return tensor.clone()


def _kept(tensor: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Return ``moved``, the result of a conversion of ``tensor`` by a module, in a dtype that the layer can use."""
    if tensor.is_floating_point() and moved.dtype in _HALVES:
        return tensor.to(moved.device, torch.float32)
    return moved if tensor.is_floating_point() else moved.to(tensor.dtype)
