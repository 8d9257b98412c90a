"""Run the suite against backends with planted bugs, each in a fork of a process that has imported the suite."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hypothesis import Phase, settings

from mbn.conformance.runner import run


class Bug(NamedTuple):
    plant: Callable[[], object]
    named_by: str
    """The test that has to find the bug; no other test runs."""
    error: str = "assert"
    """The beginning of the message: a failed assertion, unless the bug itself raises another error."""


def conform(backend: str, bugs: Mapping[str, Bug], folder: Path) -> None:
    """Run the tests that have to find the bugs; write a report on each bug to the folder."""
    # Without the phase that shrinks examples: a test fails all the same.
    settings.register_profile("planted", deadline=None, derandomize=True, max_examples=20, phases=[Phase.generate])
    run("numpy", pytest_args=["--collect-only", "-qq"])  # imports the suite once for all
    for name, bug in bugs.items():
        child = os.fork()
        if child == 0:
            try:
                bug.plant()
                options = ["--hypothesis-profile", "planted", "-k", bug.named_by]
                run(backend, json=folder / f"{name}.json", pytest_args=options)
            finally:
                sys.stdout.flush()
                os._exit(0)  # the rest of this process is the parent's
        os.waitpid(child, 0)
