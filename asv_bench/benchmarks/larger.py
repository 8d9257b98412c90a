"""``fit`` by the place of the data set, and evaluation of a lazy array: time, and the peak of memory."""

from pathlib import Path
from tempfile import TemporaryDirectory

import mbn

from ._sources import CHANNELS, Data, opened, peak, write

SOURCES = ["numpy", "memmap", "zarr", "hdf5", "dask"]
"""An array in memory, those of files, and one of Dask's blocks in memory, on threads."""
DATA = Data(2**27, 2**24)
"""128 MiB in chunks of 16."""


class _Source:
    def setup(self, source: str) -> None:
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        write(source, folder, DATA)
        self._x = opened(source, folder, DATA)
        self._layer = mbn.BatchNorm1d(CHANNELS, backend="numpy").eval()
        self._call()

    def teardown(self, *_: object) -> None:
        self._folder.cleanup()

    def track_peak(self, *_: object) -> int | None:
        return peak(self._call)

    track_peak.unit = "bytes"


class Fit(_Source):
    """A pass over the data set."""

    params = (SOURCES,)
    param_names = ("source",)
    version = "1"

    def time_fit(self, *_: object) -> None:
        self._call()

    def _call(self) -> None:
        self._layer.fit(self._x, progress=False)


class Evaluate(_Source):
    """Evaluation in memory, whole and by Dask's blocks."""

    params = (["numpy", "dask"],)
    param_names = ("source",)
    version = "1"

    def time_evaluate(self, *_: object) -> None:
        self._call()

    def _call(self) -> object:
        y = self._layer(self._x)
        return y.compute() if hasattr(y, "compute") else y
