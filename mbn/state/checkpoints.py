"""One layer's entries in a model's checkpoint.

A checkpoint may be malicious, so nothing in it is ever executed; and it may be large, so only the layer's entries are
read.
"""

import json
import re
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mbn import checks
from mbn.checks import few
from mbn.contract import Params, State, dtype_name
from mbn.state import files
from mbn.state.keys import batch_norms, groups, prefixes

_NAMES = (*Params._fields, *State._fields)
_SETTINGS = ("eps", "momentum", "axis", "correction", "track_running_stats")
"""The arguments of a layer that a checkpoint does not contain."""


def under(entries: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], int | None, str]:
    """Return the entries that begin with a prefix, without it; their version, or None; and the prefix as it was found.

    Raises:
        TypeError: the prefix is no string.
        ValueError: no dictionary has such entries, or several have.
    """
    if not isinstance(prefix, str):
        raise TypeError(
            f"prefix is a str, the part of the names of entries before 'weight', not {type(prefix).__name__}."
        )
    found = {}
    for path, group in groups(entries):
        for tried in dict.fromkeys([prefix, prefix + "." * (prefix != "" and prefix[-1] != ".")]):
            rest = tried[len(path) :] if path and tried.startswith(path) else tried
            if any(rest + name in group for name in _NAMES):
                found[path] = group, rest
                break
    if len(found) > 1:
        raise ValueError(
            f"there are entries that begin with {prefix!r} in several dictionaries: begin the prefix with one of "
            f"{few(repr(path) for path in found)}."
        )
    if not found:
        raise ValueError(_not_found(entries, prefix))
    ((group, start),) = found.values()
    version = getattr(group, "_metadata", {}).get(start.rstrip("."), {}).get("version")
    chosen = {key[len(start) :]: group[key] for key in group if isinstance(key, str) and key.startswith(start)}
    return chosen, version, start


def read(
    path: str | PathLike[str], prefix: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the entries of a layer in a file, the arguments of the layer, and the prefix of entries in messages.

    Raises:
        OSError, ImportError, ValueError, TypeError: see :meth:`mbn.BatchNorm1d.from_checkpoint`.
    """
    for name in settings:
        if name not in _SETTINGS:
            raise TypeError(f"{name} is no setting of a layer from a checkpoint, which are {', '.join(_SETTINGS)}.")
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        model = (_torch_entries if files.is_of_torch(start) else _safetensors_entries)(path, start)
        entries, _, full = under(model, prefix)
        taken = {key: value() if callable(value) else value for key, value in entries.items() if key in _NAMES}
        return taken, {**settings, **_arguments(entries, taken, settings, model)}, f"{path}: {full}"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _arguments(
    entries: Mapping[str, Any], taken: Mapping[str, Any], settings: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of the layer that has these entries of a model."""
    tracked = checks.flag("track_running_stats", settings.get("track_running_stats", True))
    needed = ["running_mean", "running_var"] * tracked + ["weight"] * ("bias" in taken or not tracked)
    missing = [name for name in needed if name not in taken]
    unexpected = [key for key in entries if key not in _NAMES or (not tracked and key in State._fields)]
    if missing or unexpected:
        problems = [f"they lack {few(missing)}"] * bool(missing) + [f"they have {few(unexpected)}"] * bool(unexpected)
        hint = " Without running statistics: track_running_stats=False." * (missing == ["running_mean", "running_var"])
        message = f"the entries with this prefix are not those of one batch norm: {' and '.join(problems)}.{hint}"
        message += batch_norms(model)
        raise ValueError(message)
    name, first = next((name, taken[name]) for name in ("running_mean", "weight") if name in taken)
    if len(first.shape) != 1:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; a batch norm's is (C,).")
    dtypes = {dtype_name(value.dtype) for value in taken.values()}
    return {
        "num_features": int(first.shape[0]),
        "dtype": "float64" if "float64" in dtypes else "float32",
        "affine": "weight" in taken,
        "bias": "bias" in taken or "weight" not in taken,
    }


def _torch_entries(path: Path, _: bytes) -> Mapping[str, Any]:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"{path} is a file of torch.save, and torch is not installed: pip install torch; or save safetensors."
        ) from error
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged file, or a foreign object in it, may raise anything
        text = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\S+)", text):
            message = (
                f"torch cannot load it by weights_only=True, which takes tensors and no objects, and it has "
                f"{found[1]} or is damaged. Of a model save the entries alone: torch.save(model.state_dict(), path)."
            )
        else:
            found = re.search(r"WeightsUnpickler error: (.*)", text)
            message = (
                "it is damaged, or torch cannot load it by weights_only=True, which takes tensors and no objects "
                f"({textwrap.shorten(found[1] if found else text, 120)})."
            )
        raise ValueError(message) from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"it holds a {type(entries).__name__}, and no state_dict.")  # noqa: TRY004 - of the file
    return entries


def _safetensors_entries(path: Path, start: bytes) -> dict[str, Callable[[], np.ndarray]]:
    """Return a function for each entry, by name, that reads it."""
    from safetensors import SafetensorError, safe_open

    if start[:1] == b"{":
        raise ValueError(
            "it is text, perhaps the index of a checkpoint in several files: give the file that has the entries."
        )
    try:
        with safe_open(path, framework="np") as file:
            is_layer = files.KEY in (file.metadata() or {})
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"it is damaged, or neither safetensors nor of torch.save ({error}).") from error
    if is_layer:
        raise ValueError("it is a layer of BatchNorm1d.save, with its eps and momentum: mbn.BatchNorm1d.load(path).")

    def entry(name: str) -> np.ndarray:
        with safe_open(path, framework="np") as file:
            if file.get_slice(name).get_dtype() != "BF16":  # NumPy has none
                array: np.ndarray = file.get_tensor(name)
                return array
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            described = json.loads(raw.read(size))[name]
            begin, end = described["data_offsets"]
            raw.seek(8 + size + begin)
            halves = np.frombuffer(raw.read(end - begin), "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(described["shape"])

    return {name: lambda name=name: entry(name) for name in names}  # type: ignore[misc]


def _not_found(entries: Mapping[Any, Any], prefix: str) -> str:
    """Return the message for a prefix that no entries begin with: it names the nearest, and lists the batch norms."""
    known = prefixes(entries)
    message = f"no entries begin with {prefix!r}." if prefix else "there are no entries of a layer alone."
    if not known:
        keys = [key for _, group in groups(entries) for key, value in group.items() if not isinstance(value, Mapping)]
        return f"{message} There are no running statistics in it, but {few(keys) or 'nothing'}."
    if not prefix:
        message += " Give prefix= to select one layer's entries of a model."
    bare = prefix.rstrip(".")
    same_end = [name for name in known if re.search(rf"(^|\.){re.escape(bare)}\.?$", name)] if bare else []
    nearest = dict.fromkeys([*same_end, *get_close_matches(prefix, list(known), n=3, cutoff=0.5)])
    if nearest:
        message += f" Did you mean {few((repr(name) for name in nearest), 3)}?"
    return message + batch_norms(entries)
