"""The contract of backends: arrays at the border, kernels that compute, and the hooks of its framework.

This package has to stay free of frameworks, and is all of mbn that a backend may import, with the number of mbn.threads
and the arithmetic of mbn.array_api. It imports nothing of mbn but that number.
"""

from typing import Any

from mbn.contract.arrays import Arrays
from mbn.contract.backend import Backend, Operation
from mbn.contract.dtypes import dtype_name, layer_dtype, numpy_dtype
from mbn.contract.integration import Held, Integration
from mbn.contract.kernels import Kernels
from mbn.contract.pullback import Pullback
from mbn.contract.replicas import Group, merged, summed
from mbn.contract.values import (
    Array,
    Batch,
    Capabilities,
    Moments,
    Params,
    Settings,
    State,
    Stats,
    counted,
    overlaps_itself,
    transposed,
)

__all__ = [
    "Array",
    "Arrays",
    "Backend",
    "Batch",
    "Capabilities",
    "Group",
    "Held",
    "Integration",
    "Kernels",
    "Moments",
    "Operation",
    "Params",
    "Pullback",
    "Settings",
    "State",
    "Stats",
    "counted",
    "dtype_name",
    "layer_dtype",
    "merged",
    "numpy_dtype",
    "overlaps_itself",
    "summed",
    "transposed",
]

_MOVED = {"Residuals": "Stats", "widened": "Batch.dtype"}
"""Names of version 1, and what there is in their place."""


def __getattr__(name: str) -> Any:
    """Say of a name of version 1 what has become of it."""
    if name in _MOVED:
        raise ImportError(
            f"{name} is of version 1 of mbn.contract; version 2 has {_MOVED[name]} in its place. "
            "See 'From version 1 of the contract' in docs/backends.md."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
