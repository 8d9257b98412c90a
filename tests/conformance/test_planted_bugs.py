"""The suite must be able to fail: it has to find every bug that is planted in a correct backend."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_bugs
from nested import Nested
from planted import Bug

pytestmark = [pytest.mark.slow, pytest.mark.processes]
Conform = Callable[[str, list[str]], dict[str, dict[str, Any]]]

NAMES = list(toy_bugs.BUGS)
GROUPS = [NAMES[start : start + 9] for start in range(0, len(NAMES), 9)]
"""Bugs that share a process, since a process for each would spend most of its time on its start."""


@pytest.fixture
def conform(nested: Nested, tmp_path: Path) -> Conform:
    """Return a function that runs the suite in a process of its own, and returns its report on each bug."""

    def report(script: str, names: list[str]) -> dict[str, dict[str, Any]]:
        run = nested([sys.executable, script, tmp_path, *names])
        reports = {name: tmp_path / f"{name}.json" for name in names}
        assert all(report.exists() for report in reports.values()), run.stdout
        return {name: json.loads(report.read_text()) for name, report in reports.items()}

    return report


def is_named(report: dict[str, Any], bug: Bug) -> bool:
    """Return whether the expected test alone failed, by the expected error; another may be a mistake in the bug."""
    failures = report["failed"]
    errors = ("AssertionError", "assert ", "Failed: DID NOT RAISE") if bug.error == "assert" else bug.error
    is_expected = any(failure["message"].startswith(errors) for failure in failures)
    return report["exit_status"] == 1 and is_expected and all(bug.named_by in failure["test"] for failure in failures)


def test_correct_backend_passes(conform: Conform) -> None:
    report = conform(toy_bugs.__file__, ["none"])["none"]
    assert report["failed"] == []
    assert report["exit_status"] == 0
    assert all(area["passed"] > 0 for area in report["areas"].values())
    reasons = [
        *("no bfloat16", "no float64", "no autograd", "masks", "modules", "mutable arrays", "one device"),
        "replicas in processes",
    ]
    assert {skip["reason"] for skip in report["skipped"]} == {f"toy declares {reason}" for reason in reasons}


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
def test_suite_finds_planted_bugs(names: list[str], conform: Conform) -> None:
    reports = conform(toy_bugs.__file__, names)
    assert [name for name in names if not is_named(reports[name], toy_bugs.BUGS[name])] == []


@pytest.mark.parametrize(
    "name",
    [
        "host_bugs",
        "replica_bugs",
        pytest.param("numba_bugs", marks=pytest.mark.numba),
        pytest.param("address_bugs", marks=[pytest.mark.numba, pytest.mark.torch]),
        pytest.param("chunked_bugs", marks=pytest.mark.dask),
        pytest.param("jax_bugs", marks=pytest.mark.jax),
        pytest.param("mlx_bugs", marks=pytest.mark.mlx),
        pytest.param("torch_bugs", marks=pytest.mark.torch),
        pytest.param("derivative_bugs", marks=[pytest.mark.torch, pytest.mark.jax]),
    ],
)
def test_suite_finds_bugs_in_real_backends(name: str, conform: Conform) -> None:
    script = importlib.import_module(name)
    reports = conform(script.__file__, list(script.BUGS))
    assert [name for name, bug in script.BUGS.items() if not is_named(reports[name], bug)] == []
