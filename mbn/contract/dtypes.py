"""Dtypes by the names that all frameworks share."""

from collections.abc import Hashable
from typing import Any

import numpy as np

_DTYPE_NAMES: dict[type, dict[Hashable, str]] = {}
"""By the type of dtypes: their names. Dtypes of two frameworks may refuse to be compared, and torch.compile can hash no
dtype but Torch's."""


def dtype_name(dtype: Any) -> str:
    """Return the name that NumPy, CuPy, JAX and Torch share for a dtype: ``"float32"`` for ``torch.float32``.

    ``dtype`` is a dtype of any framework, a NumPy scalar type or a name.
    """
    names = _DTYPE_NAMES.get(type(dtype))
    name = None if names is None else names.get(dtype)
    if name is None:
        try:
            name = np.dtype(dtype).name
        except TypeError:  # torch.float32, array_api_strict.float32, "bfloat16": the name is the last word
            name = str(dtype).rpartition(".")[2]
        _DTYPE_NAMES.setdefault(type(dtype), {})[dtype] = name
    return name


def layer_dtype(dtype: str) -> str:
    """Return the dtype of the parameters and statistics that an input of ``dtype`` needs."""
    return "float64" if dtype == "float64" else "float32"


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype of a name.

    Raises:
        TypeError: the name is bfloat16, which NumPy has through ml_dtypes alone, and ml_dtypes is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise TypeError(
            "NumPy has bfloat16 through ml_dtypes, which is not installed: pip install ml_dtypes."
        ) from error
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype
