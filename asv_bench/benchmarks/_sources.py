"""Places where a data set may be, and the peak of memory while it is read.

Packages are imported where they are used; one that is missing raises NotImplementedError, which asv reads as "n/a".
"""

import importlib
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbn.commands.bench.memory import beyond_arrays

CHANNELS = 64
STEP = 2.0**-8
"""The values are multiples of it, as measured ones are of something: so a compressor has something to do."""
_ROW = 4 * CHANNELS


class Data(NamedTuple):
    """An array of (rows, CHANNELS) in float32, in chunks along its rows."""

    nbytes: int
    chunk_bytes: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.nbytes // _ROW

    @property
    def chunk(self) -> int:
        """The number of rows of a chunk; the last may have fewer."""
        return min(max(1, self.chunk_bytes // _ROW), self.rows)

    def slices(self) -> list[slice]:
        """Return the rows of each chunk."""
        return [slice(start, min(start + self.chunk, self.rows)) for start in range(0, self.rows, self.chunk)]

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Iterate over the rows of each chunk and their values, which are the same in every process."""
        for number, rows in enumerate(self.slices()):
            drawn = np.random.default_rng(number).standard_normal((rows.stop - rows.start, CHANNELS), np.float32)
            yield rows, np.rint(drawn / np.float32(STEP)) * np.float32(STEP)

    def in_memory(self) -> np.ndarray:
        """Return all values."""
        x = np.empty((self.rows, CHANNELS), np.float32)
        for rows, values in self.chunks():
            x[rows] = values
        return x


def needed(name: str) -> Any:
    """Return a package, or say that there is nothing to be measured without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotImplementedError(str(error)) from error


def write(source: str, folder: Path, data: Data) -> None:
    """Write the data set to files in a folder, chunk by chunk, if its source has any there."""
    shape, chunks, path = (data.rows, CHANNELS), (data.chunk, CHANNELS), str(folder / source)
    if source == "memmap":
        target = np.lib.format.open_memmap(f"{path}.npy", "w+", np.float32, shape)
    elif source == "zarr":
        target = needed("zarr").create_array(path, shape=shape, chunks=chunks, dtype="f4")
    elif source == "zarr, uncompressed":
        target = needed("zarr").create_array(path, shape=shape, chunks=chunks, dtype="f4", compressors=None)
    elif source.startswith("hdf5"):
        with needed("h5py").File(f"{path}.h5", "w") as file:
            compression = "gzip" if source == "hdf5, gzip" else None
            target = file.create_dataset("x", shape, "f4", chunks=chunks, compression=compression)
            for rows, values in data.chunks():
                target[rows] = values
        return
    elif source == "npy stack":
        Path(path).mkdir()
        for number, (_, values) in enumerate(data.chunks()):
            np.save(f"{path}/{number}.npy", values)
        sizes = tuple(rows.stop - rows.start for rows in data.slices())
        about = {"chunks": (sizes, (CHANNELS,)), "dtype": np.dtype("f4"), "axis": 0}
        Path(path, "info").write_bytes(pickle.dumps(about))  # as dask.array.from_npy_stack reads it
        return
    else:
        return
    for rows, values in data.chunks():
        target[rows] = values


def opened(source: str, folder: Path, data: Data) -> Any:
    """Return the array of a source, whose files have been written.

    ``numpy`` and ``dask`` are in memory; a name after ``dask, `` is that of the files that Dask reads.
    """
    if source == "numpy":
        return data.in_memory()
    if source == "memmap":
        return np.load(folder / "memmap.npy", mmap_mode="r")
    if source.startswith("zarr"):
        return needed("zarr").open_array(str(folder / source), mode="r")
    if source.startswith("hdf5"):
        return needed("h5py").File(folder / f"{source}.h5", "r")["x"]
    kind, _, other = source.partition(", ")
    if kind != "dask":
        raise ValueError(source)
    if other == "npy stack":
        return needed("dask.array").from_npy_stack(str(folder / other))
    return needed("dask.array").from_array(opened(other or "numpy", folder, data), chunks=(data.chunk, CHANNELS))


def peak(call: Callable[[], Any]) -> int | None:
    """Return the bytes by which a call's memory exceeds that before it and its results; None where Linux is not there.

    Pages of mapped files are no memory that a process needs, and are left out.
    """
    before = _pages_of_files()
    found = beyond_arrays(call)
    return None if found is None else max(0, found - max(0, _pages_of_files() - before))


def _pages_of_files() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"^RssFile:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
