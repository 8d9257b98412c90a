"""Test runs in processes of their own, which take minutes: they tell how far they are, under xdist too."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Nested = Callable[..., subprocess.CompletedProcess[str]]

SILENCE = 20
"""Seconds from one line of progress to the next, at least."""


@pytest.fixture
def nested(request: pytest.FixtureRequest) -> Nested:
    """Return a function of a command that runs it, and returns its exit status with both its streams in one."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def run(command: Sequence[str | Path], **options: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | options
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, told = b"", time.monotonic()
        with process:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                output += chunk
                if time.monotonic() - told > SILENCE:
                    told = time.monotonic()
                    percent = re.findall(r"\d+%|$", output.decode(errors="replace"))[-2:][0]
                    with capture.global_and_fixture_disabled():
                        print(f"\n{request.node.name}: {percent or 'running'}", file=sys.stderr, flush=True)  # noqa: T201
        return subprocess.CompletedProcess(command, process.returncode, output.decode(errors="replace"))

    return run
