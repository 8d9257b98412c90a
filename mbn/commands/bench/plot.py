"""Times as a picture: a panel for each mode, a bar for each subject, and on a log scale the copy as the baseline."""

import textwrap
from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mbn.commands.bench.measurement import LIMIT, Measurement
from mbn.commands.bench.report import TITLES, described
from mbn.commands.output import milliseconds

INK, QUIET = "#1f2933", "#6b7785"
OURS, PEER, BOUND = "#2f7f93", "#c3ccd4", "#c8442e"
_TIMES = "\N{MULTIPLICATION SIGN}"
_FACTORS = {False: (1, 2, 5), True: (1,)}
"""The multiples of powers of ten that the axis names: all on a short axis, and on a long one the powers alone."""
_LONG = 100
"""The ratio of the longest to the shortest time on a long axis."""
_LETTERS = 9
"""Letters of the title that fit an inch."""
_MARGINS = 0.06, 0.45
"""The empty parts of the axis on the left and, for the figures, on the right, as shares of the bars' part."""


def save(measurement: Measurement, file: Path | BinaryIO) -> None:
    """Draw a measurement of which at least one subject ran, and write the picture as a PNG."""
    specs = [spec for spec in measurement.timed if spec != measurement.limit]
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.15)
    figure = Figure(figsize=(1 + 4.8 * len(measurement.modes), 2.1 + 0.42 * max(len(specs), 1)), layout=layout)
    title = textwrap.fill(f"mbn bench: {described(measurement.workload)}", int(_LETTERS * figure.get_figwidth()))
    figure.suptitle(title, color=INK, fontsize=14, fontweight="bold")
    panels = figure.subplots(1, len(measurement.modes), squeeze=False)[0]
    limit = measurement.timed.get(measurement.limit)
    for panel, mode in zip(panels, measurement.modes, strict=True):
        times = {spec: 1e3 * measurement.timed[spec].median(mode) for spec in specs}
        ours = set(times) - set(measurement.peers)
        draw(panel, TITLES[mode], times, ours, 1e3 * limit.median(mode) if limit else None)
    figure.savefig(file, format="png", dpi=160, facecolor="white")


def draw(panel: Axes, title: str, times: dict[str, float], ours: set[str], limit: float | None) -> None:
    """Draw times in ms as bars on a log scale, the first on top.

    Bars start at the time of the copy, the ``limit``, and their figures are in ms and in multiples of it. Without a
    limit they start at half the shortest time.
    """
    base = limit or min(times.values(), default=2.0) / 2
    names = list(times)
    panel.set_xscale("log")
    colours = [OURS if name in ours else PEER for name in names]
    panel.barh(names, [time - base for time in times.values()], left=base, color=colours, height=0.7)
    for name, time in times.items():
        figure = f"{milliseconds(time / 1e3)}{f'  {_ratio(time / limit)}' if limit else ''}"
        at = max(time, base), name
        panel.annotate(
            figure, at, xytext=(4, 0), textcoords="offset points", va="center", color=INK, fontsize=10, zorder=3
        )
    panel.invert_yaxis()
    low, high = min([base, *times.values()]), max([2 * base, *times.values()])
    panel.set_xlim(low / (high / low) ** _MARGINS[0], high * (high / low) ** _MARGINS[1])
    panel.xaxis.set_minor_locator(NullLocator())
    factors = _FACTORS[high > _LONG * low]
    ratios = [factor * 10.0**exponent for exponent in range(-3, 6) for factor in factors]
    panel.xaxis.set_major_locator(FixedLocator([limit * ratio for ratio in ratios] if limit else []))
    panel.set_title(f"{title}, ms", loc="left", color=INK, fontsize=12, fontweight="bold", pad=16)
    panel.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    panel.tick_params(axis="x", labelsize=9, labelcolor=QUIET)
    panel.spines[:].set_visible(False)
    if limit is None:
        return
    panel.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time / limit:g}{_TIMES}"))
    panel.set_xlabel(f"times as long as the {LIMIT}", color=QUIET, fontsize=9)
    panel.grid(axis="x", color=PEER, linewidth=0.6, alpha=0.6)
    panel.set_axisbelow(True)
    panel.axvline(limit, color=BOUND, linewidth=1.5)
    panel.annotate(
        f"{LIMIT} {milliseconds(limit / 1e3)}",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, 2),
        textcoords="offset points",
        color=BOUND,
    )


def _ratio(ratio: float) -> str:
    return f"{ratio:.2g}{_TIMES}" if ratio < 10 else f"{ratio:.0f}{_TIMES}"
