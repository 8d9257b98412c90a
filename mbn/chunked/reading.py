"""Arrays in pieces: those in memory, mapped files, and arrays in files, such as those of zarr and h5py.

The pieces depend on the array alone, so that statistics have the same bits on every run. Of an array in a file each
stored chunk is read once, and the next piece is read while the caller works with the last one.
"""

import math
import mmap
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from mbn import checks
from mbn.contract import Settings

_SLICE = 1 << 25
"""Bytes of a piece of an array in memory or of a mapped file, or those of one row if a row has more."""
_PIECE = 1 << 23
"""Bytes of a piece of an array in a file, or those of one chunk if a chunk has more.

There are two pieces in memory, and a library that decompresses a chunk has it a second time.
"""
_SMALL = 1 << 20
"""Bytes of a piece that is large enough to be worth a call of the library that reads it."""


class Piece(NamedTuple):
    """A part of an array."""

    values: Any
    nbytes: int
    box: tuple[slice, ...]
    """Where it is in the array: a slice for each axis."""
    channels: range | None
    """The channels that it has, or None for all."""


class Pieces:
    """An array in pieces, of which one at a time has to be in memory.

    A framework's array is one piece: all of it is in memory already, perhaps on several devices. NumPy's array, or a
    mapped file, has slices along its first axis. Of any other array, each piece is read: it is made of whole chunks,
    along all axes, or is a slice if there are no chunks.

    Args:
        array: with shape, dtype and slices.
        settings: those of the layer, for the axis of the channels.
        splits_channels: whether pieces may have some of the channels alone; otherwise they have all of them, even if
            chunks divide the channels and the piece becomes larger than it has to be.
        unit: a shape that divides the array in place of its own chunks.

    Raises:
        ValueError: ``array`` has not two or three axes.
    """

    def __init__(
        self, array: Any, settings: Settings, *, splits_channels: bool = True, unit: tuple[int, ...] | None = None
    ) -> None:
        if array.shape is None:
            raise ValueError("x is an empty dataset, without a shape; BatchNorm1d takes (N, C) or (N, C, L).")
        self._array, self.shape = array, tuple(map(int, array.shape))
        checks.rank(self.shape, settings.axis)
        self.is_read = not hasattr(array, "__dlpack__")
        self._origin = getattr(array, "__wrapped__", array) if self.is_read else array
        self._is_alone = _package(self._origin) == "h5py" and _is_locked()
        self._itemsize = itemsize = getattr(getattr(array, "dtype", None), "itemsize", 8)
        self.nbytes = math.prod(self.shape) * itemsize
        if not self.is_read and not isinstance(array, np.ndarray):
            unit = self.shape
        axis = settings.axis % len(self.shape)
        unit = unit or (_unit(array, len(self.shape), itemsize) if self.is_read else None) or (1, *self.shape[1:])
        size = [max(min(given, length), 1) for given, length in zip(unit, self.shape, strict=True)]
        if not splits_channels:
            size[axis] = max(self.shape[axis], 1)
        self._axis, self._size = axis, _grown(size, self.shape, axis, itemsize, _PIECE if self.is_read else _SLICE)

    def __len__(self) -> int:
        return math.prod(len(starts) for starts in self._starts())

    def __iter__(self) -> Generator[Piece]:
        """Iterate over all pieces, those of the first channels first. Close the generator to end the thread it has."""
        boxes = self._boxes()
        if not self.is_read:
            whole = len(self) == 1
            self._check_file()
            for box in boxes:
                yield self._piece(self._array if whole else self._read(box), box)
            return
        # Before anything is read, an empty slice shows what the pieces are.
        nothing = (slice(0, 0), *(slice(0, length) for length in self.shape[1:]))
        yield Piece(self._own(self._array[:0]), 0, nothing, None)
        if 0 in self.shape:
            return
        with ThreadPoolExecutor(1, "mbn-reading") as reader:
            box = next(boxes)
            result = self._begin(box, reader)
            for following in boxes:
                values = result()
                result = self._begin(following, reader)
                yield self._piece(values, box)
                del values  # so that it is freed before the next one has been read
                box = following
            yield self._piece(result(), box)
        self._check_store()

    def _begin(self, box: tuple[slice, ...], reader: ThreadPoolExecutor) -> Callable[[], Any]:
        """Begin to read a piece, and return the function that waits for it."""
        if self._is_alone:
            return partial(self._read, box)
        try:
            future = reader.submit(copy_context().run, self._read, box)
        except RuntimeError:  # the system has no more threads
            return partial(self._read, box)

        def result() -> Any:
            with suppress(Exception):  # perhaps the reader works in the caller's thread alone, or fails there too
                return future.result()
            self._is_alone = True
            return self._read(box)

        return result

    def _read(self, box: tuple[slice, ...]) -> Any:
        """Return the values of a box."""
        shape = tuple(part.stop - part.start for part in box)
        self._check_file()
        last = max((axis for axis in range(len(box)) if shape[axis] < self.shape[axis]), default=0)
        try:
            self._check_shape(self._array.shape)
            values = self._own(self._array[box[0] if last == 0 else box[: last + 1]])
        except Exception as error:
            error.add_note(f"It was raised by the read of x[{_shown(box)}], where x has shape {self.shape}.")
            raise
        if tuple(values.shape) != shape:
            raise ValueError(f"x[{_shown(box)}] has shape {tuple(values.shape)} and not {shape}: {_CHANGED}")
        return values

    def _own(self, values: Any) -> Any:
        """Return the values of a slice, which some libraries, such as xarray, read only when asked for an array."""
        is_lazy = self.is_read and type(values) is type(self._array) and not hasattr(values, "__array_namespace__")
        return np.asarray(values) if is_lazy and hasattr(values, "dtype") and hasattr(values, "__array__") else values

    def _check_file(self) -> None:
        """Check that a mapped file is as long as it was: to read beyond its end would kill the process."""
        mapped = _mapped(self._origin)
        if mapped is None:
            return
        start = mapped.offset - mapped.offset % mmap.ALLOCATIONGRANULARITY
        needed, given = start + len(mapped._mmap), mapped._mmap.size()  # type: ignore[attr-defined] # noqa: SLF001
        if given < needed:
            raise ValueError(f"the file of x has {given} bytes, and {needed} are mapped: {_CHANGED}")

    def _check_store(self) -> None:
        """Check that a store of zarr has the shape still that the array had when it was opened."""
        if _package(self._origin) == "zarr":
            import zarr

            self._check_shape(zarr.open_array(self._origin.store, path=self._origin.path, mode="r").shape)

    def _check_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != self.shape:
            raise ValueError(f"x had shape {self.shape} and has {tuple(shape)} now: {_CHANGED}")

    def _starts(self) -> list[range]:
        return [range(0, length or 1, size) for length, size in zip(self.shape, self._size, strict=True)]

    def _boxes(self) -> Iterator[tuple[slice, ...]]:
        starts = self._starts()
        channels = starts[self._axis]
        for channel in channels:
            starts[self._axis] = range(channel, channel + 1)
            for corner in product(*starts):
                yield tuple(
                    slice(start, min(start + size, length))
                    for start, size, length in zip(corner, self._size, self.shape, strict=True)
                )

    def _piece(self, values: Any, box: tuple[slice, ...]) -> Piece:
        part = box[self._axis]
        is_whole = self._size[self._axis] >= self.shape[self._axis]
        nbytes = self._itemsize * math.prod(part.stop - part.start for part in box)
        return Piece(values, nbytes, box, None if is_whole else range(part.start, part.stop))


