"""Agreement as a picture: the largest differences between backends and from the reference, beside the bounds.

Each quantity has a panel, and each pair a cell: its largest difference over the examples, in ulp as a number and as a
share of the bound as a colour.
"""

import os
import textwrap
import warnings
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mbn.commands.compare.comparison import Comparison, bounds, ran
from mbn.commands.compare.messages import QUANTITIES
from mbn.commands.compare.report import format_ulp

_REFERENCE = "reference"
_TITLES = dict(
    zip(QUANTITIES, ("Training output", "Evaluation output", "Running mean", "Running variance"), strict=True)
)
_INK, _QUIET = "#1f2933", "#6b7785"
_SHADES = ("#eef5f5", "#b9dcda", "#6fb3b8", "#2f7f93", "#14475f")
_BEYOND = "#c8442e"
_LETTERS, _LINE, _EXAMPLES = 9, 0.2, 6
"""Letters of the title that fit an inch, inches of a line of it, and examples that it names."""


def save(comparisons: list[Comparison], file: Path | BinaryIO) -> None:
    """Draw the comparisons of backends of which at least one ran, and write the picture as a PNG."""
    names = [_REFERENCE, *ran(comparisons)]
    colours = LinearSegmentedColormap.from_list("agreement", _SHADES).with_extremes(over=_BEYOND)
    cell = max(0.85, 0.095 * max(map(len, names[:-1])))  # inches: the labels must not touch
    side = 1.4 + cell * (len(names) - 1)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.15, hspace=0.08, wspace=0.08)
    width = max(2 * side + 0.6, 6)
    data = _data(comparisons, width)
    figure = Figure(figsize=(width, 2 * side + 2.2 + _LINE * len(data)), layout=layout)
    title = "\n".join(["Largest differences, in ulp", *data])
    figure.suptitle(title, color=_INK, fontsize=11.5, fontweight="bold")
    panels = figure.subplots(2, 2).ravel()
    for panel, quantity in zip(panels, QUANTITIES, strict=True):
        _draw(panel, names, quantity, comparisons, colours)
    _draw_scale(figure, list(panels), colours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # in the name of a file
        figure.savefig(file, format="png", dpi=160, facecolor="white")


def _data(comparisons: list[Comparison], width: float) -> list[str]:
    """Return lines with the file, shape and dtype of each example, for a picture of a width in inches."""
    titles = []
    for example in (comparison.example for comparison in comparisons):
        rows = f", {len(example.x):,} of its {example.total_rows:,} rows" if example.total_rows else ""
        titles.append(os.fsencode(f"{example.title}{rows}").decode(errors="replace"))  # a file's name may be any bytes
    more = [f"and {len(titles) - _EXAMPLES} more"] * (len(titles) > _EXAMPLES)
    return [line for title in [*titles[:_EXAMPLES], *more] for line in textwrap.wrap(title, int(width * _LETTERS))]


def _draw(panel: Axes, names: list[str], quantity: str, comparisons: list[Comparison], colours: Colormap) -> None:
    limits = sorted({bounds(comparison.example)[quantity] for comparison in comparisons})
    worst = {pair: _worst(*pair, quantity, comparisons) for pair in combinations(names, 2)}
    size = len(names) - 1
    shares = np.full((size, size), np.nan)
    for (a, b), (share, ulp) in worst.items():
        row, column = names.index(b) - 1, names.index(a)
        shares[row, column] = share
        ink = _INK if share < 0.6 else "white"
        panel.text(column, row, format_ulp(ulp), ha="center", va="center", color=ink, fontsize=13)
    panel.imshow(shares, cmap=colours, vmin=0, vmax=1)
    panel.set_xticks(range(size), names[:-1])
    panel.set_yticks(range(size), names[1:])
    panel.tick_params(length=0, labelsize=11, labelcolor=_INK)
    panel.spines[:].set_visible(False)
    # White lines between the cells, drawn as the grid of minor ticks.
    panel.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    panel.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=3)
    panel.tick_params(which="minor", length=0)
    panel.set_title(_TITLES[quantity], loc="left", color=_INK, fontsize=13, fontweight="bold", pad=22)
    bound = f"bound: {' or '.join(f'{limit:g}' for limit in limits)} ulp"
    panel.text(0, 1, bound, transform=panel.transAxes, color=_QUIET, fontsize=10.5, va="bottom")


def _worst(a: str, b: str, quantity: str, comparisons: list[Comparison]) -> tuple[float, float]:
    """Return the largest distance of a pair, as a share of its bound and in ulp; NaN where no example has both."""
    distances = [
        (ulps[quantity] / bounds(comparison.example)[quantity], ulps[quantity])
        for comparison in comparisons
        if (ulps := comparison.errors.get(b) if a == _REFERENCE else comparison.distances.get((a, b)))
    ]
    return max(distances, default=(np.nan, np.nan))


def _draw_scale(figure: Figure, panels: list[Axes], colours: Colormap) -> None:
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colours),
        ax=panels,
        location="bottom",
        extend="max",
        fraction=0.035,
        aspect=32,
        shrink=0.8,
    )
    scale.set_ticks([0, 1], labels=["identical", "bound"])
    scale.ax.tick_params(length=0, labelsize=11, labelcolor=_INK)
    scale.outline.set_visible(False)
