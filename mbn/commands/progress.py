"""The progress of a command on standard error: a bar on a terminal, and elsewhere a line every few seconds."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from mbn.commands.output import console

_PERIOD = 3.0
"""Seconds between two lines."""
_ENOUGH = 0.03
"""The part of the work that has to be done before its time is a measure for the rest."""


class Steps:
    """The steps of a command, each with a guess of its seconds, or with its bytes.

    The guesses have to be right in proportion alone.
    """

    def __init__(self, *, in_bytes: bool = False) -> None:
        out = console(stderr=True)
        self._in_bytes = in_bytes
        size = (DownloadColumn(),) if in_bytes else ()
        columns = TextColumn("{task.description}"), BarColumn(), *size, TimeElapsedColumn(), _Left(self)
        self.bar = Progress(*columns, console=out, disable=not out.is_terminal, transient=True)
        self._task = self.bar.add_task("start", total=None)
        self._start = self._planned = self._advanced = time.monotonic()
        self._done, self._total = 0.0, 1.0

    def plan(self, seconds: float) -> None:
        """Set the guess for all steps together, as the first of them begins."""
        self._total, self._planned = seconds, time.monotonic()
        self.bar.update(self._task, total=seconds)

    def drop(self, seconds: float) -> None:
        """Take a step that is not needed out of the plan."""
        self._total -= seconds
        self.bar.update(self._task, total=self._total)

    def begin(self, name: str) -> None:
        """Show the name of the step that begins."""
        self.bar.update(self._task, description=name)

    def advance(self, seconds: float) -> None:
        """Count a step, or a part of one, as done."""
        self._done += seconds
        self._advanced = time.monotonic()
        self.bar.update(self._task, completed=self._done)

    def left(self) -> str:
        """Return the estimate of the time left; "" where too little of the work is done for one, or all."""
        if not _ENOUGH * self._total < self._done < self._total:
            return ""
        elapsed, since = self._advanced - self._planned, time.monotonic() - self._advanced
        seconds = max(1.0, elapsed * (self._total - self._done) / self._done - since)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"

    def line(self) -> str:
        """Return the state of the work as a line of text."""
        (task,) = self.bar.tasks
        percentage = f"{task.percentage:.0f} % after " if self._done else ""
        line = f"{task.description}: {percentage}{time.monotonic() - self._start:.0f} s"
        size = f"{decimal(int(self._done))} of {decimal(int(self._total))}"
        return ", ".join([line, *[size] * self._in_bytes, *[self.left()] * bool(self.left())])


@contextmanager
def progress(*, in_bytes: bool = False) -> Iterator[Steps]:
    """Return a context in which standard error shows how far the work is, and about how long the rest takes."""
    steps, done = Steps(in_bytes=in_bytes), threading.Event()

    def write_lines() -> None:
        while not done.wait(_PERIOD):
            # rich would send standard output to nowhere once nobody reads standard error.
            with suppress(OSError, ValueError):
                if sys.stderr is not None:
                    print(steps.line(), file=sys.stderr, flush=True)  # noqa: T201 - this is the progress

    if not steps.bar.disable:
        with steps.bar:
            yield steps
        return
    writer = threading.Thread(target=write_lines, daemon=True)
    writer.start()
    try:
        yield steps
    finally:
        done.set()
        writer.join()


class _Left(ProgressColumn):
    """The estimate of the time left, beside the bar."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps

    def render(self, task: Task) -> Text:
        return Text(self._steps.left())
