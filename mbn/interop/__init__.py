"""The conversion of layers from and to the batch norms of other packages.

The conventions differ, and a conversion translates each: the converted layer gives the same output in evaluation, and
trains in the same way. A :class:`mbn.ConversionWarning` names each property without an exact counterpart; a layer whose
output would change is refused. Each other package is imported by the module for it, when a conversion needs it.
"""

import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from mbn import checks
from mbn.contract import Backend
from mbn.layer import BatchNorm1d
from mbn.state.snapshot import Snapshot


class ConversionWarning(UserWarning):
    """A property of a layer has no exact counterpart in the converted one; the message names it."""


def from_torch(module: Any, *, backend: str | Backend | None = None, device: Any = None) -> BatchNorm1d:
    """Return a layer equivalent to a ``torch.nn.BatchNorm1d``, with copies of its tensors.

    Args:
        module: the module; or a ``torch.nn.SyncBatchNorm``, whose processes become the group of the layer. Its mode is
            taken over.
        backend, device: as of a new layer. By default the layer takes those of its first input. A layer of another
            backend than torch gets no group.

    The layer is float64 if any of the tensors is, else float32, which has all values of float16 and bfloat16; this
    holds for every package. A ``torch.nn.LazyBatchNorm1d`` before its first input gives a layer before its first input.

    Raises:
        ImportError: torch is not installed.
        TypeError: the module is something else.
        ValueError: the module is on the meta device.
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
    """
    return _layer(_converter("torch").read(module), backend, device, framework="torch")


def to_torch(bn: BatchNorm1d) -> Any:
    """Return a ``torch.nn.BatchNorm1d``, on the CPU, equivalent to a layer, with copies of its arrays.

    A layer with a group of ``torch.distributed`` gives a ``torch.nn.SyncBatchNorm`` with its processes, which trains
    on GPUs alone.

    Raises:
        ImportError: torch is not installed.
    """
    return _foreign(_converter("torch").write(_packed("to_torch", bn)))


def from_flax(
    module: Any, variables: Any = None, *, backend: str | Backend | None = None, device: Any = None
) -> BatchNorm1d:
    """Return a layer equivalent to a batch norm of flax, with copies of its arrays.

    Args:
        module: a ``flax.nnx.BatchNorm``; or a ``flax.linen.BatchNorm``, with ``variables``.
        variables: the collections ``params`` and ``batch_stats`` of a linen module, as far as it has them: those of
            this module alone, not of the model.
        backend, device: as in :func:`from_torch`.

    The layer keeps the biased variance, as flax does: ``correction=0``. It has the mode of the module; if the module
    takes its mode from each call, the layer is in evaluation mode. Its group is the module's ``axis_name``, and back.

    Raises:
        ImportError: flax is not installed.
        TypeError, ValueError: the module is something else, its channels are not on axis 1 or -1, or the variables are
            those of another module.
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
    """
    return _layer(_converter("flax").read(module, variables), backend, device)


def to_flax(bn: BatchNorm1d, *, linen: bool = False) -> Any:
    """Return a ``flax.nnx.BatchNorm`` equivalent to a layer, with copies of its arrays.

    Args:
        bn: the layer.
        linen: return a ``flax.linen.BatchNorm`` and its variables instead, ``(module, {"params", "batch_stats"})``.

    The module computes variances in two passes (``use_fast_variance=False``), which are exact for large means too.

    Raises:
        ImportError: flax is not installed.
        ValueError: the layer has no running statistics, without which flax has no layer; or it is float64, and JAX has
            no float64 here.
    """
    return _foreign(_converter("flax").write(_packed("to_flax", bn), linen=checks.flag("linen", linen)))


def from_keras(layer: Any, *, backend: str | Backend | None = None, device: Any = None) -> BatchNorm1d:
    """Return a layer equivalent to a ``keras.layers.BatchNormalization``, with copies of its weights.

    Args:
        layer: a layer that has been built; or its ``get_weights()``, which are taken for those of a layer with Keras's
            default arguments: gamma and beta, or neither, then moving mean and moving variance.
        backend, device: as in :func:`from_torch`.

    The layer keeps the biased variance, as Keras does: ``correction=0``. It is in evaluation mode, Keras's default for
    a call. A Keras layer that is not trainable becomes a frozen one, and a synchronized one has the group of all
    processes.

    Raises:
        ImportError: keras is not installed.
        TypeError, ValueError: the layer is something else, not built, or its channels are not on axis 1 or the last.
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
    """
    return _layer(_converter("keras").read(layer), backend, device)


