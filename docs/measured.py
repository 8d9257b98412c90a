"""A Sphinx extension: the tables and pictures of ``performance.md``, made from asv's results at every build.

So the page says what was measured and nothing else. The newest results that have all its figures count, of whatever
machine. Times are shown as multiples of the time of one peer.
"""

import ast
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mbn.commands.bench import peers
from mbn.commands.bench.measurement import LIMIT
from mbn.commands.bench.replica import ALONE, GATHER, SHARED
from mbn.commands.bench.report import TITLES
from mbn.commands.bench.workloads import FORWARD, MODES
from mbn.commands.output import milliseconds

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "asv_bench" / "results"
BASELINE = "torch.nn"
"""The peer whose times are 1."""
_TIME, _MEMORY, _INPUTS = "side_by_side.Time.track_step", "side_by_side.Memory.track_peak", "speed.Step.time_step"
_REPLICAS = "replicas.Replicas.track_step"
_OVERHEAD, _IMPORT = "overhead.Call.track_overhead", "imports.track_import_beyond_numpy"
_AGREEMENT = {
    f"agreement.Float32.track_{quantity}": title
    for quantity, title in {
        "train": "y, training",
        "eval": "y, evaluation",
        "running_mean": "running mean",
        "running_var": "running variance",
    }.items()
}
_SHOWN = (_TIME, _MEMORY, _INPUTS, _OVERHEAD, _IMPORT, *_AGREEMENT)
"""The benchmarks that the page shows."""
_PLAIN = "numpy", "(65536, 256)"
"""The backend and the input whose time per value is 1 among all inputs."""
_MEBIBYTE = 2**20
_TIMES = " \N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}"
_MACHINE = {
    "gpu": "GPU",
    "gpu_memory": "its memory",
    "driver": "driver",
    "cpu": "processor",
    "num_cpu": "cores",
    "ram": "memory",
    "os": "system",
}
_INK, _QUIET, _BAND = "#1f2933", "#6b7785", "#f1f4f6"
MARKERS = {
    "numpy": ("o", "#0072b2"),
    "numba": ("s", "#e69f00"),
    "torch": ("^", "#d55e00"),
    "jax": ("D", "#009e73"),
    "cupy": ("P", "#cc79a7"),
    "flax.nnx": ("v", _QUIET),
    "formula": ("X", _QUIET),
}

Ratios = dict[tuple[str, str], float]
"""Times as multiples of the baseline's, by subject and input."""


class Run(NamedTuple):
    """What asv has measured of one commit on one machine."""

    record: dict[str, Any]

    def values(self, benchmark: str) -> dict[tuple[str, ...], float]:
        """Return the results of a benchmark by its parameters, without what could not be measured."""
        # asv leaves out what it has nothing to say of: all of a benchmark that failed, or its parameters.
        results, parameters, *_ = [*(self.record["results"].get(benchmark) or []), None, None]
        names = itertools.product(*([str(ast.literal_eval(name)) for name in axis] for axis in parameters or []))
        found = zip(names, results or [], strict=False)
        return {name: value for name, value in found if value is not None and not math.isnan(value)}


def setup(app: Any) -> dict[str, bool]:
    """Have the tables and pictures made before anything is read."""
    app.connect(
        "builder-inited", lambda _: generate(DOCS / "_generated", newest(RESULTS), runs(RESULTS, _REPLICAS)[-1])
    )
    return {"parallel_read_safe": True}


def newest(results: Path) -> Run:
    """Return the newest results that have every figure of the page.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [run for run in runs(results, _TIME) if all(run.values(benchmark) for benchmark in _SHOWN)]
    if not found:
        message = f"{results} holds no results of all benchmarks: python asv_bench/measure.py"
        raise FileNotFoundError(message)
    return found[-1]


def runs(results: Path, benchmark: str) -> list[Run]:
    """Return the results with a benchmark in them, the newest last."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*/*-*.json")]
    found = [Run(record) for record in records if benchmark in record["results"]]
    return sorted(found, key=lambda run: run.record["date"])


