"""The batch norms of torch: ``torch.nn.BatchNorm1d``, ``SyncBatchNorm`` and ``LazyBatchNorm1d``."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mbn.interop import conventions
from mbn.state.snapshot import Snapshot

_OF_MORE_AXES = nn.BatchNorm2d, nn.BatchNorm3d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d


def read(module: Any) -> tuple[Snapshot, list[str]]:
    """Return the layer of a module, and notes of the differences."""
    _check(module)
    arrays = {key: getattr(module, key) for key in ("weight", "bias", "running_mean", "running_var")}
    tensors = [tensor for tensor in arrays.values() if tensor is not None]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            "the module is on the meta device, where tensors have no values: call to_empty() and load a state_dict."
        )
    lazy = any(map(is_lazy, tensors))
    notes, momentum = [], module.momentum
    count, losses = _count(None if lazy else module.num_batches_tracked)
    notes += losses
    group = None
    if isinstance(module, nn.SyncBatchNorm):
        group = True if module.process_group is None else module.process_group
    if module.running_mean is not None and not module.track_running_stats:
        notes.append(
            "track_running_stats=False with running statistics, which are used in evaluation and not updated: the "
            "layer has momentum=0."
        )
        momentum = 0.0
    layer, converted = conventions.snapshot(
        arrays,
        _to_numpy,
        training=module.training,
        num_batches_tracked=count,
        num_features=None if lazy else tensors[0].numel() if tensors else module.num_features or None,
        eps=module.eps,
        momentum=momentum,
        axis=1,
        correction=1,
    )
    layer = layer._replace(group=group)
    return layer._replace(entries={}) if lazy else layer, notes + converted


def write(layer: Snapshot) -> tuple[nn.BatchNorm1d | nn.SyncBatchNorm, list[str]]:
    """Return the module of a layer, a SyncBatchNorm for one with a group, and notes of the differences."""
    arguments = layer.arguments
    notes = conventions.frozen(layer, "torch")
    if arguments["axis"] == -1:
        notes.append("axis=-1: torch has the channels on axis 1, so inputs of (N, L, C) have to be transposed for it.")
    if arguments["correction"] == 0 and arguments["track_running_stats"]:
        notes.append(
            "running_var, correction=0: torch averages unbiased variances. It gets the layer's average of biased ones "
            "as it is, so evaluation gives the same; training on averages unbiased ones into it."
        )
    if arguments["eps"] == 0:
        notes.append("eps=0: some versions of torch refuse to train with it.")
    kind, processes = _with_processes(layer.group)
    if layer.group is not None and kind is nn.BatchNorm1d:
        notes.append(f"group={layer.group!r}: torch shares statistics in groups of torch.distributed alone.")
    module = kind(
        arguments["num_features"],
        arguments["eps"],
        arguments["momentum"],
        arguments["affine"],
        arguments["track_running_stats"],
        dtype=getattr(torch, arguments["dtype"]),
        **processes,
    )
    if not arguments["bias"]:
        module.register_parameter("bias", None)  # not every version of torch has an argument for it
    module.load_state_dict({key: torch.tensor(value) for key, value in layer.entries.items()})
    return module.train(layer.training and not layer.frozen), notes


def _with_processes(group: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class of module for a group of torch, and the argument for its processes."""
    if group is True:
        return nn.SyncBatchNorm, {"process_group": None}
    if torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup):
        return nn.SyncBatchNorm, {"process_group": group}
    return nn.BatchNorm1d, {}


def _count(count: Tensor | None) -> tuple[int, list[str]]:
    """Return a count of batches, and a note if it is not an integer, as in averaged models."""
    if count is None:
        return 0, []
    if count.numel() != 1 or not 0 <= count.item() < 2**63:
        raise ValueError(
            f"num_batches_tracked is {count.tolist()}; it counts batches: one number, at least 0 and below 2**63. "
            "Give the module one, for example module.num_batches_tracked = torch.tensor(0)."
        )
    number = int(count)
    return number, [f"num_batches_tracked={count.item()}: a layer has an integer, {number}."] * (count != number)


def _check(module: Any) -> None:
    name = type(module).__name__
    if not isinstance(module, nn.BatchNorm1d | nn.LazyBatchNorm1d | nn.SyncBatchNorm):
        message = f"from_torch takes a torch.nn.BatchNorm1d, not {name}."
        if isinstance(module, _OF_MORE_AXES):
            message += (
                " A batch norm for more axes computes the same on inputs reshaped to (N, C, L): load its state_dict() "
                "into a layer, and reshape inputs."
            )
        raise TypeError(message)
    if type(module).forward not in (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward):
        raise TypeError(
            f"{name} has a forward of its own, and may compute something else: if it does not, load its state_dict() "
            "into a layer. A module of as_module() has its layer as .layer."
        )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """Return values in float64, which has the values of all other dtypes."""
    return np.zeros(0) if is_lazy(tensor) else tensor.detach().to("cpu", torch.float64).numpy()
