"""A comparison as tables for people: 80 columns wide, nothing cut off, and ASCII alone for every terminal and log."""

import math

from rich.console import Console
from rich.table import Table

from mbn.commands.compare.comparison import NOTHING_RAN, Comparison, Ulps, Verdict, bounds, largest, ran
from mbn.commands.compare.messages import QUANTITIES, Measured
from mbn.commands.output import milliseconds, not_run, print_filled, table
from mbn.commands.processes import NotRun

_HEADS = ("y train", "y eval", "running_mean", "running_var")


def show(console: Console, comparisons: list[Comparison], verdict: Verdict) -> None:
    """Print the backends, the errors and times of each example, the distances between backends and the verdict."""
    print_filled(console, _backends(comparisons), _not_run(comparisons))
    if verdict.exit_code != NOTHING_RAN:
        console.print("Largest error against the exact reference, in ulp; median time of a call, in ms:\n")
        for number, comparison in enumerate(comparisons, 1):
            console.print(f"{number}. {comparison.example.title}", style="bold")
            if comparison.example.sampled:
                console.print(comparison.example.sampled)
            print_filled(console, _example(comparison, ran(comparisons)))
    pairs = _pairs(comparisons)
    if pairs.row_count:
        console.print("Largest distance between backends over these examples, in ulp", style="bold")
        print_filled(console, pairs)
    console.print(verdict.text, style="bold red" if verdict.exit_code else "bold green")


def _backends(comparisons: list[Comparison]) -> Table:
    made = table("backend", "version", "device")
    for name in ran(comparisons):
        outcomes = (comparison.outcomes[name] for comparison in comparisons)
        measured = next(outcome for outcome in outcomes if isinstance(outcome, Measured))
        made.add_row(name, measured.version, measured.device)
    return made


def _not_run(comparisons: list[Comparison]) -> Table:
    outcomes = {name: [comparison.outcomes[name] for comparison in comparisons] for name in comparisons[0].outcomes}
    reasons = {name: [other for other in several if isinstance(other, NotRun)] for name, several in outcomes.items()}
    return not_run("backend", reasons)


def _example(comparison: Comparison, backends: list[str]) -> Table:
    made = table("backend", numbers=(*_HEADS, "ms train", "ms eval"))
    for name in backends:
        made.add_row(name, *_figures(comparison, name))
    made.add_row("bound", *(f"{limit:g}" for limit in bounds(comparison.example).values()), style="dim")
    return made


def _figures(comparison: Comparison, name: str) -> list[str]:
    outcome = comparison.outcomes[name]
    if isinstance(outcome, NotRun):
        return ["-"] * 6
    times = (outcome.seconds[mode] for mode in ("train", "eval"))
    return [*_ulps(comparison.errors[name]), *(milliseconds(seconds) for seconds in times)]


def _pairs(comparisons: list[Comparison]) -> Table:
    made = table("backends", numbers=_HEADS)
    for pair in dict.fromkeys(pair for comparison in comparisons for pair in comparison.distances):
        distances = [comparison.distances[pair] for comparison in comparisons if pair in comparison.distances]
        made.add_row(" - ".join(pair), *_ulps(largest(distances)))
    return made


def _ulps(ulps: Ulps) -> list[str]:
    return [format_ulp(ulps[quantity]) for quantity in QUANTITIES]


def format_ulp(ulp: float) -> str:
    """Return an error as text. 0 stands for an exact 0 alone: a small error is 0.00."""
    if ulp == 0 or math.isinf(ulp):
        return f"{ulp:.0f}"
    return f"{ulp:.2f}" if ulp < 1000 else f"{ulp:.1e}"
