"""A layer as plain values: what travels into files and to other frameworks.

It has to say all that a layer is, but for where it is, in nothing but Python's own values and NumPy arrays.
"""

from typing import Any, NamedTuple

import numpy as np


class Snapshot(NamedTuple):
    """A layer of no framework."""

    arguments: dict[str, Any]
    """Those of :class:`mbn.BatchNorm1d`, but for backend and device; ``dtype`` by name."""
    entries: dict[str, np.ndarray]
    """The parameters and statistics, by torch's keys."""
    training: bool
    frozen: bool
