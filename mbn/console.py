"""How commands print: tables of plain text that fit a terminal of 80 columns."""

import re
import textwrap
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from mbn.isolation import NotRun

_REASON_LENGTH = 300


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is."""
    return Console(stderr=stderr, markup=False, highlight=False)


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """Return an empty table with columns of text, then of numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for column in numbers:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def print_filled(console: Console, *tables: Table) -> None:
    """Print those tables that have rows, each with an empty line below."""
    for filled in tables:
        if filled.row_count:
            console.print(filled)
            console.print()


def not_run(head: str, reasons: Mapping[str, Iterable[NotRun]]) -> Table:
    """Return a table of who did not run and why, under the head ``head``; a reason that comes again is said once."""
    made = table(head, "why it did not run")
    for name, outcomes in reasons.items():
        for reason in dict.fromkeys(_reason(outcome) for outcome in outcomes):
            made.add_row(name, reason)
    return made


def essence(why: str) -> str:
    """Return a reason without what its place in a table says already, on one line, and short."""
    return textwrap.shorten(re.sub(r"^backend '[^']*':? (is known but )?", "", why), _REASON_LENGTH, placeholder=" ...")


def milliseconds(seconds: float) -> str:
    """Return a time as a number of milliseconds."""
    value = 1000 * seconds
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"  # noqa: PLR2004 - no exponents


def _reason(outcome: NotRun) -> str:
    return f"failed: {essence(outcome.why)}" if outcome.broken else essence(outcome.why)
