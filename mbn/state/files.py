"""Layers in files: safetensors, with the layer's arguments and modes in the metadata.

A file may be malicious, so nothing in it is ever executed, and nothing of it is used before all of it has been checked.
A write that is interrupted must leave the complete old file or the complete new one. Equal layers make equal files.
"""

import contextlib
import errno
import hashlib
import json
import os
import reprlib
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import numpy as np

from mbn import checks
from mbn.state.snapshot import Snapshot

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

KEY = "mbn.BatchNorm1d"
"""The key of the only entry of the metadata, whose value is JSON: with more entries, their order would not be fixed."""
VERSION = 1
_OLD = ".old"
"""The name of a replaced folder, within the temporary one."""
_TRIES = 50
"""How often a folder is removed, a tenth of a second apart, while other threads may still write to it."""

_DESCRIPTION = {"version": (int,), "checksum": (int,), "arguments": (dict,), "training": (bool,), "frozen": (bool,)}
_ARGUMENTS = {
    "num_features": (int,),
    "dtype": (str,),
    "eps": (float,),
    "momentum": (float, NoneType),
    "axis": (int,),
    "correction": (int,),
    "affine": (bool,),
    "track_running_stats": (bool,),
    "bias": (bool,),
}
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}
"""By dtype: its name in safetensors."""


_CHECKPOINT = "mbn.BatchNorm1d.from_checkpoint(path, prefix)."


def is_of_torch(start: bytes) -> bool:
    """Tell whether a file is one of ``torch.save``, by its first 9 bytes."""
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:] != b"{")


def write(path: str | PathLike[str], snapshot: Snapshot) -> None:
    """Write a layer to a file, atomically: other processes see the old file or the new one.

    Raises:
        OSError: the file cannot be written; nothing has changed.
    """
    from safetensors.numpy import save

    entries = {
        key: np.asarray(snapshot.entries[key], dtype, order="C")
        for key, (dtype, _) in _expected(snapshot.arguments).items()
    }
    described: dict[str, Any] = {
        "version": VERSION,
        "arguments": snapshot.arguments,
        "training": snapshot.training,
        "frozen": snapshot.frozen,
    }
    described["checksum"] = _checksum(described, entries)
    replace(path, save(entries, {KEY: json.dumps(described, sort_keys=True)}))


def read(path: str | PathLike[str]) -> Snapshot:
    """Return the layer in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, not one of a layer, or of a later version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb") as raw:  # Python's own errors name the file
        start = raw.read(9)
    try:
        with safe_open(path, framework="np") as file:
            return _checked(file)
    except SafetensorError as error:
        hint = f" If it is of torch.save: {_CHECKPOINT}" if is_of_torch(start) else ""
        raise ValueError(f"{path} holds no layer: it is damaged or no safetensors file ({error}).{hint}") from error
    except ValueError as error:
        raise ValueError(f"{path} holds no layer that can be loaded: {error}") from error


def _checked(file: Any) -> Snapshot:
    """Return the layer in an open safetensors file; names, dtypes and shapes are checked before arrays are read."""
    described = _described((file.metadata() or {}).get(KEY))
    arguments = described["arguments"]
    expected = _expected(arguments)
    needed = {key: f"{_DTYPES[dtype]} of shape {shape}" for key, (dtype, shape) in expected.items()}
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    given = {key: f"{entry.get_dtype()} of shape {tuple(entry.get_shape())}" for key, entry in slices.items()}
    for key in {**needed, **given}:
        if needed.get(key) != given.get(key):
            raise ValueError(f"its {key} is {given.get(key, 'absent')}, and should be {needed.get(key, 'absent')}.")
    entries = {key: file.get_tensor(key) for key in expected}
    checksum = described.pop("checksum")
    if checksum != _checksum(described, entries):
        raise ValueError("it is damaged: its checksum does not match its contents.")
    if entries.get("num_batches_tracked", 0) < 0:
        raise ValueError(
            f"its num_batches_tracked counts batches and is at least 0, not {entries['num_batches_tracked']}."
        )
    return Snapshot(arguments, entries, training=described["training"], frozen=described["frozen"])


def _described(text: str | None) -> dict[str, Any]:
    """Return the arguments and modes of a layer, with the version and checksum of its file."""
    if text is None:
        raise ValueError(f"it is not from BatchNorm1d.save. Of a checkpoint: {_CHECKPOINT}")
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its description is damaged ({error}).") from error
    version = described.get("version") if isinstance(described, dict) else None
    if type(version) is int and version != VERSION:
        raise ValueError(f"its format is version {version}, and this mbn reads version {VERSION}: install a newer mbn.")
    _check_types("description", described, _DESCRIPTION)
    arguments = described["arguments"]
    _check_types("list of arguments", arguments, _ARGUMENTS)
    for name in ("num_features", "eps", "momentum", "axis", "correction"):
        getattr(checks, name)(arguments[name])
    if arguments["dtype"] not in {"float32", "float64"}:
        raise ValueError(f"its dtype is {reprlib.repr(arguments['dtype'])}, and should be float32 or float64.")
    if described["frozen"]:
        checks.tracked(arguments["track_running_stats"], "freeze")
    result: dict[str, Any] = described
    return result


def _check_types(name: str, values: Any, types: Mapping[str, tuple[type, ...]]) -> None:
    """Check that ``values``, which messages call ``name``, has exactly the keys of ``types``, and those types."""
    wrong = sorted(values.keys() ^ types.keys()) if isinstance(values, dict) else [reprlib.repr(values)]
    if wrong:
        raise ValueError(f"its {name} has missing or unexpected entries: {reprlib.repr(wrong)}.")
    for key, allowed in types.items():
        if type(values[key]) not in allowed:
            raise ValueError(f"its {key} is {reprlib.repr(values[key])}, and should be of type {allowed[0].__name__}.")


def _expected(arguments: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each array that a layer with these arguments has."""
    vector = arguments["dtype"], (arguments["num_features"],)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    if arguments["affine"]:
        expected["weight"] = vector
    if arguments["affine"] and arguments["bias"]:
        expected["bias"] = vector
    if arguments["track_running_stats"]:
        expected |= {"running_mean": vector, "running_var": vector, "num_batches_tracked": ("int64", ())}
    return expected