_CHANGED = "it has changed while it was read. Open it again when nothing writes to it; nothing has been changed here."


def is_array(batches: Any) -> bool:
    """Tell whether ``batches`` is one array.

    Raises:
        TypeError: it is a group of arrays of h5py or zarr, a file for example; the message names its arrays.
        ValueError: its file is closed.
    """
    package, kind = _package(batches), type(batches).__name__
    if package == "h5py" and hasattr(batches, "id") and not batches:
        raise ValueError(f"{batches!r}: open the file, and keep it open meanwhile.")
    if hasattr(batches, "shape"):
        return True
    if package in {"h5py", "zarr"} and hasattr(batches, "__getitem__"):
        names = arrays_of(batches)
        held = f"It has {checks.few(names)}" if names else "It has none"
        raise TypeError(f"a {kind} holds arrays and is none: give one of its arrays, group[name]. {held}.")
    return False


def arrays_of(group: Any) -> list[str]:
    """Return the names of all arrays in a group of h5py or zarr and in the groups within."""
    names: list[str] = []
    if isinstance(group, Mapping):
        group.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)  # type: ignore[attr-defined]
    else:
        names += (name for name, item in group.members(max_depth=None) if hasattr(item, "shape"))
    return sorted(names)


def _unit(array: Any, ndim: int, itemsize: int) -> tuple[int, ...] | None:
    """Return the shape of what an array stores as one: a shard if it fits into a piece, else a chunk; or None."""
    shards, chunks = getattr(array, "shards", None), getattr(array, "chunks", None)
    known: list[tuple[int, ...]] = [
        unit
        for unit in (shards, chunks)
        if isinstance(unit, tuple) and len(unit) == ndim and all(isinstance(length, int) for length in unit)
    ]
    return next((unit for unit in known if math.prod(unit) * itemsize <= _PIECE), known[-1] if known else None)


def _grown(size: list[int], shape: tuple[int, ...], axis: int, itemsize: int, limit: int) -> list[int]:
    """Return a multiple of ``size`` of at most ``limit`` bytes.

    It has more rows, so that each chunk is copied as it is. Only a small one has more positions or channels too: the
    chunks would be interleaved.
    """
    for i in sorted(range(len(shape)), key=lambda i: (i == axis, i)):
        nbytes = math.prod(size) * itemsize
        size[i] *= max(min((limit if i == 0 else _SMALL) // max(nbytes, 1), math.ceil(shape[i] / size[i])), 1)
    return size


def _mapped(array: Any) -> np.memmap | None:
    """Return the mapped file of which an array is a view, or None."""
    found = None
    while isinstance(array, np.ndarray):
        found, array = array if isinstance(array, np.memmap) else found, array.base
    return found if isinstance(array, mmap.mmap) else None


def _is_locked() -> bool:
    """Tell whether this thread has locked h5py, so that no other can read: ``visititems`` calls with the lock taken."""
    lock = sys.modules["h5py._objects"].phil
    return bool(lock._is_owned())  # noqa: SLF001 - a lock has no other way to tell


def _package(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _shown(box: tuple[slice, ...]) -> str:
    return ", ".join(f"{part.start}:{part.stop}" for part in box)
