"""A batch norm within a graph of ONNX: its node, its weights, and their replacement.

The other nodes of the graph must compute as before, so only a copy of the model is changed, and no initializer that
other nodes share.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

OPERATOR = "BatchNormalization"

INPUTS = ("x", "weight", "bias", "running_mean", "running_var")
"""The inputs of the node: x and torch's keys."""
_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
_INDEPENDENT = 4
"""The first version of the format in which an initializer need not be an input of the graph as well."""


def find(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """Return the batch norm of a name, or else the one whose output has that name.

    Raises:
        ValueError: no node has the name, or several have it, or the node is no batch norm.
    """
    named = [node for node in graph.node if name in node.output[:1]]
    named = [node for node in graph.node if name and node.name == name] or named
    if len(named) != 1:
        known = [_called(node) for node in graph.node if node.op_type == OPERATOR]
        raise ValueError(
            f"the model has {len(named)} nodes named {name!r}; its batch norms are: {', '.join(known) or 'none'}."
        )
    node: onnx.NodeProto = named[0]
    check(node)
    return node


def check(node: onnx.NodeProto) -> None:
    """Check that a node is a batch norm, and has its inputs.

    Raises:
        ValueError: the node is another one, or lacks inputs.
    """
    if node.op_type != OPERATOR or node.domain not in {"", "ai.onnx"}:
        raise ValueError(f"the node is a {node.domain and f'{node.domain}.'}{node.op_type}, not a {OPERATOR}.")
    if len(node.input) != len(INPUTS):
        raise ValueError(f"the node has {len(node.input)} inputs; a batch norm has {len(INPUTS)}: {', '.join(INPUTS)}.")


def value(graph: onnx.GraphProto, name: str, key: str) -> np.ndarray:
    """Return the constant value of a name in the graph; messages call it ``key``.

    Raises:
        ValueError: the value is computed by the graph, or is in another file.
    """
    tensor = _source(graph, name, key)
    if uses_external_data(tensor):
        raise ValueError(
            f"{key} is in another file than the model: load it too, by onnx.load(path) or "
            "onnx.load_external_data_for_model(model, folder)."
        )
    return _to_array(tensor, key)


def replaced(
    model: Any, name: str, attributes: Mapping[str, float], arrays: Mapping[str, np.ndarray]
) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy of a model whose node has these attributes and weights, and notes of the rounded weights.

    Mode and outputs of the node and the types of its weights stay, since other nodes depend on them.

    Args:
        model: the model.
        name: the name of the node, or of its output.
        attributes: the new attributes of the node.
        arrays: its new weights, in the order of its inputs.

    Raises:
        TypeError: ``model`` is no model.
        ValueError: there is no such node, its weights have another shape, or their type cannot hold the new ones.
    """
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model is an onnx.ModelProto, not {type(model).__name__}.")
    result, notes = onnx.ModelProto(), []
    result.CopyFrom(model)
    node = find(result.graph, name)
    for index, (key, array) in enumerate(arrays.items(), start=1):
        old = _source(result.graph, node.input[index], key)
        if list(old.dims) != list(array.shape):
            raise ValueError(f"{key} has shape {tuple(old.dims)} in the model and {array.shape} in the layer.")
        _check_type(old, key)
        tensor = _like(old, array, key)
        if not np.array_equal(numpy_helper.to_array(tensor).astype(array.dtype), array):
            notes.append(f"{key}: it is rounded to {_type_name(tensor)}, its type in the model.")
        _put(result, node, index, tensor)
    others = [attribute for attribute in node.attribute if attribute.name not in attributes]
    new = [helper.make_attribute(name, number) for name, number in attributes.items()]
    del node.attribute[:]
    node.attribute.extend([*others, *new])
    return result, notes


def _source(graph: onnx.GraphProto, name: str, key: str) -> onnx.TensorProto:
    """Return the initializer or constant that a name refers to, perhaps through Identity nodes."""
    initializers: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {output: node for node in graph.node for output in node.output}
    given, seen = name, set()
    while name not in initializers:
        node = nodes.get(name)
        if node is not None and node.op_type == "Identity" and len(node.input) == 1 and name not in seen:
            seen.add(name)
            name = node.input[0]
            continue
        if node is not None and node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.HasField("t"):
                    tensor: onnx.TensorProto = attribute.t
                    return tensor
        raise ValueError(f"{key} is {given!r}, and there is neither an initializer nor a constant tensor of that name.")
    return initializers[name]


def _to_array(tensor: onnx.TensorProto, key: str) -> np.ndarray:
    """Return the values of a tensor; messages call it ``key``.

    Raises:
        TypeError: the tensor has a type that no layer takes.
        ValueError: the tensor is damaged.
    """
    _check_type(tensor, key)
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:  # more or fewer bytes than its shape needs
        raise ValueError(f"{key} is damaged: {error}") from error


def _check_type(tensor: onnx.TensorProto, key: str) -> None:
    if tensor.data_type not in _TYPES:
        raise TypeError(
            f"{key} is {_type_name(tensor)}; there are layers from {', '.join(map(_named, _TYPES))}: convert it."
        )


def _like(old: onnx.TensorProto, array: np.ndarray, key: str) -> onnx.TensorProto:
    """Return a tensor with the type of another one and the values of an array."""
    with np.errstate(over="ignore"):
        tensor = helper.make_tensor(key, old.data_type, array.shape, array)
    if not np.array_equal(np.isfinite(numpy_helper.to_array(tensor)), np.isfinite(array)):
        raise ValueError(
            f"{key} is {_type_name(old)} in the model, which cannot hold {abs(array).max()}: convert the model."
        )
    return tensor


def _type_name(tensor: onnx.TensorProto) -> str:
    known = tensor.data_type in TensorProto.DataType.values()
    return _named(tensor.data_type) if known else f"of the unknown type {tensor.data_type}"


def _named(data_type: int) -> str:
    name: str = TensorProto.DataType.Name(data_type)
    return name.lower()


def _called(node: onnx.NodeProto) -> str:
    """Return the name of a node, or that of its output."""
    return node.name or next(iter(node.output), "one without a name")


def _put(model: onnx.ModelProto, node: onnx.NodeProto, index: int, tensor: onnx.TensorProto) -> None:
    """Make a tensor an input of a node: it replaces the initializer if only this node uses that, or is a new one."""
    graph, old = model.graph, node.input[index]
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    if old in initializers and list(_used(graph)).count(old) == 1:
        tensor.name = old
        initializers[old].CopyFrom(tensor)
        return
    stem, taken = f"{_called(node)}.{tensor.name}", {*_used(graph), *_defined(graph)}
    tensor.name = next(name for name in (stem, *(f"{stem}_{i}" for i in range(len(taken)))) if name not in taken)
    node.input[index] = tensor.name
    graph.initializer.append(tensor)
    if model.ir_version < _INDEPENDENT:
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _used(graph: onnx.GraphProto) -> Iterator[str]:
    """Iterate over the names that a graph and the graphs within it read."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
    for inner in _inner(graph):
        yield from _used(inner)


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    """Iterate over the names that a graph and the graphs within it define."""
    yield from (named.name for group in (graph.input, graph.initializer) for named in group)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        yield from node.output
    for inner in _inner(graph):
        yield from _defined(inner)


def _inner(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Iterate over the graphs that are attributes of a graph's nodes."""
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
