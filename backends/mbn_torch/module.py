"""A layer as a module, which everything in Torch that knows ``torch.nn.BatchNorm1d`` has to take for one.

So its tensors are the layer's and are registered: optimizers, ``state_dict``, replication and export find them. Whoever
puts others in their places for a call, as ``torch.func.functional_call`` does, must see those used, and leave none.
"""

import copy
from collections.abc import Callable
from operator import is_not
from typing import Any, Self

import torch

from mbn.contract import Backend, Params, State

_HALVES = torch.float16, torch.bfloat16


class BatchNorm1d(torch.nn.BatchNorm1d):
    """A layer of mbn as a module of Torch, made by :meth:`mbn.BatchNorm1d.as_module`.

    Its parameters and buffers are the layer's tensors. In training, the running statistics are written to in place, all
    of them at once; a step that activation checkpointing repeats writes nothing. They follow what moves the module or
    loads into it. What is assigned to an attribute (``module.weight = ...``) stays the module's alone.

    ``to``, ``half`` and their kind move the module, but statistics and arithmetic need float32 even where inputs are
    halves: parameters and statistics never become halves, nor does the count of batches anything but an integer.

    Attributes:
        layer: the module's own layer, with its arguments and whether it is frozen.
    """

    def __init__(self, backend: Backend, layer: Any, adopt: Callable[[Params, State], None]) -> None:
        """Make the module of a layer; ``adopt`` has it, and whoever shares its tensors, hold other ones."""
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
        """The number of channels."""
        return self.layer.num_features

    @property
    def eps(self) -> float:
        """What is added to the variance."""
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
        """Return what the text of the layer says of it."""
        text = repr(self.layer).partition("(")[2][:-1]
        for name in ("affine", "track_running_stats"):  # which are the module's own
            text = text.replace(f"{name}={getattr(self.layer, name)}", f"{name}={getattr(self, name)}")
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled or copied, with tensors that may have been brought to another device."""
        super().__setstate__(state)
        self._share()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: _kept(tensor, fn(tensor)), recurse)
        self._share()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load what has this prefix; entries may take the places of tensors (``assign=True``)."""
        for name in (*Params._fields, *State._fields):
            value = state_dict.get(prefix + name)
            if isinstance(value, torch.Tensor) and value.dtype in _HALVES:
                state_dict[prefix + name] = value.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._share()

    def __prepare_scriptable__(self) -> Self:
        """Refuse ``torch.jit.script``, which would have to compile all of mbn."""
        raise RuntimeError(
            "torch.jit.script compiles no module of mbn. Have torch's own compiled, "
            "mbn.replace_batchnorm(model, back=True); or use torch.jit.trace or torch.export."
        )

    def _node(self, x: torch.fx.Proxy, **places: Any) -> Any:
        """Return the output in a graph of ``torch.fx``, of which this module is a leaf, as all of Torch's own are."""
        tracer: Any = x.tracer
        name = tracer.path_of_module(self)
        if not name:
            raise TypeError(
                "torch.fx traces what calls modules, and this one is a leaf of its graphs: put it into a model, "
                "torch.nn.Sequential(module) say."
            )
        given = {key: value for key, value in places.items() if value is not None}
        return tracer.create_proxy("call_module", name, (x,), given)

    def _trains(self) -> bool:
        return self.training and not self.layer._frozen  # noqa: SLF001 - the module is a part of the layer

    def _used(self, state: State) -> State:
        """Return the statistics that a call uses and moves, as torch's modules choose them.

        They can be taken away: ``track_running_stats = False`` leaves them alone in training, and where they are None,
        evaluation normalises by those of the batch.
        """
        if self._trains():
            return state if self.track_running_stats else State(None, None, None)
        return State(None, None, None) if state.running_mean is None and state.running_var is None else state

    def _without_count(self, state: State) -> tuple[Any, State]:
        """Return a layer and statistics for a call whose count of batches is none of a layer's: a floating one, say.

        Averaged models have such. The call counts on as torch's module does.
        """
        layer = self.layer
        if layer.momentum is None:
            layer = copy.copy(layer)
            layer.momentum = 1 / float(state.num_batches_tracked + 1)
        return layer, state._replace(num_batches_tracked=None)

    def _tensors(self) -> tuple[Params, State]:
        return Params(self.weight, self.bias), State(self.running_mean, self.running_var, self.num_batches_tracked)

    def _share(self) -> None:
        """Have the layer hold the module's tensors."""
        self._adopt(*self._tensors())


def _writable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor that training can write to: a copy of one that ``torch.inference_mode`` has made."""
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(mode=False):
        return tensor.clone()


def _kept(tensor: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Return ``moved``, which a module makes of ``tensor``, in a dtype that the layer can use."""
    if tensor.is_floating_point() and moved.dtype in _HALVES:
        return tensor.to(moved.device, torch.float32)
    return moved if tensor.is_floating_point() else moved.to(tensor.dtype)
