"""From what the backends computed to how far they are from the truth and from each other, and to a verdict.

The backends agree with each other by agreeing with the truth, so the verdict rests on the errors against the
reference; the distances between backends are there to be seen.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.commands.compare.examples import Example
from mbn.commands.compare.messages import QUANTITIES, Measured, Outcome
from mbn.commands.compare.reference import Reference
from mbn.commands.processes import NotRun
from mbn.conformance import ulp

AGREEMENT, DISAGREEMENT, NOTHING_RAN = 0, 1, 2
"""The exit codes."""

Ulps: TypeAlias = dict[str, float]
"""By quantity."""


class Comparison(NamedTuple):
    """One example on all backends."""

    example: Example
    outcomes: Mapping[str, Outcome]
    """By backend, as it was asked for."""
    errors: dict[str, Ulps]
    """By backend that ran: the largest error against the reference."""
    distances: dict[tuple[str, str], Ulps]
    """By pair of backends that ran: the largest distance."""


class Verdict(NamedTuple):
    """The verdict, and the exit code that says it to other programs."""

    exit_code: int
    text: str


def bounds(example: Example) -> Ulps:
    """Return the largest errors that are still agreement."""
    output, statistic = ulp.OUTPUT_BOUNDS[example.dtype], ulp.STATISTICS_BOUNDS[example.layer_dtype]
    return dict(zip(QUANTITIES, (output, output, statistic, statistic), strict=True))


@np.errstate(invalid="ignore")
def compare(example: Example, reference: Reference, outcomes: Mapping[str, Outcome]) -> Comparison:
    """Measure the outcomes of an example against the reference and between each pair of backends."""
    dtypes = dict(zip(QUANTITIES, (*[example.dtype] * 2, *[example.layer_dtype] * 2), strict=True))
    arrays = {name: outcome.arrays for name, outcome in outcomes.items() if isinstance(outcome, Measured)}

    def error(a: str, quantity: str) -> float:
        actual, exact = arrays[a][quantity], reference.exact[quantity]
        return ulp.error(actual, exact, dtypes[quantity]) if actual.shape == exact.hi.shape else math.inf

    def distance(a: str, b: str, quantity: str) -> float:
        pair = arrays[a][quantity], arrays[b][quantity]
        magnitude = reference.exact[quantity].magnitude
        same_shape = pair[0].shape == pair[1].shape == magnitude.shape
        return ulp.distance(*pair, magnitude, dtypes[quantity]) if same_shape else math.inf

    return Comparison(
        example,
        outcomes,
        {a: {quantity: error(a, quantity) for quantity in QUANTITIES} for a in arrays},
        {(a, b): {quantity: distance(a, b, quantity) for quantity in QUANTITIES} for a, b in combinations(arrays, 2)},
    )


def largest(several: Iterable[Ulps]) -> Ulps:
    """Return the largest figure of each quantity."""
    figures = list(several)
    return {quantity: max(ulps[quantity] for ulps in figures) for quantity in QUANTITIES}


def ran(comparisons: list[Comparison]) -> list[str]:
    """Return the backends that ran an example."""
    return list(dict.fromkeys(name for comparison in comparisons for name in comparison.errors))


def verdict(comparisons: list[Comparison]) -> Verdict:
    """Return the verdict on all examples. A backend that broke does not agree; one that cannot run has no say."""
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
