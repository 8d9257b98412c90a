"""The suite must be able to fail: it has to name every bug that is planted in a correct backend."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import BUGS

SCRIPT = Path(__file__).with_name("toy.py")


def conform(bug: str, folder: Path) -> tuple[int, dict[str, Any]]:
    """Run the suite in a process of its own; return its exit code and its report."""
    report = folder / "report.json"
    run = subprocess.run([sys.executable, SCRIPT, bug, report], capture_output=True, text=True, check=False)  # noqa: S603
    assert report.exists(), run.stdout + run.stderr
    return run.returncode, json.loads(report.read_text())


def test_correct_backend_passes(tmp_path: Path) -> None:
    code, report = conform("none", tmp_path)
    assert report["failed"] == []
    assert code == 0
    assert all(area["passed"] > 0 for area in report["areas"].values())
    assert {skip["reason"] for skip in report["skipped"]} == {"toy declares no bfloat16", "toy declares no float64"}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_named(bug: str, tmp_path: Path) -> None:
    code, report = conform(bug, tmp_path)
    assert code == 1
    assert all(BUGS[bug][1] in failure["test"] for failure in report["failed"])
