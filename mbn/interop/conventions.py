"""The conventions that several packages share, so that each is converted in the same way, with the same notes."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from mbn.contract import dtype_name
from mbn.state.snapshot import Snapshot

_DTYPES = ("float16", "bfloat16", "float32", "float64")

_ROUNDING = 2.0**-24
"""The largest relative rounding error of a float32."""


def complement(momentum: Any) -> float:
    """Return 1 - momentum, computed in decimal: the weight of the new value from that of the old one, or the reverse.

    So 0.99 gives 0.01 and 0.01 gives 0.99, in the precision of the number that is given; in binary neither is exact.

    Raises:
        ValueError: momentum is not finite.
    """
    if not np.isfinite(momentum):
        raise ValueError(f"momentum is the weight of the old value and is finite, not {momentum}.")
    return float(1 - Fraction(str(momentum)))


def snapshot(
    arrays: Mapping[str, Any],
    to_numpy: Callable[[Any], np.ndarray] = np.asarray,
    *,
    training: bool,
    frozen: bool = False,
    num_batches_tracked: int = 0,
    **arguments: Any,
) -> tuple[Snapshot, list[str]]:
    """Return a layer with another package's arrays, and notes of the differences.

    Args:
        arrays: weight, bias, running_mean and running_var, each (C,) or None for none.
        to_numpy: converts one to NumPy, in any dtype that has all its values.
        training, frozen, num_batches_tracked: as those of the layer.
        arguments: those of the layer, except those that the arrays determine.

    Raises:
        TypeError: an array is not made of floating-point numbers.
    """
    given = {key: value for key, value in arrays.items() if value is not None}
    dtypes = {key: dtype_name(value.dtype) for key, value in given.items()}
    for key, name in dtypes.items():
        if name not in _DTYPES:
            raise TypeError(f"{key} is {name}; there are layers from {', '.join(_DTYPES)}: convert it to one of these.")
    dtype = "float64" if "float64" in dtypes.values() else "float32"
    entries = {key: to_numpy(value).astype(dtype) for key, value in given.items()}
    notes = []
    others = [f"{key} ({name})" for key, name in dtypes.items() if name != dtype]
    if others:
        notes.append(f"{', '.join(others)}: the layer keeps all parameters and statistics in {dtype}.")
    if "bias" in entries and "weight" not in entries:
        entries = {"weight": np.ones_like(entries["bias"]), **entries}
        notes.append(
            "weight: the original has only a bias; the layer has a weight too, of ones, which training changes."
        )
    if "running_mean" in entries:
        entries["num_batches_tracked"] = np.asarray(num_batches_tracked, np.int64)
    arguments |= {
        "dtype": dtype,
        "affine": "weight" in entries,
        "bias": "bias" in entries or "weight" not in entries,
        "track_running_stats": "running_mean" in entries,
    }
    return Snapshot(arguments, entries, training=training, frozen=frozen), notes


def old_weight(
    layer: Snapshot, package: str, default: float, rounded: Callable[[str, float], Any] = lambda _, value: value
) -> tuple[float, list[str]]:
    """Return ``momentum`` as the weight of the old value, for a package that keeps the biased variance; and notes.

    Args:
        layer: the layer.
        package: the package's name, for messages.
        default: the package's default momentum, for a layer that has none.
        rounded: converts a number, given its name and value, to the package's precision.

    Raises:
        ValueError: the package always has running statistics, and the layer has none.
    """
    momentum, notes = layer.arguments["momentum"], []
    if not layer.arguments["track_running_stats"]:
        raise ValueError(
            f"{package} evaluates by running statistics, and with track_running_stats=False the layer has none: its "
            "output would differ. fit() a layer that has them."
        )
    old = default if momentum is None else rounded("momentum", complement(momentum))
    if momentum is None:
        notes.append(
            f"momentum=None, the average over all batches: {package} has none, and gets its own default, {default}."
        )
    elif abs(complement(old) - momentum) > _ROUNDING * abs(momentum):
        notes.append(f"momentum={momentum}: {package} weighs the old value, and keeps that as {old}.")
    if layer.arguments["correction"] == 1:
        notes.append(
            f"running_var, correction=1: {package} averages biased variances. It gets the layer's average of unbiased "
            "ones as it is, so evaluation gives the same; training on averages biased ones into it."
        )
    return old, notes


def frozen(layer: Snapshot, package: str) -> list[str]:
    """Return the notes for a frozen layer in a package without frozen layers."""
    return [f"freeze(): {package} has nothing like it; its evaluation mode does the same."] * layer.frozen
