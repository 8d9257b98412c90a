"""The contract of backends: arrays at the border, kernels that compute, and the hooks of a framework.

This package imports no framework, and nothing of mbn but mbn.threads. A backend imports it, mbn.threads and
mbn.array_api, and nothing else of mbn.
"""

from typing import Any

from mbn.contract.arrays import Arrays
from mbn.contract.backend import Backend, Operation
from mbn.contract.dtypes import dtype_name, layer_dtype, numpy_dtype
from mbn.contract.integration import Held, Integration
from mbn.contract.kernels import Kernels
from mbn.contract.pullback import Pullback
from mbn.contract.replicas import LIVE, Group, Needs, Replicas, check_total, merged, summed
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
    "LIVE",
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
    "Needs",
    "Operation",
    "Params",
    "Pullback",
    "Replicas",
    "Settings",
    "State",
    "Stats",
    "check_total",
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
"""Names of version 1, and their replacements."""


def __getattr__(name: str) -> Any:
    """Refuse a name of version 1 with an error that names its replacement."""
    if name in _MOVED:
        raise ImportError(
            f"{name} is of version 1 of mbn.contract; version 2 has {_MOVED[name]} instead. "
            "See 'From version 1 of the contract' in docs/backends.md."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
