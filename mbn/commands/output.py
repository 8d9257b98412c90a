"""The printed output of commands: tables of plain text that fit a terminal of 80 columns."""

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich import box
from rich.console import Console
from rich.table import Table

from mbn.commands.options import UsageError
from mbn.commands.processes import NotRun

_REASON_LENGTH = 300


class _Output:
    """Standard output, with an error of one line where it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        """Write a text."""
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        """Write all text in the buffer."""
        self._try(self._stream.flush)

    def _try(self, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except OSError as error:
            with suppress(OSError):  # so that Python, when it ends, can write the rest of the buffer
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise UsageError(f"standard output cannot be written: {error.strerror or error}.") from error


@contextmanager
def checked_output() -> Iterator[None]:
    """Return a context in which a full disk or a closed pipe behind standard output is a UsageError.

    At its end the buffer is written, with the text of argparse, rich and pytest too.
    """
    if sys.stdout is None:  # the process began without one
        yield
        return
    output = _Output(sys.stdout)
    with redirect_stdout(cast(TextIO, output)):
        try:
            yield
        except SystemExit:  # argparse raises it after a text of help
            output.flush()
            raise
        output.flush()


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints text unchanged."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """Return an empty table with columns of text, then of numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for column in numbers:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def print_filled(console: Console, *tables: Table) -> None:
    """Print the tables that have rows, each with an empty line below."""
    for filled in tables:
        if filled.row_count:
            console.print(filled)
            console.print()


def not_run(head: str, reasons: Mapping[str, Iterable[NotRun]]) -> Table:
    """Return a table of the subjects that did not run, under the heading ``head``, with each reason once."""
    made = table(head, "why it did not run")
    for name, outcomes in reasons.items():
        for reason in dict.fromkeys(_reason(outcome) for outcome in outcomes):
            made.add_row(name, reason)
    return made


def essence(why: str) -> str:
    """Return a reason without the backend's name, which the table has already, on one short line."""
    return textwrap.shorten(re.sub(r"^backend '[^']*':? (is known but )?", "", why), _REASON_LENGTH, placeholder=" ...")


def milliseconds(seconds: float) -> str:
    """Return a time as a number of milliseconds."""
    value = 1000 * seconds
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _reason(outcome: NotRun) -> str:
    return f"failed: {essence(outcome.why)}" if outcome.broken else essence(outcome.why)
