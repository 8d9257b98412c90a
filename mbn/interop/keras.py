"""The batch norm of Keras, on any backend of Keras: arrays are exchanged as NumPy's alone."""

from typing import Any

import keras
import numpy as np

from mbn.interop import conventions
from mbn.state.snapshot import Snapshot

_MOMENTUM = 0.99
_KEYS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
"""By torch's key: the name in Keras, in the order of Keras's weights."""


def read(layer: Any) -> tuple[Snapshot, list[str]]:
    """Return the layer of a Keras layer in inference, and notes of the differences."""
    if isinstance(layer, list | tuple):
        return _read_weights(layer)
    _check(layer)
    axis = _axis(layer)
    arrays = {key: getattr(layer, name) for key, name in _KEYS.items()}
    result, notes = conventions.snapshot(
        arrays,
        _to_numpy,
        training=False,
        frozen=not layer.trainable,
        num_features=int(np.prod(layer.moving_mean.shape)),
        eps=layer.epsilon,
        momentum=conventions.complement(layer.momentum),
        axis=axis,
        correction=0,
    )
    return result._replace(group=True if layer.synchronized else None), notes + _notes(layer, result)


def write(layer: Snapshot, ndim: int) -> tuple[keras.layers.BatchNormalization, list[str]]:
    """Return the Keras layer of a layer, built for inputs of ``ndim`` axes, and notes of the differences."""
    arguments = layer.arguments
    if ndim not in (2, 3):
        raise ValueError(f"ndim is 2 for inputs of (N, C) or 3 for those with a length, not {ndim!r}.")
    momentum, notes = conventions.old_weight(layer, "Keras", _MOMENTUM)
    tensors = {name: _own(layer.entries[key]) for key, name in _KEYS.items() if key in layer.entries}
    result = keras.layers.BatchNormalization(
        axis=arguments["axis"],
        momentum=momentum,
        epsilon=arguments["eps"],
        center="beta" in tensors,
        scale="gamma" in tensors,
        dtype=arguments["dtype"],
        trainable=not layer.frozen,
        synchronized=layer.group is not None and _can_synchronize(),
    )
    shape = [None] * ndim
    shape[arguments["axis"]] = arguments["num_features"]
    result.build(tuple(shape))
    for name, tensor in tensors.items():
        getattr(result, name).assign(tensor)
    if layer.group is not None and not _can_synchronize():
        notes.append(f"group={layer.group!r}: Keras synchronizes layers on TensorFlow alone.")
    elif layer.group not in (None, True):
        notes.append(f"group={layer.group!r}: Keras synchronizes all replicas of its distribution strategy.")
    if layer.frozen and arguments["affine"]:
        notes.append("freeze(): trainable=False of Keras keeps gamma and beta, weight and bias, from training as well.")
    return result, notes


def _read_weights(weights: Any) -> tuple[Snapshot, list[str]]:
    """Return the layer of a Keras layer with default arguments and these weights."""
    arrays = [np.asarray(weight) for weight in weights]
    if len(arrays) not in (2, 4):
        raise ValueError(
            f"there are {len(arrays)} weights; a layer of Keras has gamma, beta, moving mean and moving variance, or "
            "the last two. Of another, give the layer itself."
        )
    return conventions.snapshot(
        dict(zip(list(_KEYS)[-len(arrays) :], arrays, strict=True)),
        training=False,
        num_features=arrays[-1].size,
        eps=1e-3,
        momentum=conventions.complement(_MOMENTUM),
        axis=-1,
        correction=0,
    )


def _check(layer: Any) -> None:
    kind, name = keras.layers.BatchNormalization, type(layer).__name__
    if not isinstance(layer, kind):
        raise TypeError(f"from_keras takes a keras.layers.BatchNormalization or its get_weights(), not {name}.")
    if type(layer).call is not kind.call:
        raise TypeError(
            f"{name} has a call of its own, and may compute something else: if it does not, give its get_weights()."
        )
    if not layer.built:
        raise ValueError("the layer has no weights yet: call it, or build it for a shape, layer.build((None, C)).")


def _axis(layer: keras.layers.BatchNormalization) -> int:
    """Return the axis of the channels as 1 or -1; Keras may count it from either end."""
    ndim = layer.input_spec.ndim
    axis: int = layer.axis if layer.axis == -1 else layer.axis % ndim
    if axis in (1, -1):
        return axis
    if axis == ndim - 1:
        return -1
    raise ValueError(
        f"axis is {layer.axis} of {ndim}; a layer has its channels on axis 1 or the last: transpose or reshape inputs."
    )


def _notes(layer: keras.layers.BatchNormalization, result: Snapshot) -> list[str]:
    """Return notes of the properties of a Keras layer that the result lacks."""
    notes = []
    if layer.compute_dtype != result.arguments["dtype"]:
        notes.append(
            f"dtype policy {layer.dtype_policy.name}: Keras takes inputs and gives outputs of {layer.compute_dtype}; "
            "those of the layer have the dtype of its input."
        )
    if getattr(layer, "renorm", False):  # not every version of Keras has it
        notes.append("renorm: the layer trains by plain batch normalisation.")
    notes += [
        f"{name}: the layer has none."
        for name in ("gamma_regularizer", "beta_regularizer", "gamma_constraint", "beta_constraint")
        if getattr(layer, name) is not None
    ]
    if result.frozen and result.arguments["affine"]:
        notes.append("trainable=False: the layer is frozen, which holds its statistics and not weight and bias.")
    return notes


def _can_synchronize() -> bool:
    return bool(keras.backend.backend() == "tensorflow")


def _own(array: np.ndarray) -> Any:
    """Return an array of Keras's backend."""
    tensor = keras.ops.convert_to_tensor(array)
    if keras.backend.standardize_dtype(tensor.dtype) != array.dtype:
        raise ValueError(
            f"the layer is float64, which Keras does not have here, on {keras.backend.backend()} (on JAX enable it: "
            "jax.config.update('jax_enable_x64', True)). Or convert the layer: bn.to(dtype='float32')."
        )
    return tensor


def _to_numpy(variable: Any) -> np.ndarray:
    array: np.ndarray = keras.ops.convert_to_numpy(variable.value)  # the variable itself is no array to NumPy 2
    return array
