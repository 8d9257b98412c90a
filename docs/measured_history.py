"""A Sphinx extension: the picture and the steps of the history, made from what ``measure.py --history`` has kept."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from measured import DOCS, MARKERS, Run, runs

from mbn.commands.bench import plot
from mbn.commands.bench.measurement import LIMIT
from mbn.commands.bench.report import TITLES
from mbn.commands.bench.workloads import MODES
from mbn.commands.output import milliseconds

HISTORY = DOCS.parent / "asv_bench" / "history" / "results"
TIMES = "layer.Step.track_seconds"
_UNITS = {
    TIMES: ("ms", milliseconds),
    "layer.Overhead.track_seconds": ("ms", milliseconds),
    "imports.timeraw_import": ("ms", milliseconds),
    "layer.Agreement.track_error": ("ulp", lambda error: f"{error:.2f}"),
    "layer.Memory.track_peak": ("MiB beside the input", lambda size: f"{size / _MEBIBYTE:.0f}"),
}
"""Of the benchmarks whose steps are shown."""
_SHOWN = "(1024, 256)", "(65536, 256)"
_STEP = 1.3
"""The least factor that is called a step."""
_WINDOW = 3
"""The measurements before and after a step that must all differ by it, since a single one may be noise."""
_MEBIBYTE = 2**20

Name = tuple[str, ...]
"""Of a line: a benchmark and its parameters."""


class Step(NamedTuple):
    """A change between two measured commits that lasts."""

    name: Name
    before: float
    after: float


def setup(app: Any) -> dict[str, bool]:
    """Have the steps and the picture made before anything is read."""
    app.connect("builder-inited", lambda _: generate(DOCS / "_generated", runs(HISTORY, TIMES)))
    return {"parallel_read_safe": True}


def generate(folder: Path, history: Sequence[Run]) -> None:
    """Write ``history.svg`` and ``history.md``, of the measured commits in their order."""
    folder.mkdir(exist_ok=True)
    (folder / "history.md").write_text(_list(history) + "\n", encoding="utf-8")
    figure = Figure(figsize=(13, 7.5), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12))
    panels = figure.subplots(len(_SHOWN), len(MODES))
    for row, shape in zip(panels, _SHOWN, strict=True):
        for panel, mode in zip(row, MODES, strict=True):
            _draw(panel, f"{TITLES[mode]}, {shape}, ms", history, (mode, shape))
    lines = {line.get_label(): line for panel in figure.axes for line in panel.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(folder / "history.svg", facecolor="white", metadata={"Date": None})


def _draw(panel: Axes, title: str, history: Sequence[Run], parameters: Name) -> None:
    for backend, (marker, colour) in {**MARKERS, LIMIT: (".", plot.QUIET)}.items():
        times = [1e3 * run.values(TIMES).get((backend, *parameters), math.nan) for run in history]
        if not all(map(math.isnan, times)):
            panel.plot(times, color=colour, label=backend, linewidth=1.5, marker=marker, markersize=4)
    panel.set_yscale("log", subs=(2, 5))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_title(title, loc="left", color=plot.INK, fontsize=10, fontweight="bold")
    panel.set_xticks(range(len(history)), [_commit(run) for run in history], rotation=90, family="monospace")
    panel.tick_params(which="both", labelsize=7.5, labelcolor=plot.INK)
    panel.grid(axis="y", which="both", color=plot.PEER, linewidth=0.4)
    panel.spines[["top", "right"]].set_visible(False)


def _list(history: Sequence[Run]) -> str:
    lines = []
    for older, newer, found in steps(history):
        if found:
            lines.append(f"- `{_commit(older)}` to `{_commit(newer)}`")
        for subject, of_subject in itertools.groupby(found, lambda step: "".join(step.name[1:2])):
            lines.append(f"  - {subject or '`import mbn`'}: {'; '.join(map(_described, of_subject))}")
    return "\n".join(lines)


def steps(history: Sequence[Run]) -> Iterator[tuple[Run, Run, list[Step]]]:
    """Yield each pair of neighbours, with the changes between them.

    In a step, the last measurements before it and the first after it differ by that factor, each from each.
    """
    values = [
        {
            (benchmark, *name): value
            for benchmark in _UNITS
            for name, value in run.values(benchmark).items()
            if LIMIT not in name
        }
        for run in history
    ]
    for at in range(1, len(history)):
        found = []
        for name in values[at - 1].keys() & values[at].keys():
            before = [known[name] for known in values[max(at - _WINDOW, 0) : at] if name in known]
            after = [known[name] for known in values[at : at + _WINDOW] if name in known]
            if min(before) >= _STEP * max(after) or min(after) >= _STEP * max(before):
                found.append(Step(name, before[-1], after[0]))
        yield history[at - 1], history[at], sorted(found, key=lambda step: (step.name[1:2], step.name))


def _described(step: Step) -> str:
    benchmark, *parameters = step.name
    unit, text = _UNITS[benchmark]
    return f"{', '.join(parameters[1:])} {text(step.before)} → {text(step.after)} {unit}".lstrip()


def _commit(run: Run) -> str:
    return str(run.record["commit_hash"][:7])