def generate(folder: Path, run: Run, of_replicas: Run) -> None:
    """Write the tables as Markdown and the pictures as SVG, the table of replicas from results that may be others."""
    folder.mkdir(exist_ok=True)
    times = run.values(_TIME)
    tables = {
        "machine": machine(run),
        "memory": _memory(run.values(_MEMORY)),
        "inputs": _inputs(run.values(_INPUTS)),
        "overhead": _overhead(run),
        "agreement": _agreement(run),
        "replicas": _replicas(of_replicas),
    }
    for mode in MODES:
        of_mode = {(name, shape): time for (name, of, shape), time in times.items() if of == mode}
        tables[mode] = _times(of_mode)
        shown = {key: time for key, time in of_mode.items() if key[0] != LIMIT}
        save(chart(relative(shown)), folder / f"{mode}.svg")
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def machine(run: Run) -> str:
    """Return a table of what was measured, and on what."""
    params = run.record["params"]
    packages = [f"{name} {version}" for name, version in run.record["requirements"].items()]
    rows = [(head, params[key]) for key, head in _MACHINE.items() if params.get(key)]
    rows += [("Python", params["python"]), ("packages", ", ".join(packages))]
    return table(("machine", params["machine"]), [*rows, ("mbn", run.record["commit_hash"][:8])], rule="---")


def relative(times: dict[tuple[str, str], float]) -> Ratios:
    """Return times by subject and input as multiples of the baseline's on that input, where it was measured."""
    return {(subject, x): time / times[BASELINE, x] for (subject, x), time in times.items() if times.get((BASELINE, x))}


def _times(times: dict[tuple[str, str], float]) -> str:
    subjects, shapes = axes(times)
    ratios = relative(times)
    rows = [
        (_name(subject), *(number(ratios.get((subject, shape)), ratio_text) for shape in shapes))
        for subject in (*(name for name in subjects if name not in {BASELINE, LIMIT}), LIMIT)
    ]
    rows.append((f"{BASELINE}, ms", *(number(times.get((BASELINE, shape)), milliseconds) for shape in shapes)))
    return table((f"time / {BASELINE}", *map(sizes, shapes)), rows)


def _memory(peaks: dict[tuple[str, ...], float]) -> str:
    rows = [
        (_name(subject), *(number(peaks.get((subject, mode, shape)), mebibytes) for mode in MODES))
        for subject, shape in dict.fromkeys((subject, shape) for subject, _, shape in peaks)
        if subject != LIMIT
    ]
    return table(("MiB", *(TITLES[mode] for mode in MODES)), rows)


def _inputs(times: dict[tuple[str, ...], float]) -> str:
    """Return a table for each mode: the time per value as a multiple of that of a plain input on NumPy."""
    backends, inputs = (_ordered(key[part] for key in times) for part in (0, 2))
    per_value = {key: time / _values(key[2]) for key, time in times.items()}
    tables = []
    for mode in MODES:
        unit = per_value.get((_PLAIN[0], mode, _PLAIN[1]))
        ratios = {} if unit is None else {key: time / unit for key, time in per_value.items()}
        rows = [
            (sizes(x), *(number(ratios.get((backend, mode, x)), ratio_text) for backend in backends)) for x in inputs
        ]
        tables.append(table(("time per value", *map(_name, backends)), rows, caption=TITLES[mode]))
    return "\n\n".join(tables)


def _overhead(run: Run) -> str:
    calls = run.values(_OVERHEAD)
    rows = [
        (_name(backend), *(number(calls.get((backend, mode)), lambda time: f"{1e6 * time:.1f}") for mode in FORWARD))
        for backend in _ordered(backend for backend, _ in calls)
    ]
    beyond = run.values(_IMPORT).get(())
    text = table(("µs", *(TITLES[mode] for mode in FORWARD)), rows)
    return (
        text if beyond is None else f"{text}\n\n`import mbn` takes {milliseconds(beyond)} ms beyond NumPy's own import."
    )


