"""Batch normalisation, once, for every Python array library."""

from mbn import functional
from mbn.convert import asarray, to_numpy
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
from mbn.state import Params, State

__version__ = "0.1.0"

__all__ = [
    "BackendNotFoundError",
    "BackendUnavailableError",
    "BatchNorm1d",
    "Params",
    "State",
    "asarray",
    "functional",
    "get_backend",
    "list_backends",
    "register_backend",
    "set_default_backend",
    "show_versions",
    "to_numpy",
    "use_backend",
]


def show_versions() -> None:
    """Print the versions of Python, mbn and the frameworks, and the known backends; it never raises."""
    from mbn import versions  # noqa: PLC0415 - importlib.metadata is not needed to normalise

    versions.show_versions()