def _checksum(described: Mapping[str, Any], entries: Mapping[str, np.ndarray]) -> int:
    """Return the CRC-32 of the description and all arrays."""
    checksum = zlib.crc32(json.dumps(described, sort_keys=True).encode())
    for value in entries.values():
        checksum = zlib.crc32(value.astype(value.dtype.newbyteorder("<")).tobytes(), checksum)
    return checksum


def replace(path: str | PathLike[str], data: bytes) -> None:
    """Write a temporary file in the same folder, and rename it to ``path`` when all of it has reached the disk.

    Raises:
        OSError: the file cannot be written; nothing has changed.
    """
    path = Path(os.path.realpath(Path(path)))
    mode = _mode(path)
    _clear_up(path, Path.unlink)
    with _temporary(path, mode) as (temporary, file):
        if mode is not None:
            temporary.chmod(mode)  # the mode of the old file, unchanged by the umask
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()  # on Windows, which has no fcntl, open files cannot be renamed
        temporary.replace(path)
    with contextlib.suppress(OSError):  # not every system opens folders, and the file is written in any case
        _sync(path.parent)


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Return a context with the path for a new file or folder, which takes the name ``path`` at its end.

    Until then it is in a temporary folder beside ``path``, which is removed in any case. After an error ``path`` is as
    it was.

    Raises:
        OSError: the folder of ``path`` cannot be written to; nothing has changed.
    """
    path = Path(os.path.realpath(Path(path)))
    _clear_up(path, partial(_remove, path=path), folders=True)
    folder = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
    new, old = folder / path.name, folder / _OLD
    folder.mkdir()
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            _lock(descriptor)
        yield new
        for file in [new] if new.is_file() else new.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.is_file() and new.is_file():
            new.chmod(stat.S_IMODE(path.stat().st_mode))
        elif path.exists():  # a folder is moved out of the way first, since no file system replaces one
            path.rename(old)
        new.replace(path)
        with contextlib.suppress(OSError):
            _sync(path.parent)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        _remove(folder, path)


def _remove(folder: Path, path: Path) -> None:
    """Remove a temporary folder; a former ``path`` in it gets its name again, if no other has taken it."""
    if (folder / _OLD).exists() and not path.exists():
        (folder / _OLD).rename(path)
    for _ in range(_TRIES):  # threads of zarr may still write to it after an interrupt
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def check_replaceable(path: str | PathLike[str], size: int) -> None:
    """Check that a file of ``size`` bytes can be written now.

    Raises:
        OSError: it cannot.
    """
    path = Path(os.path.realpath(Path(path)))
    with _temporary(path, _mode(path)) as (temporary, file):
        file.write(bytes(size))
        file.flush()
        temporary.unlink()


@contextlib.contextmanager
def _temporary(path: Path, mode: int | None) -> Iterator[tuple[Path, BinaryIO]]:
    """Make a temporary file in the folder of ``path``, locked while it is written; remove it if the write fails."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb", opener=partial(os.open, mode=0o666 if mode is None else mode)) as file:
                _lock(file.fileno())
                if temporary.exists():  # unless another process removed it as a leftover before it was locked
                    yield temporary, file
                    return
        except BaseException:  # an interrupt too
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _clear_up(path: Path, remove: Callable[[Path], object], *, folders: bool = False) -> None:
    """Remove the temporary files or folders for ``path`` that killed processes have left; those in use are locked."""
    if fcntl is None:
        return
    flags = os.O_RDONLY | os.O_DIRECTORY if folders else os.O_RDWR | os.O_NONBLOCK
    for leftover in path.parent.glob(f"{_prefix(path)}*.tmp"):
        with contextlib.suppress(OSError):  # it is locked, of the other kind, renamed, or belongs to another user
            descriptor = os.open(leftover, flags | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(leftover)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is cleared up either
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _prefix(path: Path) -> str:
    """Return the prefix of the temporary files that are to be renamed to ``path``."""
    return f".mbn-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _mode(path: Path) -> int | None:
    """Return the permissions of a file that may be written to; None where there is no file yet.

    Raises:
        OSError: the file can't be replaced, or its folder does not exist.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            mode = os.fstat(file.fileno()).st_mode
    except FileNotFoundError:
        path.parent.stat()
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stat.S_IMODE(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
