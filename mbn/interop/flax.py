"""The two batch norms of flax: an nnx module holds its arrays, a linen module gets them with each call."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from mbn.contract import dtype_name
from mbn.interop import conventions
from mbn.state.snapshot import Snapshot

_MOMENTUM = 0.99
_KEYS = {"weight": ("params", "scale"), "bias": ("params", "bias")} | {
    f"running_{name}": ("batch_stats", name) for name in ("mean", "var")
}
"""By torch's key: the collection and the name in flax."""


def read(module: Any, variables: Any) -> tuple[Snapshot, list[str]]:
    """Return the layer of a module, and of its variables if it is a linen one, and notes of the differences.

    If the module takes its mode from each call, the layer is in evaluation mode.
    """
    _check(module, variables)
    arrays: dict[str, Any] = _held(module) if isinstance(module, nnx.BatchNorm) else _given(module, variables)
    layer, notes = conventions.snapshot(
        arrays,
        training=module.use_running_average is False,
        num_features=np.size(arrays["running_mean"]),
        eps=float(module.epsilon),
        momentum=conventions.complement(module.momentum),
        axis=_axis(module.axis),
        correction=0,
    )
    if module.dtype is not None and dtype_name(module.dtype) != layer.arguments["dtype"]:
        notes.append(
            f"dtype={dtype_name(module.dtype)}: flax computes in it and gives outputs of it; those of the layer have "
            "the dtype of its input."
        )
    if module.axis_index_groups is not None:
        notes.append(
            f"axis_index_groups={module.axis_index_groups}: a layer shares its statistics along whole axes, and the "
            "converted one with no other device. Give the mesh an axis along each of these groups, and set bn.group."
        )
    elif module.axis_name is not None:
        layer = layer._replace(group=module.axis_name)
    return layer, notes


def write(layer: Snapshot, *, linen: bool) -> tuple[Any, list[str]]:
    """Return the module of a layer, with variables if it is a linen one, and notes of the differences."""
    arguments = layer.arguments
    momentum, notes = conventions.old_weight(layer, "flax", _MOMENTUM)
    arrays = {key: _own(layer.entries[key]) for key in _KEYS if key in layer.entries}
    names = layer.group if isinstance(layer.group, tuple) else (layer.group,)
    is_axis = all(isinstance(name, str) for name in names)
    if not (is_axis or layer.group is None):
        notes.append(f"group={layer.group!r}: flax shares statistics along a named axis alone, and gets none.")
    settings = {
        "use_running_average": layer.frozen or not layer.training,
        "axis": arguments["axis"],
        "momentum": momentum,
        "epsilon": arguments["eps"],
        "param_dtype": jnp.dtype(arguments["dtype"]),
        "use_scale": "weight" in arrays,
        "use_bias": "bias" in arrays,
        "axis_name": layer.group if is_axis else None,
        "use_fast_variance": False,  # fast variances lose their digits where means are large
    }
    notes += conventions.frozen(layer, "flax")
    return (_linen if linen else _nnx)(arguments["num_features"], settings, arrays), notes


def _nnx(num_features: int, settings: dict[str, Any], arrays: dict[str, jax.Array]) -> nnx.BatchNorm:
    module = nnx.BatchNorm(num_features, **settings, rngs=nnx.Rngs(0))
    for key, array in arrays.items():
        name = _KEYS[key][1]
        setattr(module, name, type(getattr(module, name))(array))  # a new variable, since the old one keeps its dtype
    return module


def _linen(
    _: int, settings: dict[str, Any], arrays: dict[str, jax.Array]
) -> tuple[linen.BatchNorm, dict[str, dict[str, jax.Array]]]:
    variables: dict[str, dict[str, jax.Array]] = {}
    for key, array in arrays.items():
        collection, name = _KEYS[key]
        variables.setdefault(collection, {})[name] = array
    return linen.BatchNorm(**settings), variables


def _check(module: Any, variables: Any) -> None:
    if not isinstance(module, nnx.BatchNorm | linen.BatchNorm):
        raise TypeError(f"from_flax takes a flax.nnx.BatchNorm or flax.linen.BatchNorm, not {type(module).__name__}.")
    if type(module).__call__ not in (nnx.BatchNorm.__call__, linen.BatchNorm.__call__):
        raise TypeError(
            f"{type(module).__name__} has a __call__ of its own, and may compute something else: make a layer yourself."
        )
    if isinstance(module, linen.BatchNorm) and not isinstance(variables, Mapping):
        raise TypeError(
            "a linen module has no arrays: give its variables, {'params': {...}, 'batch_stats': {...}}, as well."
        )
    if isinstance(module, nnx.BatchNorm) and variables is not None:
        raise TypeError("an nnx module has its own arrays: leave the variables out.")


def _held(module: nnx.BatchNorm) -> dict[str, jax.Array | None]:
    """Return the arrays of an nnx module, by torch's keys."""
    held = {key: jax.tree.leaves(getattr(module, name)) for key, (_, name) in _KEYS.items()}
    return {key: _valued(key, *leaves) if leaves else None for key, leaves in held.items()}


def _given(module: linen.BatchNorm, variables: Mapping[str, Any]) -> dict[str, jax.Array | None]:
    """Return the arrays of the variables of a linen module, by torch's keys."""
    absent = {key for key, used in (("weight", module.use_scale), ("bias", module.use_bias)) if not used}
    needed = [name for key, name in _KEYS.items() if key not in absent]
    variables = linen.meta.unbox(variables)
    given = [(collection, name) for collection in variables for name in variables[collection]]
    if set(given) != set(needed):
        described = [", ".join("/".join(name) for name in sorted(names)) for names in (given, needed)]
        raise ValueError(
            f"variables are {described[0] or 'empty'}; this module has {described[1]}: give those of it alone."
        )
    return {
        key: None if key in absent else _valued(key, variables[collection][name])
        for key, (collection, name) in _KEYS.items()
    }


def _valued(key: str, array: Any) -> Any:
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{key} has no values, it is a {type(array).__name__}: initialise the module.")
    return array


def _axis(axis: Any) -> int:
    axes = tuple(np.atleast_1d(axis).tolist())
    if axes not in ((1,), (-1,)):
        raise ValueError(f"axis is {axis}; a layer has its channels on axis 1 or -1: transpose or reshape inputs.")
    return axes[0]


def _own(array: np.ndarray) -> jax.Array:
    result = jnp.array(array)
    if result.dtype != array.dtype:
        raise ValueError(
            "the layer is float64, which takes the 64-bit mode of JAX: jax.config.update('jax_enable_x64', True). Or "
            "convert it: bn.to(dtype='float32')."
        )
    return result
