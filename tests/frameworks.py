"""The packages that a test may need besides NumPy: a marker for each, and a skip where it is not installed.

A test needs a framework if its module imports it, if the test passes its name to ``importorskip``, if one of its
parameters is its name (``torch``, ``torch.nn``), or if a marker says so.
"""

import importlib
import re
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import pytest

FRAMEWORKS = (
    *("numba", "torch", "jax", "mlx", "triton", "flax", "keras", "onnx", "matplotlib", "mpi4py", "strict"),
    *("dask", "distributed", "h5py", "joblib", "ndonnx", "ray", "sparse", "xarray", "zarr"),
)
"""``strict`` is the plug-in tests/plugin. CuPy is none: a stand-in compiles its kernels for the host."""
_MODULES = {"strict": "mbn_strict"}


def is_installed(framework: str) -> bool:
    """Tell whether a framework can be imported."""
    return find_spec(_MODULES.get(framework, framework)) is not None


def mark(item: pytest.Item) -> None:
    """Give a test the markers of the frameworks that it needs; skip it where one of them is missing."""
    imported = {
        value.__name__.partition(".")[0]
        for value in vars(getattr(item, "module", None) or object).values()
        if isinstance(value, ModuleType)
    }
    code = getattr(getattr(item, "function", None), "__code__", None)
    optional = code.co_consts if code and "importorskip" in code.co_names else ()
    for framework in FRAMEWORKS:
        if framework in imported | _parameters(item) or framework in optional:
            item.add_marker(framework)
    for framework in FRAMEWORKS:
        if item.get_closest_marker(framework) and not is_installed(framework):
            item.add_marker(pytest.mark.skip(reason=f"{framework} is not installed"))


def _parameters(item: pytest.Item) -> set[str]:
    """Return the packages that a test's parameters name: ``torch`` of "torch.nn", "torch:cuda" and "mbn_torch"."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    given = (part for value in values for part in (value if isinstance(value, tuple) else (value,)))
    return {re.split("[.:]", part)[0].removeprefix("mbn_") for part in given if isinstance(part, str)}


class _Missing:
    """A framework that is not installed: a test that uses it is skipped, and the other tests of its file run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        pytest.skip(f"{self._name} is not installed")


def optional(name: str) -> Any:
    """Return a framework that some tests of a file use, or a stand-in that skips those tests."""
    return importlib.import_module(name) if is_installed(name) else _Missing(name)
