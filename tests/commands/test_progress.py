"""Progress on standard error: lines at intervals where it is piped, a bar on a terminal, and an estimate in both."""

import io
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from mbn.commands import progress
from mbn.commands.cli import main
from mbn.commands.compare import command
from mbn.commands.processes import Process


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_the_estimate_follows_the_work_that_is_done(clock):
    steps = progress.Steps()
    clock.seconds += 5  # before the plan, which says nothing of the steps' speed
    assert steps.line() == "start: 5 s"
    steps.plan(10)
    steps.begin("numpy")
    clock.seconds += 2
    assert steps.line() == "numpy: 7 s"
    steps.advance(2)
    assert steps.line() == "numpy: 20 % after 7 s, about 8 s left"
    clock.seconds += 3  # within a step time runs down
    assert steps.line() == "numpy: 20 % after 10 s, about 5 s left"
    clock.seconds += 300
    assert steps.line().endswith("about 1 s left")
    steps.advance(1)
    assert steps.line() == "numpy: 30 % after 310 s, about 12 min left"
    steps.advance(7)
    assert steps.line() == "numpy: 100 % after 310 s"


def test_a_pipe_gets_lines_at_intervals(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PERIOD", 0.1)
    with progress.progress() as steps:
        steps.plan(4)
        steps.begin("the exact reference")
        steps.advance(1)
        time.sleep(0.35)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("the exact reference: 25 % after 0 s, about ") for line in lines)


def test_work_that_is_over_at_once_gets_no_line(capsys):
    with progress.progress() as steps:
        steps.plan(1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    with progress.progress() as steps:
        steps.plan(4)
        steps.begin("numpy")
        steps.advance(1)
        steps.bar.refresh()
    shown = screen.getvalue()
    assert "numpy" in shown
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in shown
    assert "about 1 s left" in shown


@pytest.mark.parametrize("step", ["_examples", "reference", "verdict"])
def test_an_interrupt_is_a_line_and_exit_code_130(capsys, monkeypatch, step):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, step, interrupted)
    assert main(["compare", "--backends", "numpy", "--shape", "4,3"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "mbn compare: interrupted"
    assert "Traceback" not in err


def test_an_interrupt_ends_the_process_that_is_waited_for():
    with pytest.raises(KeyboardInterrupt), Process("mbn.commands.availability") as process:
        raise KeyboardInterrupt
    assert process._child.returncode == -9


@pytest.mark.processes
def test_a_closed_pipe_of_progress_leaves_the_report():
    program = "from mbn.commands import progress\nprogress._PERIOD = 0.01\nfrom mbn.commands.cli import main\nmain()"
    reader, writer = os.pipe()
    command = [sys.executable, "-c", program, "compare", "--backends", "numpy", "--shape", "4000,3"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(reader)
    os.close(writer)
    out, _ = child.communicate(timeout=120)
    assert "AGREEMENT" in out
    assert child.returncode == 0
