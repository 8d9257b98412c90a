"""The files that a command writes in the end: refused before there is any work, and written whole or rescued."""

import os
import stat
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from mbn.state import files

_SIZE = 2**20
"""Bytes that have to be free for each file that is written in the end."""


class OutputError(Exception):
    """A file cannot be written; the message says why, and where its contents are if there are any."""


def check_files(outputs: Mapping[str, Path | None], given: Path | None = None) -> None:
    """Refuse files that could not be written in the end, and two that are one.

    Args:
        outputs: by option, the files to be written; None is none.
        given: the file that is read.

    Raises:
        OutputError: one cannot be written, or would be written over another.
    """
    paths = {option: path for option, path in outputs.items() if path}
    for option, path in paths.items():
        try:
            _check_file(path)
        except (OSError, ValueError) as error:
            raise OutputError(f"{option}: {_unwritable(path, error)}") from error
    for (first, one), (second, other) in combinations([*([("", given)] if given else []), *paths.items()], 2):
        if os.path.realpath(one) == os.path.realpath(other) or _is_same(one, other):
            if one is given:
                message = f"{second}: the output {other} would overwrite the input {one}: name another file."
            else:
                message = f"{second}: {other} is {one}, of {first}, and would be written over it: name another file."
            raise OutputError(message)


def write(outputs: Mapping[Path, bytes]) -> None:
    """Write files, each whole or not at all; where that fails after all, to the folder for temporary files.

    Raises:
        OutputError: one is elsewhere, or nowhere.
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
        raise OutputError(" ".join(messages))


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
        files.check_replaceable(path, _SIZE)
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
