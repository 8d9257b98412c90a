"""A measurement as tables for people: 80 columns wide, nothing cut off, and ASCII alone for every terminal and log."""

from rich.console import Console
from rich.table import Table

from mbn.commands.bench.measurement import Measurement, Timed
from mbn.commands.bench.workloads import PULLBACK, Workload
from mbn.commands.output import milliseconds, not_run, print_filled, table
from mbn.commands.processes import NotRun

_EXPLANATION = """\
Medians over rounds in which each subject had a turn, in a process of its own. "x copy": the time in copies of x, the \
limit. "MiB more": the peak of memory in a call beyond inputs and outputs. "ms first": the first call, with compilation.
"""
TITLES = {
    "train": "Training, forward",
    "eval": "Evaluation",
    "backward": "Training, forward and backward",
    PULLBACK: "Training, backward alone",
}
_MEBIBYTE = 2**20


def show(console: Console, measurement: Measurement) -> None:
    """Print the subjects that ran, those that did not, and a table for each mode."""
    reasons = {spec: [found] for spec, found in measurement.subjects.items() if isinstance(found, NotRun)}
    print_filled(console, _subjects(measurement), not_run("subject", reasons))
    if not measurement.timed:
        return
    console.print(described(measurement.workload), style="bold")
    console.print(_EXPLANATION)
    for mode in measurement.modes:
        console.print(TITLES[mode], style="bold")
        print_filled(console, _times(measurement, mode))


def described(workload: Workload) -> str:
    """Return the shape and dtype of x, and the other arguments of the workload that are not the default."""
    parts = [f"x of {workload.shape} {workload.dtype}"]
    parts += [f"axis {workload.axis}"] if workload.axis != 1 else []
    parts += ["every third position masked"] if workload.masked else []
    return ", ".join(parts)


def _subjects(measurement: Measurement) -> Table:
    made = table("subject", "version", "device")
    for spec, timed in measurement.timed.items():
        made.add_row(spec, timed.prepared.version, timed.prepared.device)
    return made


def _times(measurement: Measurement, mode: str) -> Table:
    fastest = measurement.fastest_peer(mode)
    made = table("subject", numbers=("ms", f"x {fastest or 'peer'}", "x copy", "MiB more", "ms first"))
    for spec, timed in measurement.timed.items():
        made.add_row(
            spec,
            milliseconds(timed.median(mode)),
            _ratio(measurement, timed, mode, fastest),
            _ratio(measurement, timed, mode, measurement.limit),
            _mebibytes(timed.prepared.memory[mode]),
            milliseconds(timed.prepared.first_call[mode]),
            style="dim" if spec in measurement.peers else None,
        )
    return made


def _ratio(measurement: Measurement, timed: Timed, mode: str, peer: str | None) -> str:
    other = measurement.timed.get(peer or "")
    return f"{timed.ratio(mode, other):.2f}" if other else "-"


def _mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / _MEBIBYTE:.1f}"
