"""Times as a picture: one panel a mode, one bar a subject, and a line for the limit."""

from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mbn.commands.bench.measurement import LIMIT, Measurement
from mbn.commands.bench.report import TITLES
from mbn.commands.output import milliseconds

INK, QUIET = "#1f2933", "#6b7785"
OURS, PEER, BOUND = "#2f7f93", "#c3ccd4", "#c8442e"


def save(measurement: Measurement, file: Path | BinaryIO) -> None:
    """Draw a measurement of which at least one subject ran, and write the picture as a PNG."""
    specs = [spec for spec in measurement.timed if spec != measurement.limit]
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.15)
    figure = Figure(figsize=(1 + 4.2 * len(measurement.modes), 1.6 + 0.42 * max(len(specs), 1)), layout=layout)
    workload = measurement.workload
    masked = ", masked" if workload.masked else ""
    figure.suptitle(f"{workload.shape} {workload.dtype}{masked}", color=INK, fontsize=15, fontweight="bold")
    panels = figure.subplots(1, len(measurement.modes), squeeze=False)[0]
    limit = measurement.timed.get(measurement.limit)
    for panel, mode in zip(panels, measurement.modes, strict=True):
        times = {spec: 1e3 * measurement.timed[spec].median(mode) for spec in specs}
        ours = set(times) - set(measurement.peers)
        draw(panel, TITLES[mode], times, ours, 1e3 * limit.median(mode) if limit else None)
    figure.savefig(file, format="png", dpi=160, facecolor="white")


def draw(panel: Axes, title: str, times: dict[str, float], ours: set[str], limit: float | None) -> None:
    """Draw times in ms as bars, the first on top, and the limit as a line."""
    names = list(times)
    bars = panel.barh(names, list(times.values()), color=[OURS if name in ours else PEER for name in names], height=0.7)
    panel.bar_label(bars, [milliseconds(time / 1e3) for time in times.values()], padding=4, color=INK, fontsize=10)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.2 * max(times.values(), default=1))
    if limit is not None:
        panel.axvline(limit, color=BOUND, linewidth=1.5)
        panel.annotate(
            LIMIT,
            (limit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            color=BOUND,
        )
    panel.set_title(f"{title}, ms", loc="left", color=INK, fontsize=12, fontweight="bold", pad=16)
    panel.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    panel.set_xticks([])
    panel.spines[:].set_visible(False)
