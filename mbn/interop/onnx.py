"""The batch norm of ONNX: a node, alone with its initializers or in a model."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mbn.interop import conventions, onnx_graph
from mbn.state.snapshot import Snapshot

_KEYS = onnx_graph.INPUTS[1:]
"""Torch's keys in the order of the node's inputs, after x."""
_FIELDS = {"epsilon": "f", "momentum": "f", "spatial": "i", "training_mode": "i"}
"""By attribute: the field of an onnx.AttributeProto that has its value, a float or an int."""
_EPS = 1e-5
_MOMENTUM = 0.9
_ROUNDING = 2.0**-24
"""The largest relative rounding error of an attribute, a float32."""


def read(source: Any, which: Any) -> tuple[Snapshot, list[str]]:
    """Return the layer of a node, and notes of the differences."""
    node, graph = _found(source, which)
    attributes = _attributes(node)
    if attributes.get("spatial", 1) != 1:
        raise ValueError("the node has spatial=0, so statistics for each position of a sequence, which no layer has.")
    training_mode, momentum = attributes.get("training_mode", 0), attributes.get("momentum", _MOMENTUM)
    if training_mode not in (0, 1):
        raise ValueError(f"training_mode is 0 or 1, not {training_mode}.")
    if not 0 <= momentum <= 1:  # NaN too
        raise ValueError(f"momentum is the weight of the old value and from 0 to 1, not {momentum}.")
    arrays = {key: onnx_graph.value(graph, name, key) for key, name in zip(_KEYS, node.input[1:], strict=True)}
    eps = np.float32(attributes.get("epsilon", _EPS))
    is_double = any(array.dtype == np.float64 for array in arrays.values())
    # Before version 14 of the operators, a node is in training mode if it has outputs for the statistics.
    outputs = [name for name in node.output if name]
    return conventions.snapshot(
        arrays,
        training=training_mode == 1 or len(outputs) > 1,
        num_features=arrays["running_mean"].size,
        eps=float(eps if is_double else str(eps)),
        momentum=conventions.complement(np.float32(momentum)),
        axis=1,
        correction=0,
    )


def write(layer: Snapshot, model: Any, name: str | None) -> tuple[Any, list[str]]:
    """Return the node of a layer and its initializers, or a model with that node; and notes of the differences."""
    if (model is None) != (name is None):
        raise TypeError("give both the model and the name of a node, to put the layer into a model, or neither.")
    arguments = layer.arguments
    momentum, notes = conventions.old_weight(layer, "ONNX", _MOMENTUM, _attribute)
    eps = float(_attribute("eps", arguments["eps"]))
    if eps != arguments["eps"] and arguments["dtype"] == "float64":
        notes.append(f"eps={arguments['eps']}: an attribute of ONNX is a float32, {eps}.")
    if arguments["axis"] == -1:
        notes.append("axis=-1: ONNX has the channels on axis 1, so inputs of (N, L, C) have to be transposed for it.")
    missing = [key for key in ("weight", "bias") if key not in layer.entries]
    if missing:
        notes.append(f"{' and '.join(missing)}: every node of ONNX has both, so the node gets ones and zeros.")
    notes += conventions.frozen(layer, "ONNX")
    shape, dtype = arguments["num_features"], arguments["dtype"]
    entries = {"weight": np.ones(shape, dtype), "bias": np.zeros(shape, dtype), **layer.entries}
    arrays = {key: entries[key] for key in _KEYS}
    attributes: dict[str, Any] = {"epsilon": eps, "momentum": float(momentum)}
    if model is not None and name is not None:
        result, rounded = onnx_graph.replaced(model, name, attributes, arrays)
        return result, notes + rounded
    node = helper.make_node(onnx_graph.OPERATOR, ["x", *_KEYS], ["y"], **attributes)
    return (node, [numpy_helper.from_array(array, key) for key, array in arrays.items()]), notes


def _found(source: Any, which: Any) -> tuple[onnx.NodeProto, onnx.GraphProto]:
    """Return a node, and a graph that has its weights."""
    if isinstance(source, onnx.ModelProto) and isinstance(which, str):
        return onnx_graph.find(source.graph, which), source.graph
    initializers: list[Any] = list(which) if isinstance(which, Iterable) else [None]
    if not isinstance(source, onnx.NodeProto) or not all(isinstance(each, onnx.TensorProto) for each in initializers):
        raise TypeError(
            "from_onnx takes an onnx.ModelProto and the name of a node, or an onnx.NodeProto and its initializers "
            f"(onnx.TensorProto), not {type(source).__name__} and {type(which).__name__}."
        )
    onnx_graph.check(source)
    return source, onnx.GraphProto(initializer=initializers)


def _attributes(node: onnx.NodeProto) -> dict[str, float]:
    """Return those attributes of a node that a layer knows."""
    found = {}
    for attribute in node.attribute:
        if attribute.name in _FIELDS:
            field = _FIELDS[attribute.name]
            if not attribute.HasField(field):
                raise TypeError(f"the attribute {attribute.name} is no {'float' if field == 'f' else 'int'}.")
            found[attribute.name] = getattr(attribute, field)
    return found


def _attribute(name: str, value: float) -> np.float32:
    """Return a number as an attribute holds it, in float32.

    Raises:
        ValueError: no float32 is near the number.
    """
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    if not abs(float(rounded) - value) <= _ROUNDING * abs(value):
        raise ValueError(
            f"{name} is kept as a float32 by ONNX, which has nothing near {value}: set bn.{name} to another."
        )
    return rounded