def to_keras(bn: BatchNorm1d, *, ndim: int = 2) -> Any:
    """Return a built ``keras.layers.BatchNormalization``, equivalent to a layer, with copies of its arrays.

    Args:
        bn: the layer. Its mode is not taken over: Keras takes the mode with each call.
        ndim: the number of axes of inputs, 2 or 3, since Keras builds a layer for one number of axes.

    Its ``get_weights()`` are the weights in Keras's order.

    Raises:
        ImportError: keras is not installed.
        ValueError: the layer has no running statistics, without which Keras has no layer; or it is float64, and Keras's
            backend has no float64 here.
    """
    return _foreign(_converter("keras").write(_packed("to_keras", bn), ndim))


def from_onnx(
    source: Any, which: str | Iterable[Any], *, backend: str | Backend | None = None, device: Any = None
) -> BatchNorm1d:
    """Return a layer equivalent to a BatchNormalization node of ONNX.

    Args:
        source: an ``onnx.ModelProto``, with the name of a node, or of its output, for ``which``; or an
            ``onnx.NodeProto``, with its initializers (``onnx.TensorProto``) for ``which``.
        which: as above.
        backend, device: as in :func:`from_torch`.

    The layer keeps the biased variance, as ONNX does: ``correction=0``. Its mode is that of the node.

    Raises:
        ImportError: onnx is not installed.
        TypeError, ValueError: there is no such node, it is another operator, or a weight is neither an initializer nor
            a constant, or in a file that has not been loaded.
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
    """
    return _layer(_converter("onnx").read(source, which), backend, device)


def to_onnx(bn: BatchNorm1d, model: Any = None, node: str | None = None) -> Any:
    """Return a BatchNormalization node of ONNX equivalent to a layer in evaluation mode.

    Args:
        bn: the layer.
        model: an ``onnx.ModelProto``: a copy of it is returned in which ``node`` is this layer. The node keeps its
            mode, and its weights their types.
        node: the name of a BatchNormalization node of ``model``, or of its output.

    Returns:
        ``(node, initializers)``, from an input ``"x"`` to an output ``"y"``, for version 9 of the operators and later;
        or, given a model, a model.

    Raises:
        ImportError: onnx is not installed.
        TypeError, ValueError: there is no such node, or it has another number of channels; or ONNX cannot represent the
            layer, which has no running statistics, or an ``eps`` or ``momentum`` beyond float32.
    """
    return _foreign(_converter("onnx").write(_packed("to_onnx", bn), model, node))


def replace_batchnorm(model: Any, *, back: bool = False) -> Any:
    """Convert every ``torch.nn.BatchNorm1d`` of a torch model to an equivalent module of mbn, in place, or back.

    Each module stays the same object, with the same parameters and statistics, mode, hooks and names: an optimizer
    still trains its parameters, and a shared module stays shared. Its layer is ``module.layer``. Other modules stay as
    they are: ``BatchNorm2d`` or ``SyncBatchNorm``, and subclasses, which a warning names. Parameters and statistics in
    float16 or bfloat16 become float32, with a warning.

    Args:
        model: a ``torch.nn.Module``, perhaps itself a batch norm.
        back: convert modules of mbn to ``torch.nn.BatchNorm1d``, or to ``SyncBatchNorm`` where they have a group. A
            warning names each property that torch lacks.

    Returns:
        The model.

    Raises:
        ImportError: torch is not installed.
        TypeError, ValueError: ``model`` is no module, or a module in it has no counterpart: a ``LazyBatchNorm1d``
            before its first input; a module of mbn with ``axis=-1``. The model is unchanged.
    """
    _converter("torch")  # it raises if torch is not installed
    replacement = importlib.import_module("mbn.interop.replacement")
    if checks.flag("back", back):
        return _foreign(replacement.to_theirs(model, BatchNorm1d._snapshot))
    return _foreign(replacement.to_ours(model, _module))


