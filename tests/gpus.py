"""The frameworks that find a GPU, and the stand-in for CuPy where there is none.

The framework is asked, not its backend: a broken backend must not cause a skip.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

STANDINS = Path(__file__).parent / "standins"
"""The folder of the stand-in: first on the path, it is imported as CuPy."""


def missing(framework: str) -> str | None:
    """Return why a framework can use no GPU here, or None where it can."""
    if find_spec(framework) is None:
        return f"{framework} is not installed"
    module = import_module(framework)
    try:
        found = _count(module, framework) > 0
    except RuntimeError as error:  # CUDA and JAX raise it if there is no GPU
        return f"{framework} finds no GPU: {error}"
    return None if found else f"{framework} finds no GPU"


def _count(module, framework):
    if framework == "jax":
        return len(module.devices("cuda"))
    return module.cuda.runtime.getDeviceCount() if framework == "cupy" else module.cuda.device_count()
