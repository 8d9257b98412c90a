"""The suite as a function, for the command line; its result does not depend on the working directory."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

UNUSABLE = int(pytest.ExitCode.USAGE_ERROR)
"""The exit code if no test could start."""


def run(
    backend: str, *, json: Path | None = None, junit_xml: Path | None = None, pytest_args: Sequence[str] = ()
) -> int:
    """Run the suite against ``NAME`` or ``NAME:DEVICE`` and return pytest's exit code: 0 passed, 1 failed, 4 unusable.

    Args:
        backend: a registered backend.
        json: the file for the report as JSON.
        junit_xml: the file for the report in JUnit's format.
        pytest_args: further options for pytest, for example ``-k NAME``.
    """
    arguments = [
        "--pyargs",
        "mbn.conformance",
        *("-p", "mbn.conformance.plugin"),
        *("-p", "no:cacheprovider"),
        *("-c", os.devnull),  # pytest's configuration of the working directory must not change the verdict
        *("--rootdir", str(Path(__file__).parent)),
        *("--backend", backend),
        "--quiet",
        "--tb=short",
    ]
    if json is not None:
        arguments += ["--conformance-json", str(json)]
    if junit_xml is not None:
        arguments += [f"--junit-xml={junit_xml}"]
    return int(pytest.main([*arguments, *pytest_args]))