def synchronize(model: Any, group: Any) -> Any:
    """Make the replicas of each layer of a model share the statistics of their batches in training, in place.

    Every process calls it on its replica of the model. The group is that of :attr:`mbn.BatchNorm1d.group`; None ends
    the sharing. Messages name each layer as the model does. Other batch norms of torch stay local, and a warning names
    them: :func:`replace_batchnorm` converts a ``BatchNorm1d``. A ``SyncBatchNorm`` stays as it is, since it has
    processes of its own.

    Args:
        model: a ``torch.nn.Module``, a ``flax.nnx.Module``, a layer, or a list, tuple or dict of these.
        group: as :attr:`mbn.BatchNorm1d.group`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model has no layer of mbn, or a layer cannot join the group. No layer has changed.
    """
    found = list(_layers(model, ""))
    joins = []
    for name, module in found:
        layer = _layer_of(module)
        if layer is None:
            continue
        member = layer._membership(group, name)
        joins.append(partial(layer._join, member) if module is layer else partial(setattr, module, "group", group))
    if not joins:
        raise ValueError(
            f"there is no layer of mbn in this {type(model).__name__}: synchronize takes a layer, a module of torch or "
            "flax, or a list, tuple or dict of these. mbn.replace_batchnorm(model) converts torch's batch norms."
        )
    for join in joins:
        join()
    others = [(name, type(module).__name__) for name, module in found if _layer_of(module) is None]
    return _foreign((model, [f"{name!r} stays local: it is torch's {kind}." for name, kind in others]))


def _layers(model: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Iterate over the layers of a model, flax's modules of layers, and torch's own batch norms, with their names."""
    torch_nn, nnx = sys.modules.get("torch.nn"), sys.modules.get("flax.nnx")
    if isinstance(model, BatchNorm1d):
        yield path, model
    elif isinstance(model, Mapping | list | tuple):
        for key, value in model.items() if isinstance(model, Mapping) else enumerate(model):
            yield from _layers(value, f"{path}.{key}" if path else str(key))
    elif torch_nn is not None and isinstance(model, torch_nn.Module):
        for name, module in model.named_modules(prefix=path):
            if isinstance(module, torch_nn.modules.batchnorm._BatchNorm) and type(module) is not torch_nn.SyncBatchNorm:
                yield name, _layer_of(module) or module
    elif nnx is not None and isinstance(model, nnx.Module):
        for parts, module in nnx.iter_modules(model):
            if _layer_of(module) is not None:
                yield ".".join(map(str, (path, *parts) if path else parts)), module


def _layer_of(module: Any) -> BatchNorm1d | None:
    """Return the layer of a module of mbn; None for another module."""
    layer = module if isinstance(module, BatchNorm1d) else getattr(getattr(module, "definition", module), "layer", None)
    return layer if isinstance(layer, BatchNorm1d) else None


def _converter(package: str) -> Any:
    """Return the module of mbn.interop for a package.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(f"mbn.interop.{package}")
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"{package} is not installed, so there are no layers of it to convert: pip install {package}."
        ) from error


def _layer(
    read: tuple[Snapshot, list[str]], backend: str | Backend | None, device: Any, framework: str | None = None
) -> BatchNorm1d:
    """Return the layer of a converter's snapshot, with its notes as warnings; its group is of the framework."""
    snapshot, notes = read
    layer = BatchNorm1d._from_snapshot(snapshot._replace(group=None), backend, device)
    is_foreign = framework is not None and layer.backend not in {None, framework}
    try:
        layer.group = None if is_foreign else snapshot.group
    except (TypeError, ImportError):
        is_foreign = True
    if is_foreign and snapshot.group is not None:
        notes.append(
            f"group={snapshot.group!r}: the layer is on {layer.backend}, which has no such groups, so it takes the "
            "statistics of its own batch. Set bn.group."
        )
    _warn(notes)
    return layer


def _packed(function: str, bn: Any) -> Snapshot:
    """Return the snapshot of a layer.

    Raises:
        TypeError: ``bn`` is no layer.
    """
    checks.layer(function, bn, BatchNorm1d)
    packed: Snapshot = bn._snapshot()
    return packed


def _module(snapshot: Snapshot, backend: str) -> Any:
    """Return a module of a backend's framework for a layer."""
    return BatchNorm1d._from_snapshot(snapshot, backend, None).as_module()


def _foreign(written: tuple[Any, list[str]]) -> Any:
    """Return a converter's result, with its notes as warnings."""
    result, notes = written
    _warn(notes)
    return result


def _warn(notes: list[str]) -> None:
    for note in notes:
        warnings.warn(note, ConversionWarning, stacklevel=4)
