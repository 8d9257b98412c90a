"""The cost of ``fit`` over many batches, and its error against the statistics of all data at once."""

import numpy as np

import mbn
from mbn.commands.bench.workloads import Workload

from ._backends import NAMES, layer

SIZES = np.random.default_rng(3).integers(1, 64, 1000)
"""The sizes of the batches."""


class Fit:
    """A pass over a thousand unequal batches."""

    params = (NAMES, [1e6])
    param_names = ("backend", "offset")

    def setup(self, name: str, offset: float) -> None:
        workload = Workload((int(SIZES.sum()), 16))
        subject = layer(name, workload)
        self._x = np.float32(offset) + workload.x()
        self._batches = [subject.own(rows) for rows in np.split(self._x, np.cumsum(SIZES)[:-1])]
        self._layer = subject.layer
        self._fit()

    def time_fit(self, *_: object) -> None:
        self._fit()

    def track_error(self, *_: object) -> float:
        x = self._x.astype(np.float64)
        mean, var = mbn.to_numpy(self._layer.running_mean), mbn.to_numpy(self._layer.running_var)
        return float(max(_error(mean, x.mean(0)), _error(var, x.var(0, ddof=1))))

    track_error.unit = "relative"

    def _fit(self) -> None:
        self._layer.fit(self._batches, progress=False)


def _error(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the largest error relative to the truth, or to 1 where that is smaller."""
    return np.max(np.abs(found - truth) / np.maximum(np.abs(truth), 1))
