"""What every command asks of its options, and refuses before any work is done.

What a user can put right is told in one line, without a traceback.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np

from mbn.registry import get_backend, known_backends

DTYPES = ("float16", "bfloat16", "float32", "float64")


class UsageError(Exception):
    """The command cannot do what it was asked; the message says why and what would do."""


def backends(specs: list[str] | None) -> list[str]:
    """Return the backends that were asked for, each ``NAME`` or ``NAME:DEVICE``; by default every known one.

    Raises:
        BackendNotFoundError: one has an unknown name.
    """
    known = known_backends()
    for spec in specs or ():
        name = spec.partition(":")[0]
        if name not in known:
            get_backend(name)  # which says so, and what the name may have been meant to be
    return specs or list(known)


def on_device(spec: str, device: str | None) -> str:
    """Return a backend, ``NAME`` or ``NAME:DEVICE``, with the device of an option beside it.

    Raises:
        UsageError: both name a device, and not the same.
    """
    name, _, given = spec.partition(":")
    if given and device and given != device:
        message = f"{spec} is not on the device that --device names, {device}: leave one of them out."
        raise UsageError(message)
    return f"{name}:{device}" if device else spec


def check_files(json: Path | None, plot: Path | None) -> None:
    """Refuse files that could not be written in the end.

    Raises:
        UsageError: one cannot be written, or a plot cannot be drawn.
    """
    for path in (json, plot):
        if path and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            message = f"{path} cannot be written: it is a directory, or in none that exists and may be written to."
            raise UsageError(message)
    if plot and importlib.util.find_spec("matplotlib") is None:
        message = "--plot needs matplotlib, which is not installed: pip install matplotlib."
        raise UsageError(message)


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype of this name.

    Raises:
        UsageError: it is bfloat16, and NumPy has none here.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes  # noqa: PLC0415 - needed for this dtype alone
    except ModuleNotFoundError as error:
        message = "bfloat16 needs ml_dtypes, which is not installed: pip install ml_dtypes."
        raise UsageError(message) from error
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype
