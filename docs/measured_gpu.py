"""A Sphinx extension: the figures, tables and pictures of ``gpu.md``, made from what ``asv_bench/gpu.py`` has kept.

Without results there are the targets alone. The newest results of a GPU count.
"""

from pathlib import Path
from typing import Any, NamedTuple

from measured import (
    BASELINE,
    DOCS,
    RESULTS,
    Run,
    axes,
    chart,
    machine,
    mebibytes,
    number,
    ratio_text,
    relative,
    runs,
    save,
    sizes,
    table,
)

from mbn.commands.bench.measurement import LIMIT
from mbn.commands.bench.report import TITLES
from mbn.commands.output import milliseconds

SECONDS, TIMES_IDEAL, PEAK = (f"gpu.Step.track_{name}" for name in ("seconds", "times_ideal", "peak"))
_LARGE = "(1048576, 256)", "(4096, 256, 1024)"
_GRAPHS = "(1024, 256) float32, CUDA graph", "(32, 64) float32, CUDA graph"
_IDEAL = "the ideal time"
_NOTHING = "Nothing of this is measured yet: no machine with a GPU was at hand. These are the targets."
_SCALE = "Times below are multiples of the time that `torch.nn.BatchNorm1d` takes for the same x: 0.5 is half of it."


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
    if run is None:
        parts = [_NOTHING, _targets({}, {})]
    else:
        parts = [machine(run), _targets(seconds, ideal), _conformance(run)]
        parts += [_SCALE, *_modes(folder, seconds, ideal), _memory(run.values(PEAK))]
    (folder / "gpu.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _targets(seconds: Values, ideal: Values) -> str:
    """Return a table of the targets, and of the worst ratio measured for each where anything was measured."""
    rows = []
    for target in TARGETS:
        row = target.subject, TITLES[target.mode], target.against, f"{target.at_most:g}"
        worst = max(_ratios(target, seconds, ideal), default=None)
        rows.append((*row, *([number(worst, ratio_text)] if seconds else [])))
    return table(("subject", "time of", "against", "at most", *(["the worst"] if seconds else [])), rows, rule="---")


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
    return table(("backend", "passed", "failed", "`mbn conform`"), rows, rule="---") if rows else ""


def _modes(folder: Path, seconds: Values, ideal: Values) -> list[str]:
    parts = []
    for mode, title in TITLES.items():
        times = {(subject, x): time for (subject, of, x), time in seconds.items() if of == mode and subject != LIMIT}
        ratios = relative(times)
        if not ratios:
            continue
        subjects, inputs = axes(ratios)
        others = [subject for subject in subjects if subject != BASELINE]
        save(chart(ratios), folder / f"gpu-{mode}.svg")
        rows = [
            (
                sizes(x),
                *(number(ratios.get((subject, x)), ratio_text) for subject in others),
                number(ideal.get((BASELINE, mode, x)), lambda times_ideal: ratio_text(1 / times_ideal)),
                milliseconds(times[BASELINE, x]),
            )
            for x in inputs
        ]
        head = f"time / {BASELINE}", *others, _IDEAL, f"{BASELINE}, ms"
        parts += [f"### {title}", table(head, rows), f"![{title}](_generated/gpu-{mode}.svg)"]
    return parts


def _memory(peaks: Values) -> str:
    x = f"{_LARGE[0]} float32"
    rows = [
        (subject, *(number(peaks.get((subject, mode, x)), mebibytes) for mode in TITLES))
        for subject in dict.fromkeys(subject for subject, _, of in peaks if of == x and subject != LIMIT)
    ]
    return "\n\n".join([f"### Memory beyond inputs and outputs, for x of {x}", table(("MiB", *TITLES.values()), rows)])
