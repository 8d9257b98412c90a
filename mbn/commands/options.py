"""What every command asks of its options, and refuses before any work is done.

What a user can put right is told in one line, without a traceback.
"""

import importlib.util
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from mbn import contract
from mbn.commands import availability
from mbn.registry import get_backend, known_backends
from mbn.state import files

_ROOM = 2**20
"""Bytes that have to be free for each file that is written in the end."""
DTYPES = ("float16", "bfloat16", "float32", "float64")


class UsageError(Exception):
    """The command cannot do what it was asked; the message says why and what would do."""


def backends(specs: list[str] | None) -> list[str]:
    """Return the backends that were asked for, each ``NAME`` or ``NAME:DEVICE``; by default every known one.

    Raises:
        BackendNotFoundError: one has an unknown name.
        UsageError: one has an empty device.
    """
    known = known_backends()
    for spec in specs or ():
        name, colon, device = spec.partition(":")
        if name not in known:
            get_backend(name)  # which says so, and what the name may have been meant to be
        if colon and not device:
            message = (
                f"{spec!r} names no device: {name} alone is on its default device, and {name}:cpu, say, on another."
            )
            raise UsageError(message)
    return specs or list(known)


def check_runnable(specs: list[str]) -> None:
    """Refuse backends, each ``NAME`` or ``NAME:DEVICE``, of which none can run here, before there is work for them.

    Raises:
        UsageError: none can.
    """
    reasons: dict[str, list[str]] = {}
    for spec in specs:
        refused = availability.refusal(spec)
        if refused is None:
            return
        reasons.setdefault(refused.why, []).append(spec)
    message = " ".join(["no backend can run.", *(f"{', '.join(who)}: {why}" for why, who in reasons.items())])
    raise UsageError(message)


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


def check_files(outputs: Mapping[str, Path | None], given: Path | None = None) -> None:
    """Refuse files that could not be written in the end, and two that are one.

    Args:
        outputs: by option, the files to be written; None is none.
        given: the file that is read.

    Raises:
        UsageError: one cannot be written, or would be written over another.
    """
    paths = {option: path for option, path in outputs.items() if path}
    for option, path in paths.items():
        try:
            _check_file(path)
        except (OSError, ValueError) as error:
            message = f"{option}: {_unwritable(path, error)}"
            raise UsageError(message) from error
    for (first, one), (second, other) in combinations([*([("", given)] if given else []), *paths.items()], 2):
        if os.path.realpath(one) == os.path.realpath(other) or _is_same(one, other):
            if one is given:
                message = f"{second}: the output {other} would overwrite the input {one}: name another file."
            else:
                message = f"{second}: {other} is {one}, of {first}, and would be written over it: name another file."
            raise UsageError(message)


def check_plot(plot: Path | None) -> None:
    """Refuse a picture that nothing here can draw.

    Raises:
        UsageError: there is no matplotlib.
    """
    if plot and importlib.util.find_spec("matplotlib") is None:
        message = "--plot needs matplotlib, which is not installed: pip install matplotlib."
        raise UsageError(message)


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
        message = f"shape {shape} takes {needed:.2g} bytes in {dtype}, and this machine has {there:.2g}."
        raise UsageError(message)


def write(outputs: Mapping[Path, bytes]) -> None:
    """Write files, each whole or not at all; where that fails after all, to the folder for temporary files.

    Raises:
        UsageError: one is elsewhere, or nowhere.
    """
    messages = []
    for path, data in outputs.items():
        try:
            if _is_stream(path):
                path.write_bytes(data)
            else:
                files.replace(path, data)
        except OSError as error:
            messages.append(f"{_unwritable(path, error)} {_rescue(data, path.suffix)}")
    if messages:
        raise UsageError(" ".join(messages))


def _rescue(data: bytes, suffix: str) -> str:
    """Write to the folder for temporary files, and say where."""
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="mbn-", suffix=suffix, delete=False) as file:
            file.write(data)
    except OSError as error:
        return f"Nor can a temporary file: {error.strerror}."
    return f"What it should hold is in {file.name}."


def _check_file(path: Path) -> None:
    if not _is_stream(path):
        files.check_replaceable(path, _ROOM)
    elif not os.access(path, os.W_OK):
        raise PermissionError(None, "Permission denied")


def _is_stream(path: Path) -> bool:
    """Tell whether a path names what is written to as it is: a terminal, a pipe, /dev/null."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _is_same(one: Path, other: Path) -> bool:
    """Tell whether two paths name one file, as hard links do."""
    try:
        return one.samefile(other) and not _is_stream(one)
    except OSError:
        return False


def _unwritable(path: Path, error: Exception) -> str:
    return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype of this name.

    Raises:
        UsageError: it is bfloat16, and NumPy has none here.
    """
    try:
        return contract.numpy_dtype(name)
    except TypeError as error:
        raise UsageError(str(error)) from error
