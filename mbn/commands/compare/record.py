"""A comparison as strict JSON: every figure, with the versions and the machine."""

import math
from typing import Any

from mbn.commands import records
from mbn.commands.compare.comparison import AGREEMENT, Comparison, Ulps, Verdict, bounds
from mbn.commands.processes import NotRun


def to_json(comparisons: list[Comparison], verdict: Verdict) -> str:
    """Return the comparison as a JSON document. An error that is not finite is the string ``"inf"``."""
    record = {
        "examples": [_example(comparison) for comparison in comparisons],
        "verdict": {"agreement": verdict.exit_code == AGREEMENT, "exit_code": verdict.exit_code, "text": verdict.text},
    }
    return records.to_json(record)


def _example(comparison: Comparison) -> dict[str, Any]:
    example = comparison.example
    return {
        "name": example.name,
        "shape": example.x.shape,
        "rows": {"compared": len(example.x), "of": example.total_rows or len(example.x)},
        "dtype": example.dtype,
        "layer_dtype": example.layer_dtype,
        "momentum": example.momentum,
        "eps": example.eps,
        "training_steps": example.steps,
        "bounds_ulp": bounds(example),
        "backends": [{"backend": name, **_outcome(comparison, name)} for name in comparison.outcomes],
        "pairs": [
            {"backends": pair, "distance_ulp": _finite(distances)} for pair, distances in comparison.distances.items()
        ],
    }


def _outcome(comparison: Comparison, name: str) -> dict[str, Any]:
    outcome = comparison.outcomes[name]
    if isinstance(outcome, NotRun):
        return records.not_run(outcome)
    return {
        "status": "ran",
        "version": outcome.version,
        "device": outcome.device,
        "error_ulp": _finite(comparison.errors[name]),
        "seconds_per_call": outcome.seconds,
    }


def _finite(ulps: Ulps) -> dict[str, float | str]:
    return {quantity: "inf" if math.isinf(ulp) else ulp for quantity, ulp in ulps.items()}
