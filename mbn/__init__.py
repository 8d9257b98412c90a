"""Batch normalisation, once, for every Python array library."""

import importlib
from typing import TYPE_CHECKING, Any

from mbn import functional
from mbn.contract import Group
from mbn.convert import asarray, to_numpy
from mbn.functional import fold_linear
from mbn.layer import BatchNorm1d
from mbn.registry import (
    BackendNotFoundError,
    BackendUnavailableError,
    get_backend,
    list_backends,
    register_backend,
    set_default_backend,
    use_backend,
)
from mbn.replicas import Population, ReplicaError
from mbn.state import Params, State
from mbn.threads import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from mbn.interop import (
        ConversionWarning,
        from_flax,
        from_keras,
        from_onnx,
        from_torch,
        replace_batchnorm,
        synchronize,
        to_flax,
        to_keras,
        to_onnx,
        to_torch,
    )

__version__ = "0.1.0"

__all__ = [
    "BackendNotFoundError",
    "BackendUnavailableError",
    "BatchNorm1d",
    "ConversionWarning",
    "Group",
    "Params",
    "Population",
    "ReplicaError",
    "State",
    "asarray",
    "fold_linear",
    "from_flax",
    "from_keras",
    "from_onnx",
    "from_torch",
    "functional",
    "get_backend",
    "get_num_threads",
    "list_backends",
    "register_backend",
    "replace_batchnorm",
    "set_default_backend",
    "set_num_threads",
    "show_versions",
    "synchronize",
    "to_flax",
    "to_keras",
    "to_numpy",
    "to_onnx",
    "to_torch",
    "use_backend",
]


def show_versions() -> None:
    """Print the versions of Python, mbn and the frameworks, and the known backends; it never raises."""
    from mbn.commands import versions

    versions.show(__version__, __file__)


def __getattr__(name: str) -> Any:
    """Import mbn.interop, which converts other packages' layers, when one of its names is first used."""
    if name == "interop" or name in __all__:
        interop = importlib.import_module("mbn.interop")
        return interop if name == "interop" else getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "Any", "importlib"})
