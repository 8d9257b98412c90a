"""A Sphinx extension: the tables and pictures of ``performance.md``, made from asv's results at every build.

So the page says what was measured and nothing else. The newest results count, of whatever machine.
"""

import ast
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mbn.commands.bench import peers, plot
from mbn.commands.bench.measurement import LIMIT
from mbn.commands.bench.report import TITLES
from mbn.commands.bench.workloads import MODES
from mbn.commands.output import milliseconds

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "asv_bench" / "results"
REFERENCE = "torch.nn"
"""The peer that times are compared with."""
_MEBIBYTE = 2**20
_MACHINE = {
    "gpu": "GPU",
    "gpu_memory": "its memory",
    "driver": "driver",
    "cpu": "processor",
    "num_cpu": "cores",
    "ram": "memory",
    "os": "system",
}
_ARROWS = {"train": "training", "eval": "evaluation", "backward": "forward and backward"}


class Run(NamedTuple):
    """What asv has measured of one commit on one machine."""

    record: dict[str, Any]

    def values(self, benchmark: str) -> dict[tuple[str, ...], float]:
        """Return the results of a benchmark by its parameters, without what could not be measured."""
        results, parameters, *_ = self.record["results"].get(benchmark, [[], []])
        names = itertools.product(*([str(ast.literal_eval(name)) for name in axis] for axis in parameters))
        found = zip(names, results or [], strict=False)
        return {name: value for name, value in found if value is not None and not math.isnan(value)}


def setup(app: Any) -> dict[str, bool]:
    """Have the tables and pictures made before anything is read."""
    app.connect("builder-inited", lambda _: generate(DOCS / "_generated", newest(RESULTS)))
    return {"parallel_read_safe": True}


def newest(results: Path) -> Run:
    """Return the newest results.

    Raises:
        FileNotFoundError: there are none.
    """
    found = runs(results, "side_by_side.Time.track_step")
    if not found:
        message = f"{results} holds no results: python asv_bench/measure.py"
        raise FileNotFoundError(message)
    return found[-1]


def runs(results: Path, benchmark: str) -> list[Run]:
    """Return the results with a benchmark in them, the newest last."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*/*-*.json")]
    found = [Run(record) for record in records if benchmark in record["results"]]
    return sorted(found, key=lambda run: run.record["date"])


def generate(folder: Path, run: Run) -> None:
    """Write the tables as Markdown and the pictures as SVG."""
    folder.mkdir(exist_ok=True)
    times = run.values("side_by_side.Time.track_step")
    tables = {
        "machine": machine(run),
        **{mode: _times(times, mode) for mode in MODES},
        "memory": _memory(run.values("side_by_side.Memory.track_peak")),
        "inputs": _inputs(run.values("speed.Step.time_step")),
        "overhead": _overhead(run),
        "agreement": _agreement(run),
    }
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    for mode in MODES:
        _draw(times, mode, TITLES[mode]).savefig(folder / f"{mode}.svg", facecolor="white", metadata={"Date": None})


def machine(run: Run) -> str:
    """Return a table of what was measured, and on what."""
    params = run.record["params"]
    packages = [f"{name} {version}" for name, version in run.record["requirements"].items()]
    rows = [(head, params[key]) for key, head in _MACHINE.items() if params.get(key)]
    rows += [("Python", params["python"]), ("packages", ", ".join(packages))]
    return table(("machine", params["machine"]), [*rows, ("mbn", run.record["commit_hash"][:8])])


def _times(times: dict[tuple[str, ...], float], mode: str) -> str:
    shapes = _ordered(shape for _, _, shape in times)
    subjects = [name for name in _ordered(name for name, _, _ in times) if name != LIMIT]

    def cell(subject: str, shape: str) -> str:
        time, reference = times.get((subject, mode, shape)), times.get((REFERENCE, mode, shape))
        if time is None:
            return "-"
        return milliseconds(time) + (f" ({time / reference:.2f})" if reference else "")

    rows = [(_name(subject), *(cell(subject, shape) for shape in shapes)) for subject in (*subjects, LIMIT)]
    return table((f"ms (x {REFERENCE})", *shapes), rows)


def _memory(peaks: dict[tuple[str, ...], float]) -> str:
    rows = [
        (_name(subject), *(_number(peaks.get((subject, mode, shape)), _mebibytes) for mode in MODES))
        for subject, shape in dict.fromkeys((subject, shape) for subject, _, shape in peaks)
        if subject != LIMIT
    ]
    return table(("MiB", *_ARROWS.values()), rows)


def _inputs(times: dict[tuple[str, ...], float]) -> str:
    backends = _ordered(backend for backend, _, _ in times)
    rows = [
        (
            x,
            *(
                " / ".join(_number(times.get((backend, mode, x)), milliseconds) for mode in MODES)
                for backend in backends
            ),
        )
        for x in _ordered(x for _, _, x in times)
    ]
    return table((f"ms, {' / '.join(MODES)}", *(_name(backend) for backend in backends)), rows)


def _overhead(run: Run) -> str:
    calls = run.values("overhead.Call.track_overhead")
    rows = [
        (
            _name(backend),
            *(_number(calls.get((backend, mode)), lambda time: f"{1e6 * time:.1f}") for mode in ("train", "eval")),
        )
        for backend in _ordered(backend for backend, _ in calls)
    ]
    beyond = run.values("imports.track_import_beyond_numpy").get(())
    text = table(("µs", "training", "evaluation"), rows)
    return (
        text if beyond is None else f"{text}\n\n`import mbn` takes {milliseconds(beyond)} ms beyond NumPy's own import."
    )


def _agreement(run: Run) -> str:
    quantities = {
        "train": "y, training",
        "eval": "y, evaluation",
        "running_mean": "running mean",
        "running_var": "running variance",
    }
    errors = {quantity: run.values(f"agreement.Float32.track_{quantity}") for quantity in quantities}
    keys = _ordered(key for found in errors.values() for key in found)
    rows = [
        (_name(key[0]), *(_number(found.get(key), lambda error: f"{error:.2f}") for found in errors.values()))
        for key in keys
    ]
    return table(("ulp", *quantities.values()), rows)


def _draw(times: dict[tuple[str, ...], float], mode: str, title: str) -> Figure:
    shapes = _ordered(shape for _, _, shape in times)
    figure = Figure(figsize=(13, 7), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12))
    figure.suptitle(title, color=plot.INK, fontsize=15, fontweight="bold")
    for panel, shape in zip(figure.subplots(2, 3).ravel(), shapes, strict=False):
        measured = {
            name: 1e3 * time for (name, of, at), time in times.items() if (of, at) == (mode, shape) and name != LIMIT
        }
        limit = times.get((LIMIT, mode, shape))
        plot.draw(panel, shape, measured, measured.keys() - peers.PEERS, limit and 1e3 * limit)
    return figure


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    lines = [list(head), *map(list, rows)]
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def _ordered(names: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(names))


def _name(subject: str) -> str:
    return subject if subject in peers.PEERS else f"**{subject}**"


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _mebibytes(size: float) -> str:
    return f"{size / _MEBIBYTE:.1f}"
