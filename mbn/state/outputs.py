"""The files that a command writes at its end: checked before its work begins, then written atomically.

A file that cannot be written after all goes to the folder for temporary files, so that no result is lost.
"""

import os
import stat
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from mbn.state import files

_SIZE = 2**20
"""Bytes that have to be free on the disk for each file."""


class OutputError(Exception):
    """A file cannot be written; the message has the reason, and the path of the contents if they are elsewhere."""


def check_files(outputs: Mapping[str, Path | None], given: Path | None = None) -> None:
    """Check that files can be written, and that no two of them are the same.

    Args:
        outputs: by option, the files to be written; None where the option is not given.
        given: the file that is read.

    Raises:
        OutputError: a file cannot be written, or would be written over another.
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
    """Write files, each completely or not at all; a file that fails goes to the folder for temporary files.

    Raises:
        OutputError: a file was written to the folder for temporary files, or could not be written at all.
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
    """Write to the folder for temporary files, and return the message with the path."""
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="mbn-", suffix=suffix, delete=False) as file:
            file.write(data)
    except OSError as error:
        return f"Nor can a temporary file: {error.strerror}."
    return f"Its contents are in {file.name}."


def _check_file(path: Path) -> None:
    if not _is_stream(path):
        files.check_replaceable(path, _SIZE)
    elif not os.access(path, os.W_OK):
        raise PermissionError(None, "Permission denied")


def _is_stream(path: Path) -> bool:
    """Tell whether a path names no regular file and no folder, but a terminal, a pipe or /dev/null."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _is_same(one: Path, other: Path) -> bool:
    """Tell whether two paths name the same file, as hard links do."""
    try:
        return one.samefile(other) and not _is_stream(one)
    except OSError:
        return False


def _unwritable(path: Path, error: Exception) -> str:
    return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."
