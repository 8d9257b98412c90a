"""What runs here, for bug reports: it must never raise, and never import a framework, which can take seconds."""

import platform
import sys
from importlib import metadata

from mbn.registry import list_backends

_DISTRIBUTIONS = (
    "numpy",
    "torch",
    "jax",
    "jaxlib",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba",
    "flax",
    "keras",
    "onnx",
    "safetensors",
    "ml_dtypes",
)


def show(version: str, file: str) -> None:
    """Print the versions of Python, of mbn, which is in a file, and of the frameworks, and the known backends."""
    print(f"python: {sys.version.split()[0]} ({platform.platform()})")
    print(f"mbn: {version} ({file})")
    for distribution in _DISTRIBUTIONS:
        print(f"{distribution}: {_version(distribution)}")
    print(f"backends: {_backends()}")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # noqa: BLE001 - a bug report must come out even where the metadata are broken
        return f"unreadable ({type(error).__name__}: {error})"


def _backends() -> str:
    try:
        return ", ".join(list_backends())
    except Exception as error:  # noqa: BLE001 - as above
        return f"unreadable ({type(error).__name__}: {error})"
