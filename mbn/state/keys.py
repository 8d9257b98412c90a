"""The keys of state_dicts: torch's, in torch's order, and those of a layer among a model's."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mbn.checks import few
from mbn.contract import Params, State

VERSION = 2
"""The version of torch's entries: since version 2 they include ``num_batches_tracked``."""
_DEEPEST = 4
"""The greatest depth at which nested dictionaries are searched."""


class IncompatibleKeys(NamedTuple):
    """The keys that a load with ``strict=False`` ignored."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def to_dict(params: Params, state: State) -> dict[str, Any]:
    """Return the entries that exist, under torch's keys and in torch's order."""
    entries = {**params._asdict(), **state._asdict()}
    return {key: value for key, value in entries.items() if value is not None}


def versioned(entries: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return entries as a state_dict of torch's modules: with their version where torch looks for it."""
    result = OrderedDict(entries)
    vars(result)["_metadata"] = OrderedDict({"": {"version": VERSION}})
    return result


def compare_keys(
    expected: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    strict: bool,
    version: int | None = None,
    model: Mapping[Any, Any] | None = None,
    prefix: str = "",
) -> IncompatibleKeys:
    """Return the missing and the unexpected keys.

    ``given`` are the entries of ``model`` with ``prefix``, which messages name. As in torch, the count of batches may
    be missing where the entries are of version 1 or have no version.

    Raises:
        ValueError: there are such keys, and the load is ``strict``.
    """
    version = version or getattr(given, "_metadata", {}).get("", {}).get("version") or 1
    optional = {"num_batches_tracked"} if version < VERSION else set()
    missing = [key for key in expected if key not in given and key not in optional]
    unexpected = [key for key in given if key not in expected]
    if strict and (missing or unexpected):
        problems = [
            f"{problem} {few(f'{prefix}{key}' for key in keys)}"
            for problem, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        message = (
            f"state_dict does not fit this layer: {'; '.join(problems)}. It needs exactly "
            f"{', '.join(expected) or 'no entries'}; strict=False loads the entries that fit."
        )
        if not prefix and any("." in str(key) for key in unexpected):
            message += " Give prefix= to select one layer's entries of a model."
        message += batch_norms(given if model is None else model)
        raise ValueError(message)
    return IncompatibleKeys(missing, unexpected)


def groups(entries: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Iterate over a dictionary and the dictionaries in it, each with the keys that lead to it."""
    yield path, entries
    for key, value in entries.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from groups(value, f"{path}{key}.", depth + 1)


def prefixes(entries: Mapping[Any, Any]) -> list[str]:
    """Return the texts before ``running_mean`` in the keys of a model, and of dictionaries in it."""
    keys = (str(key) for _, group in groups(entries) for key, value in group.items() if not isinstance(value, Mapping))
    return list(dict.fromkeys(key[: -len("running_mean")] for key in keys if key.endswith(".running_mean")))


def batch_norms(entries: Mapping[Any, Any]) -> str:
    """Return the part of a message that lists the batch norms of a model."""
    known = prefixes(entries)
    return f" Batch norms in it: {few(map(repr, known))}." if known else ""
