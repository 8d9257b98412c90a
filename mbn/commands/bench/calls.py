"""Timed calls, and the arrays that they return."""

from collections.abc import Callable
from typing import Any, TypeAlias

from mbn.contract import Array

Call: TypeAlias = Callable[[], Any]
"""One call of a subject."""


def arrays(result: Any) -> list[Array]:
    """Return the arrays of a call's result, which are nested in tuples."""
    if isinstance(result, tuple):
        return [array for part in result for array in arrays(part)]
    return [] if result is None else [result]


def output_bytes(result: Any) -> int:
    """Return the size of the arrays of a call's result."""
    return sum(getattr(array, "nbytes", 0) for array in arrays(result))
