"""A Sphinx extension: the figures, tables and pictures of ``gpu.md``, made from what ``asv_bench/gpu.py`` has kept.

A figure that was not measured is called so. The newest results of a GPU count.
"""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from measured import DOCS, RESULTS, Run, machine, runs, table

from mbn.commands.bench import peers, plot
from mbn.commands.bench.measurement import LIMIT
from mbn.commands.bench.report import TITLES
from mbn.commands.output import milliseconds

SECONDS, TIMES_IDEAL, PEAK = (f"gpu.Step.track_{name}" for name in ("seconds", "times_ideal", "peak"))
_LARGE = "(1048576, 256)", "(4096, 256, 1024)"
_GRAPHS = "(1024, 256) float32, CUDA graph", "(32, 64) float32, CUDA graph"
_IDEAL = "the ideal time"
_NOT_MEASURED = "not measured"
_NOTHING = "Nothing has been measured on a GPU yet: no such machine was at hand. So every figure below is a target."
_MEBIBYTE = 2**20


class Target(NamedTuple):
    """How many times as long as something else a subject may take at most."""

    subject: str
    mode: str
    against: str
    at_most: float
    inputs: tuple[str, ...] = _LARGE
    """Those whose names begin so."""


TARGETS = [
    Target("cupy", "train", _IDEAL, 1.2),
    Target("cupy", "eval", _IDEAL, 1.1),
    Target("cupy", "pullback", _IDEAL, 1.25),
    *(Target("cupy", mode, "torch.nn", 1.0, (*_LARGE, *_GRAPHS)) for mode in ("train", "backward")),
    *(Target("torch", mode, "torch.nn", 1.0) for mode in ("train", "backward")),
    *(Target("jax", mode, "flax.nnx", 1.0) for mode in ("train", "backward")),
]

Values = dict[tuple[str, ...], float]
"""By subject, mode and input."""


def setup(app: Any) -> dict[str, bool]:
    """Have everything made before anything is read."""
    app.connect("builder-inited", lambda _: generate(DOCS / "_generated", newest(RESULTS)))
    return {"parallel_read_safe": True}


def newest(results: Path) -> Run | None:
    """Return the newest results of a GPU; None where there are none."""
    found = [run for run in runs(results, SECONDS) if "gpu" in run.record["params"]]
    return found[-1] if found else None


def generate(folder: Path, run: Run | None) -> None:
    """Write ``gpu.md`` and the pictures that it shows."""
    folder.mkdir(exist_ok=True)
    seconds, ideal = (run.values(SECONDS), run.values(TIMES_IDEAL)) if run else ({}, {})
    parts = [machine(run) if run else _NOTHING, _targets(seconds, ideal)]
    if run:
        parts += [_conformance(run), *_modes(folder, seconds, ideal), _memory(run.values(PEAK))]
    (folder / "gpu.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _targets(seconds: Values, ideal: Values) -> str:
    rows = []
    for target in TARGETS:
        ratios = _ratios(target, seconds, ideal)
        count = f", the worst of {len(ratios)}" if len(ratios) > 1 else ""
        measured = f"{max(ratios):.2f}{count}" if ratios else _NOT_MEASURED
        rows.append((target.subject, TITLES[target.mode], target.against, f"{target.at_most:g}", measured))
    return table(("subject", "what", "against", "at most", "measured"), rows)


def _ratios(target: Target, seconds: Values, ideal: Values) -> list[float]:
    found = []
    for (subject, mode, x), time in seconds.items():
        if (subject, mode) == target[:2] and x.startswith(target.inputs):
            if target.against == _IDEAL:
                ratio = ideal.get((subject, mode, x))
            else:
                other = seconds.get((target.against, mode, x))
                ratio = time / other if other else None
            found += [] if ratio is None else [ratio]
    return found


def _conformance(run: Run) -> str:
    reports = run.record["gpu"]["conformance"]
    rows = [
        (
            f"`{name}`",
            *(str(sum(area[outcome] for area in report.get("areas", {}).values())) for outcome in ("passed", "failed")),
            "conforms" if report["exit_status"] == 0 else "does not conform",
        )
        for name, report in reports.items()
    ]
    return table(("backend", "passed", "failed", "`mbn conform`"), rows) if rows else f"Conformance: {_NOT_MEASURED}."


def _modes(folder: Path, seconds: Values, ideal: Values) -> list[str]:
    parts = []
    for mode, title in TITLES.items():
        times = {(subject, x): time for (subject, of, x), time in seconds.items() if of == mode and subject != LIMIT}
        inputs, subjects = (list(dict.fromkeys(key[part] for key in times)) for part in (1, 0))
        if not times:
            continue
        rows = [(x, *(_cell(times.get((name, x)), ideal.get((name, mode, x))) for name in subjects)) for x in inputs]
        _draw(times, title, inputs).savefig(folder / f"gpu-{mode}.svg", facecolor="white", metadata={"Date": None})
        parts += [f"### {title}", table(("ms (x ideal)", *subjects), rows), f"![{title}](_generated/gpu-{mode}.svg)"]
    return parts


def _cell(time: float | None, ideal: float | None) -> str:
    if time is None:
        return "-"
    return milliseconds(time) + (f" ({ideal:.2f})" if ideal else "")


def _memory(peaks: Values) -> str:
    x = f"{_LARGE[0]} float32"
    rows = [
        (
            subject,
            *(f"{peaks[subject, mode, x] / _MEBIBYTE:.1f}" if (subject, mode, x) in peaks else "-" for mode in TITLES),
        )
        for subject in dict.fromkeys(subject for subject, _, of in peaks if of == x and subject != LIMIT)
    ]
    return "\n\n".join([f"### Memory beyond inputs and outputs, for x of {x}", table(("MiB", *TITLES.values()), rows)])


def _draw(times: dict[tuple[str, str], float], title: str, inputs: list[str]) -> Figure:
    figure = Figure(figsize=(13, 2.4 * -(-len(inputs) // 3) + 1), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12))
    figure.suptitle(title, color=plot.INK, fontsize=15, fontweight="bold")
    panels = figure.subplots(-(-len(inputs) // 3), 3, squeeze=False).ravel()
    for panel in panels[len(inputs) :]:
        panel.set_visible(False)
    for panel, x in zip(panels, inputs, strict=False):
        measured = {name: 1e3 * time for (name, of), time in times.items() if of == x}
        plot.draw(panel, x, measured, measured.keys() - peers.PEERS, None)
    return figure
