"""The versions for a bug report. They come out even where something is broken, and no framework is imported."""

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
    "mlx",
    "flax",
    "keras",
    "onnx",
    "safetensors",
    "ml_dtypes",
)


def show(version: str, file: str) -> None:
    """Print the versions of Python, of mbn with its file, and of the frameworks, and the known backends."""
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
    except Exception as error:  # noqa: BLE001 - the metadata may be broken in any way
        return f"unreadable ({type(error).__name__}: {error})"


def _backends() -> str:
    try:
        return ", ".join(list_backends())
    except Exception as error:  # noqa: BLE001 - as above
        return f"unreadable ({type(error).__name__}: {error})"
