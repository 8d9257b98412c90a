"""The suite must be able to fail: it has to name every bug that is planted in a correct backend."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import derivative_bugs
import host_bugs
import jax_bugs
import pytest
import toy_bugs
from planted import Bug

NAMES = list(toy_bugs.BUGS)
GROUPS = [NAMES[start : start + 9] for start in range(0, len(NAMES), 9)]
"""A process for each would take most of its time to start."""


def conform(script: str, names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Run the suite in a process of its own; return its report on each bug."""
    command = [sys.executable, script, folder, *names]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    reports = {name: folder / f"{name}.json" for name in names}
    assert all(report.exists() for report in reports.values()), run.stdout + run.stderr
    return {name: json.loads(report.read_text()) for name, report in reports.items()}


def is_named(report: dict[str, Any], bug: Bug) -> bool:
    """Tell whether the expected test alone failed, and for the bug: any other error may be a mistake in the plant."""
    failures = report["failed"]
    errors = ("AssertionError", "assert ", "Failed: DID NOT RAISE") if bug.error == "assert" else bug.error
    is_expected = any(failure["message"].startswith(errors) for failure in failures)
    return report["exit_status"] == 1 and is_expected and all(bug.named_by in failure["test"] for failure in failures)


def test_correct_backend_passes(tmp_path: Path) -> None:
    report = conform(toy_bugs.__file__, ["none"], tmp_path)["none"]
    assert report["failed"] == []
    assert report["exit_status"] == 0
    assert all(area["passed"] > 0 for area in report["areas"].values())
    reasons = ["no bfloat16", "no float64", "no autograd", "masks", "modules", "mutable arrays", "one device"]
    assert {skip["reason"] for skip in report["skipped"]} == {f"toy declares {reason}" for reason in reasons}


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
def test_planted_bugs_are_named(names: list[str], tmp_path: Path) -> None:
    reports = conform(toy_bugs.__file__, names, tmp_path)
    assert [name for name in names if not is_named(reports[name], toy_bugs.BUGS[name])] == []


@pytest.mark.parametrize("script", [derivative_bugs, host_bugs, jax_bugs], ids=["derivatives", "host memory", "JAX"])
def test_bugs_in_real_backends_are_named(script: ModuleType, tmp_path: Path) -> None:
    reports = conform(script.__file__, list(script.BUGS), tmp_path)
    assert [name for name, bug in script.BUGS.items() if not is_named(reports[name], bug)] == []
