"""The conversion of the batch norms of a Torch model to ours, and back, in place.

References to a module or its tensors, from an optimizer, a hook or another module, must stay valid. So modules keep
their identity and change their class, as Torch's own lazy modules do. A module that cannot be converted is refused
before the first one changes.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mbn.interop.torch import read, write
from mbn.state.snapshot import Snapshot
from mbn_torch.module import BatchNorm1d

_THEIRS = ("num_features", "eps", "momentum")
"""The attributes that only Torch's modules have: ours read them from the layer."""
_OURS = ("layer", "_backend", "_adopt")
"""The attributes that only our modules have."""


def to_ours(model: Any, make: Callable[[Snapshot, str], BatchNorm1d]) -> tuple[torch.nn.Module, list[str]]:
    """Convert the batch norms in a model to ours; return the model, and notes of the differences.

    Args:
        model: the model.
        make: returns the module of a layer, given the layer and the name of a backend.
    """
    found, notes = [], []
    for name, module in _modules(model, torch.nn.BatchNorm1d | torch.nn.LazyBatchNorm1d):
        if isinstance(module, torch.nn.LazyBatchNorm1d):
            raise ValueError(f"{name} takes its number of channels from its first input: call the model on one before.")  # noqa: TRY004 - the type is right, after its first input
        if _is_plain(module, torch.nn.BatchNorm1d):
            layer, losses = read(_valued(module))
            found.append((module, make(layer, "torch"), getattr(torch, layer.arguments["dtype"])))
            notes += [f"{name}: {loss}" for loss in losses]
        elif not isinstance(module, BatchNorm1d):
            notes.append(f"{name} stays as it is, since {type(module).__name__} may do more than a BatchNorm1d.")
    for module, ours, dtype in found:
        # With track_running_stats=False ``read`` gives a momentum of 0; the module keeps both attributes as they are.
        ours.momentum = module.momentum
        _turn(module, BatchNorm1d, {key: vars(ours)[key] for key in _OURS}, without=_THEIRS)
        module.to(dtype)  # the layer takes the tensors of the module, too
    return model, notes


def to_theirs(model: Any, pack: Callable[[Any], Snapshot]) -> tuple[torch.nn.Module, list[str]]:
    """Convert our modules in a model to torch's; return the model, and notes of the differences.

    They become a ``torch.nn.BatchNorm1d`` each, or a ``SyncBatchNorm`` if they have a group.

    Args:
        model: the model.
        pack: returns the snapshot of a layer.
    """
    found, notes = [], []
    for name, module in _modules(model, BatchNorm1d):
        if not _is_plain(module, BatchNorm1d):
            notes.append(f"{name} stays as it is, since {type(module).__name__} may do more than a BatchNorm1d.")
            continue
        if module.layer.axis == -1:
            raise ValueError(f"{name} has axis=-1, and torch has the channels on axis 1: its output would differ.")
        theirs, losses = write(pack(_valued(module).layer)._replace(training=module.training))
        found.append((module, theirs))
        notes += [f"{name}: {loss}" for loss in losses]
    for module, theirs in found:
        attributes = {key: vars(theirs)[key] for key in (*_THEIRS, "training", "process_group") if key in vars(theirs)}
        _turn(module, type(theirs), attributes, without=_OURS)
    return model, notes


def _modules(model: Any, kinds: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the modules of some kinds in a model, each once, with a name for messages."""
    if not isinstance(model, torch.nn.Module):
        message = f"replace_batchnorm takes a torch.nn.Module, not {type(model).__name__}."
        if hasattr(model, "as_module"):
            message = (
                "replace_batchnorm takes a torch.nn.Module, not mbn.BatchNorm1d: as_module() makes one of a layer."
            )
        raise TypeError(message)
    return (
        (name or type(module).__name__, module) for name, module in model.named_modules() if isinstance(module, kinds)
    )


def _valued(module: Any) -> Any:
    """Return the module; of one on the meta device, a copy on the CPU with initial values."""
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    copied = copy.deepcopy(module).to_empty(device="cpu")
    copied.reset_parameters()
    return copied


def _is_plain(module: Any, kind: type) -> bool:
    """Tell whether a module is of exactly this class, and its forward that of the class."""
    return type(module) is kind and "forward" not in vars(module)


def _turn(module: Any, kind: type, attributes: dict[str, Any], *, without: tuple[str, ...]) -> None:
    """Give a module another class, with ``attributes`` and without those named in ``without``."""
    for key in without:
        del vars(module)[key]
    vars(module).update(attributes)
    module.__class__ = kind
