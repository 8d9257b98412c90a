"""A layer as plain values, for files and other packages.

A snapshot describes a layer completely, except for its backend and device, in Python's own values and NumPy arrays.
"""

from typing import Any, NamedTuple

import numpy as np


class Snapshot(NamedTuple):
    """A layer as plain values."""

    arguments: dict[str, Any]
    """The arguments of :class:`mbn.BatchNorm1d`, except backend and device; ``dtype`` by name."""
    entries: dict[str, np.ndarray]
    """The parameters and statistics, by torch's keys."""
    training: bool
    frozen: bool
    group: Any = None
    """The group of the layer, as ``bn.group``; files have none."""
