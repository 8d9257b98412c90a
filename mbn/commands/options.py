"""Checks of the options of all commands, before any work is done.

A wrong option is an error of one line, without a traceback.
"""

import importlib.util
import math
import os
from pathlib import Path

import numpy as np

from mbn import contract
from mbn.commands import availability
from mbn.registry import get_backend, known_backends

DTYPES = ("float16", "bfloat16", "float32", "float64")


class UsageError(Exception):
    """The command cannot do its work with these options; the message gives the reason and a way out."""


def backends(specs: list[str] | None) -> list[str]:
    """Return the backends that the user named, each ``NAME`` or ``NAME:DEVICE``; by default every known one.

    Raises:
        BackendNotFoundError: one has an unknown name.
        UsageError: one has an empty device.
    """
    known = known_backends()
    for spec in specs or ():
        name, colon, device = spec.partition(":")
        if name not in known:
            get_backend(name)  # raises, with the known names and the closest one
        if colon and not device:
            raise UsageError(
                f"{spec!r} names no device: {name} alone is on its default device, and {name}:cpu, say, on another."
            )
    return specs or list(known)


def check_runnable(specs: list[str]) -> None:
    """Refuse backends, each ``NAME`` or ``NAME:DEVICE``, if none of them can run here.

    Raises:
        UsageError: none can; the message has the reasons.
    """
    reasons: dict[str, list[str]] = {}
    for spec in specs:
        refused = availability.refusal(spec)
        if refused is None:
            return
        reasons.setdefault(refused.why, []).append(spec)
    raise UsageError(
        " ".join(["no backend can run.", *(f"{', '.join(names)}: {why}" for why, names in reasons.items())])
    )


def on_device(spec: str, device: str | None) -> str:
    """Return a backend, ``NAME`` or ``NAME:DEVICE``, with the device of an option beside it.

    Raises:
        UsageError: each names a device, and the two differ.
    """
    name, _, given = spec.partition(":")
    if given and device and given != device:
        raise UsageError(f"{spec} is not on the device that --device names, {device}: leave one of them out.")
    return f"{name}:{device}" if device else spec


def check_plot(plot: Path | None) -> None:
    """Refuse a picture where matplotlib is not installed.

    Raises:
        UsageError: it is not.
    """
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib.")


def check_memory(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse an array that is larger than the machine's memory.

    Raises:
        UsageError: it is.
    """
    if not hasattr(os, "sysconf"):
        return
    needed, there = dtype.itemsize * math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        needed = min(needed, 10**300)  # no float is much larger
        raise UsageError(f"shape {shape} takes {needed:.2g} bytes in {dtype}, and this machine has {there:.2g}.")


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype of this name.

    Raises:
        UsageError: it is bfloat16, and NumPy has none here.
    """
    try:
        return contract.numpy_dtype(name)
    except TypeError as error:
        raise UsageError(str(error)) from error
