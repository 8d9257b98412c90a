"""The errors of backends against the exact reference, their distances from each other, and the verdict.

Backends within the bounds of the reference agree with each other, so the errors alone decide the verdict. The distances
between backends are shown beside them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.commands.compare.examples import Example
from mbn.commands.compare.messages import QUANTITIES, Measured, Outcome
from mbn.commands.compare.reference import Reference
from mbn.commands.processes import NotRun
from mbn.conformance import ulp
from mbn.conformance.ulp import Exact

AGREEMENT, DISAGREEMENT, NOTHING_RAN = 0, 1, 2
"""The exit codes."""
_BLOCK = 2**16
"""Values of each array that are compared at once."""

Ulps: TypeAlias = dict[str, float]
"""By quantity."""


class Comparison(NamedTuple):
    """One example on all backends."""

    example: Example
    outcomes: Mapping[str, Outcome]
    """By backend, as the user named it."""
    errors: dict[str, Ulps]
    """By backend that ran: the largest error against the reference."""
    distances: dict[tuple[str, str], Ulps]
    """By pair of backends that ran: the largest distance."""


class Verdict(NamedTuple):
    """The verdict as text, and as an exit code for other programs."""

    exit_code: int
    text: str


def bounds(example: Example) -> Ulps:
    """Return the largest error of each quantity that counts as agreement."""
    output, statistic = ulp.OUTPUT_BOUNDS[example.dtype], ulp.STATISTICS_BOUNDS[example.layer_dtype]
    return dict(zip(QUANTITIES, (output, output, statistic, statistic), strict=True))


@np.errstate(invalid="ignore")
def compare(
    example: Example,
    reference: Reference,
    outcomes: Mapping[str, Outcome],
    advance: Callable[[], object] = lambda: None,
) -> Comparison:
    """Measure the results of backends on an example against the reference, and between each pair of backends.

    ``advance`` is called after each backend and each pair.
    """
    dtypes = dict(zip(QUANTITIES, (*[example.dtype] * 2, *[example.layer_dtype] * 2), strict=True))
    arrays = {name: outcome.arrays for name, outcome in outcomes.items() if isinstance(outcome, Measured)}

    def figures(measure: Callable[..., float], *names: str) -> Ulps:
        found = {}
        for quantity, dtype in dtypes.items():
            given = [arrays[name][quantity] for name in names]
            exact = reference.exact[quantity]
            is_whole = all(array.shape == exact.hi.shape for array in given)
            found[quantity] = max(measure(dtype, *block) for block in _blocks(*given, *exact)) if is_whole else math.inf
        advance()
        return found

    def error(dtype: str, actual: np.ndarray, *exact: np.ndarray) -> float:
        return ulp.error(actual, Exact(*exact), dtype)

    def distance(dtype: str, a: np.ndarray, b: np.ndarray, *exact: np.ndarray) -> float:
        return ulp.distance(a, b, Exact(*exact).magnitude, dtype)

    return Comparison(
        example,
        outcomes,
        {a: figures(error, a) for a in arrays},
        {(a, b): figures(distance, a, b) for a, b in combinations(arrays, 2)},
    )


def _blocks(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Iterate over rows of arrays of one shape, so many at a time as fit into a core's cache."""
    rows = len(arrays[0])
    height = max(1, _BLOCK * rows // arrays[0].size)
    return ([array[start : start + height] for array in arrays] for start in range(0, rows, height))


def largest(several: Iterable[Ulps]) -> Ulps:
    """Return the largest figure of each quantity."""
    figures = list(several)
    return {quantity: max(ulps[quantity] for ulps in figures) for quantity in QUANTITIES}


def ran(comparisons: list[Comparison]) -> list[str]:
    """Return the backends that ran an example."""
    return list(dict.fromkeys(name for comparison in comparisons for name in comparison.errors))


def verdict(comparisons: list[Comparison]) -> Verdict:
    """Return the verdict on all examples.

    A backend that failed is a disagreement. A backend that cannot run here is left out.
    """
    problems = [problem for comparison in comparisons for problem in _problems(comparison)]
    if not ran(comparisons):
        return Verdict(NOTHING_RAN, "NOTHING COMPARED: no backend could run.")
    if problems:
        return Verdict(DISAGREEMENT, "\n".join(["DISAGREEMENT:", *dict.fromkeys(problems)]))
    names = ", ".join(ran(comparisons))
    return Verdict(AGREEMENT, f"AGREEMENT with the exact reference, within the bounds: {names}.")


def _problems(comparison: Comparison) -> list[str]:
    limits = bounds(comparison.example)
    broken = [
        f"{name} failed"
        for name, outcome in comparison.outcomes.items()
        if isinstance(outcome, NotRun) and outcome.broken
    ]
    wrong = [
        f"{name}: {quantity} is {error:.3g} ulp off, beyond {limits[quantity]:g} ({comparison.example.name})"
        for name, errors in comparison.errors.items()
        for quantity, error in errors.items()
        if error > limits[quantity]
    ]
    return broken + wrong