def _agreement(run: Run) -> str:
    errors = [run.values(benchmark) for benchmark in _AGREEMENT]
    keys = _ordered(key for found in errors for key in found)
    rows = [
        (_name(key[0]), *(number(found.get(key), lambda error: f"{error:.2f}") for found in errors)) for key in keys
    ]
    return table(("ulp", *_AGREEMENT.values()), rows)


def _replicas(run: Run) -> str:
    times, more = run.values(_REPLICAS), "more"
    rows = [
        (
            _name(backend),
            TITLES[mode],
            sizes(shape),
            *(number(times.get((backend, mode, what, shape)), microseconds) for what in (ALONE, SHARED, more, GATHER)),
        )
        for backend, mode, shape in _ordered((backend, mode, shape) for backend, mode, _, shape in times)
    ]
    return table(("µs", "step", "x of each process", "alone", "shared", "shared less alone", "bare gather"), rows)


def chart(ratios: Ratios) -> Figure:
    """Draw times as dots on a logarithmic scale, a band for each input; the baseline is a line."""
    subjects, inputs = axes(ratios)
    subjects = [name for name in subjects if name != BASELINE]
    figure = Figure(figsize=(5.6, 1.5 + 0.13 * len(inputs) * (len(subjects) + 1)), layout="constrained")
    panel = figure.subplots()
    for row in range(0, len(inputs), 2):
        panel.axhspan(row - 0.5, row + 0.5, color=_BAND, linewidth=0)
    panel.axvline(1, color=_INK, linewidth=1.5, label=f"{BASELINE} = 1")
    for index, subject in enumerate(subjects):
        marker, color = MARKERS[subject]
        offset = (index + 1) / (len(subjects) + 1) - 0.5
        found = [(row + offset, ratios[subject, x]) for row, x in enumerate(inputs) if (subject, x) in ratios]
        rows, values = zip(*found, strict=True)
        panel.hlines(rows, 1, values, color=color, linewidth=1.2)
        panel.plot(values, rows, marker, color=color, markersize=7, label=subject)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(LogLocator(2, numticks=12))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(axis="x", color="#d5dbe0", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_yticks(range(len(inputs)), ["\n".join(wrap(sizes(x), 15)) for x in inputs])
    panel.set_ylim(len(inputs) - 0.5, -0.5)
    panel.tick_params(length=0, labelsize=11, labelcolor=_INK)
    panel.spines[:].set_visible(False)
    panel.set_xlabel(f"time / {BASELINE}: further left is faster", color=_INK, fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=11, handletextpad=0.3, columnspacing=1)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture whose file is the same at every build."""
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, caption: str = "", rule: str = "---:") -> str:
    """Return a table as Markdown; the columns after the first, unless the rule says otherwise, have figures."""
    first, *others = [list(head), *map(list, rows)]
    ruled = [first, ["---", *[rule] * (len(first) - 1)], *others]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in ruled)
    return f"```{{table}} {caption}\n{lines}\n```" if caption else lines


def axes(values: Ratios) -> tuple[list[str], list[str]]:
    """Return the subjects and the inputs of values by both, each once and in their order."""
    return _ordered(subject for subject, _ in values), _ordered(x for _, x in values)


def sizes(x: str) -> str:
    """Return the name of an input with its shape in a form that can be broken into lines."""
    shape, _, rest = x.removeprefix("(").partition(")")
    return _TIMES.join(shape.split(", ")) + rest


def ratio_text(ratio: float) -> str:
    """Return a ratio with as many digits as matter."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def number(value: float | None, text: Callable[[float], str]) -> str:
    """Return a figure as text, or a dash for one that was not measured."""
    return "-" if value is None else text(value)


def microseconds(seconds: float) -> str:
    """Return a time as a number of microseconds."""
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-5 else f"{1e6 * seconds:.1f}"


def mebibytes(size: float) -> str:
    """Return a size in bytes as a number of MiB."""
    return f"{size / _MEBIBYTE:.1f}"


def _values(x: str) -> int:
    return math.prod(ast.literal_eval(x.partition(")")[0] + ")"))


def _ordered(names: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(names))


def _name(subject: str) -> str:
    return subject if subject in peers.PEERS else f"**{subject}**"
