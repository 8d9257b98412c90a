"""The files that arrays are in: .npy, members of .npz, stores of zarr, and HDF5.

An array is read by slices and written by boxes, so that a few chunks are in memory. What is read is checked when it is
opened; a file may be damaged nevertheless, and then raises an error when it is read.
"""

import importlib.util
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mbn.chunked.reading import arrays_of
from mbn.commands.options import UsageError

_KINDS = {"npy": "npy", "npz": "npz", "zarr": "zarr", "zip": "zarr", "h5": "hdf5", "hdf5": "hdf5"}
"""By suffix: the kind of file. A .zip is a zarr store in an archive."""
_SPEC = re.compile(rf"(.+?\.({'|'.join(_KINDS)}))(?::(.*))?", re.IGNORECASE | re.DOTALL)
_PACKAGES = {"zarr": ("zarr", "zarr"), "hdf5": ("h5py", "hdf5")}
"""By kind: the package that it needs, and mbn's extra with it."""
_CHUNK = 1 << 20
"""About how many bytes a chunk has in a store of zarr whose input has none."""
_OWN_ATTRIBUTES = {"CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST"}
"""Attributes of HDF5's own, which refer to other datasets of the file, or are set as labels of dimensions."""


class Spec(NamedTuple):
    """An array as the user names it: FILE or FILE:NAME."""

    path: Path
    kind: str
    name: str
    """The array within the file, "" where it is not named."""

    def __str__(self) -> str:
        return f"{self.path}:{self.name}" if self.name else str(self.path)

    @property
    def is_folder(self) -> bool:
        """Whether the file is a folder."""
        return self.path.suffix.lower() == ".zarr"


def parse(text: str) -> Spec:
    """Return the array of a text.

    Raises:
        ValueError: the text names no file of a known kind.
    """
    found = _SPEC.fullmatch(text.rstrip("/"))  # a shell completes the name of a folder with a slash
    if found is None:
        raise ValueError(f"{text!r} names no array: give x.npy, x.npz:NAME, x.zarr:PATH, x.zarr.zip:PATH or x.h5:PATH")
    path, suffix, name = found.groups()
    spec = Spec(Path(path), _KINDS[suffix.lower()], (name or "").strip("/"))
    if ".." in spec.name.split("/"):
        raise ValueError(f"{text!r}: the name of an array within a file has no '..'")
    if spec.kind == "npy" and spec.name:
        raise ValueError(f"{text!r}: a .npy file has one array, without a name: give {path}")
    return spec


def check_package(spec: Spec) -> None:
    """Check that the package of a file's kind is installed.

    Raises:
        UsageError: it is not.
    """
    package, extra = _PACKAGES.get(spec.kind, ("numpy", ""))
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{spec} needs {package}, which is not installed: pip install 'mbn-batchnorm[{extra}]'.")


@contextmanager
def opened(spec: Spec) -> Iterator[Any]:
    """Return a context with an array that is there to be read, of a shape, a dtype and slices.

    Raises:
        UsageError: there is no such array.
    """
    opening = {"npy": _npy, "npz": _npz, "zarr": _zarr, "hdf5": _hdf5}[spec.kind](spec)
    try:
        array = opening.__enter__()
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{spec.path} is not there.") from error
    except Exception as error:  # a file can have NumPy, zarr or HDF5 raise anything
        raise UsageError(f"{spec} cannot be read: {reason(error)}") from error
    try:
        yield array
    finally:
        opening.__exit__(None, None, None)


def files_of(array: Any) -> list[Path]:
    """Return the files that an array of h5py is in, which links, virtual and external datasets choose; else none."""
    if not _is_of(array, "h5py"):
        return []
    names = [array.file.filename, *(name for name, *_ in array.external or ())]
    names += [source.file_name for source in array.virtual_sources()] if array.is_virtual else []
    return [Path(array.file.filename).parent / name for name in names if name != "."]  # "." is the same file


class Target(NamedTuple):
    """An array that is written."""

    write: Callable[[tuple[slice, ...], np.ndarray], None]
    unit: tuple[int, ...] | None
    """The shape that boxes have to be multiples of; None where that of the input's chunks will do."""


@contextmanager
def created(spec: Spec, path: Path, source: Any) -> Iterator[Target]:
    """Return a context in which the array of ``spec`` is written to a new file ``path``, complete at its end.

    It has the shape and dtype of ``source``, the array that is read, and its chunks. Where both are of one kind, it has
    its compression, fill value, attributes and names of dimensions too, but no filters, which may lose digits.
    """
    kinds = {"npy": _new_npy, "npz": _new_npz, "zarr": _new_zarr, "hdf5": _new_hdf5}
    with kinds[spec.kind](spec, path, source) as target:
        yield target


def reason(error: BaseException) -> str:
    """Return the first line of an error, as a sentence."""
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return text if text.endswith(".") else f"{text}."


# .npy


@contextmanager
def _npy(spec: Spec) -> Iterator[Any]:
    with io.FileIO(spec.path) as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise UsageError(f"{spec.path} is no .npy file: it does not begin as one.")
        mapped = np.load(spec.path, mmap_mode="r", allow_pickle=False)
        file.seek(0)
        yield _Rows(file) if mapped.flags.c_contiguous else mapped


@contextmanager
def _new_npy(spec: Spec, path: Path, source: Any) -> Iterator[Target]:
    shape, dtype = tuple(source.shape), np.dtype(source.dtype)
    if 0 in shape:
        np.save(path, np.empty(shape, dtype))
    else:
        start = np.lib.format.open_memmap(path, "w+", dtype, shape).offset
        if hasattr(os, "posix_fallocate"):  # without space, a write to mapped memory would kill the process
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    row = dtype.itemsize * int(np.prod(shape[1:]))

    def write(box: tuple[slice, ...], values: np.ndarray) -> None:
        rows = box[0]
        part = np.memmap(path, dtype, "r+", start + rows.start * row, (rows.stop - rows.start, *shape[1:]))
        part[:, *box[1:]] = values

    yield Target(write, None)


# .npz


class _Rows:
    """An array in a .npy file or a member of a .npz, of which rows are read.

    It is not mapped: to read beyond the end of a file that has been truncated would kill the process.
    """

    def __init__(self, file: Any) -> None:
        reading = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        read_header = reading.get(np.lib.format.read_magic(file))
        if read_header is None:
            raise ValueError("its header is of a later version, for dtypes that are no numbers.")
        self.shape, is_fortran, self.dtype = read_header(file)
        if is_fortran and len(self.shape) > 1:
            raise ValueError("it is in Fortran's order, so its rows are scattered: save np.ascontiguousarray(x).")
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects, and no numbers.")
        self._file, self._start = file, file.tell()
        self._row = self.dtype.itemsize * int(np.prod(self.shape[1:]))

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        position = self._start + start * self._row
        if self._file.tell() != position:  # a seek would end the check of the archive's checksum
            self._file.seek(position)
        data = bytearray((stop - start) * self._row)
        view = memoryview(data)
        while view and (count := self._file.readinto(view)):
            view = view[count:]
        if view:
            raise EOFError("the file ends within the array: it is damaged.")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


@contextmanager
def _npz(spec: Spec) -> Iterator[Any]:
    with zipfile.ZipFile(spec.path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        name = _one_of(names, spec)
        with archive.open(f"{name}.npy") as file:
            member = _Rows(file)
            member.compress_type = archive.getinfo(f"{name}.npy").compress_type  # type: ignore[attr-defined]
            yield member


@contextmanager
def _new_npz(spec: Spec, path: Path, source: Any) -> Iterator[Target]:
    member = path.with_name("member.npy")
    with _new_npy(spec, member, source) as target:
        yield target
    with zipfile.ZipFile(path, "w", getattr(source, "compress_type", zipfile.ZIP_STORED)) as archive:
        archive.write(member, f"{spec.name or 'x'}.npy")
    member.unlink()


# zarr


@contextmanager
def _zarr(spec: Spec) -> Iterator[Any]:
    import zarr

    spec.path.stat()
    with _zarr_store(zarr, spec, spec.path, "r") as store:
        try:
            found = zarr.open(store, path=spec.name, mode="r")
        except FileNotFoundError as error:
            try:
                names = arrays_of(zarr.open_group(store, mode="r"))
            except Exception:  # noqa: BLE001 - there is not even a store
                names = []
            raise UsageError(f"{spec.path} has no {spec.name or 'array'}. It has {_few(names)}.") from error
        if hasattr(found, "shape"):
            yield found
        else:
            names = arrays_of(found)
            yield found[_one_of(names, spec)]


@contextmanager
def _zarr_store(zarr: ModuleType, spec: Spec, path: Path, mode: str) -> Iterator[Any]:
    if spec.is_folder:
        yield zarr.storage.LocalStore(path, read_only=mode == "r")
    else:
        with zarr.storage.ZipStore(path, mode=mode) as store:
            yield store


@contextmanager
def _new_zarr(spec: Spec, path: Path, source: Any) -> Iterator[Target]:
    import zarr

    with _zarr_store(zarr, spec, path, "w") as store:
        name = spec.name or None
        if _is_of(source, "zarr"):
            array = zarr.from_array(
                store,
                data=source,
                write_data=False,
                name=name,
                filters=None,
                serializer="auto",
                fill_value=source.fill_value,
                attributes=dict(source.attrs),
            )
        else:
            array = zarr.create_array(
                store, name=name, shape=source.shape, dtype=source.dtype, chunks=_chunks(source) or _rows(source)
            )
        yield Target(array.__setitem__, array.shards or array.chunks)


# HDF5


@contextmanager
def _hdf5(spec: Spec) -> Iterator[Any]:
    import h5py

    with h5py.File(spec.path, "r") as file:
        if spec.name and spec.name not in file:
            raise UsageError(f"{spec.path} has no {spec.name}. It has {_few(arrays_of(file))}.")
        found = file[spec.name or "/"]
        if hasattr(found, "shape"):
            if found.shape is None:
                raise UsageError(f"{spec} is an empty dataset, without a shape.")
            yield found
        else:
            yield found[_one_of(arrays_of(found), spec)]


class _Disk(io.FileIO):
    """A file whose writes never fail, to HDF5: it cannot close a file after that, and kills the process.

    The first error is kept, and nothing is written any more.
    """

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, unless there has been an error."""
        rest = memoryview(data).cast("B")
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except BaseException as error:  # noqa: BLE001 - a signal's too
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Change the length, unless there has been an error."""
        try:
            return self.tell() if self.error else super().truncate(size)
        except BaseException as error:  # noqa: BLE001 - a signal's too
            self.error = error
            return self.tell()

    def check(self) -> None:
        """Raise the error that there has been."""
        if self.error is not None:
            raise self.error


@contextmanager
def _new_hdf5(spec: Spec, path: Path, source: Any) -> Iterator[Target]:
    import h5py

    with _Disk(path, "w+") as disk:
        with h5py.File(disk, "w") as file:
            dataset = _new_dataset(file, spec.name or "x", source)

            def write(box: tuple[slice, ...], values: np.ndarray) -> None:
                dataset[box] = values
                disk.check()

            yield Target(write, None)
        disk.check()


def _new_dataset(file: Any, name: str, source: Any) -> Any:
    if not _is_of(source, "h5py"):
        return file.create_dataset(name, source.shape, source.dtype, chunks=_chunks(source))
    dataset = file.create_dataset_like(name, source, scaleoffset=None)  # which would round
    for key, value in source.attrs.items():
        if key not in _OWN_ATTRIBUTES:
            dataset.attrs[key] = value
    for own, given in zip(dataset.dims, source.dims, strict=True):
        if given.label:
            own.label = given.label
    return dataset


def _one_of(names: list[str], spec: Spec) -> str:
    """Return the name of an array of a file or group: the one that is asked for, or the only one."""
    if spec.name in names:
        return spec.name
    if len(names) == 1 and (not spec.name or spec.kind != "npz"):
        return names[0]
    if spec.name and spec.kind == "npz":
        raise UsageError(f"{spec.path} has no {spec.name}. It has {_few(names)}.")
    raise UsageError(f"{spec} holds several arrays or none: name one, {spec.path}:NAME. It has {_few(names)}.")


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' and more' * (len(names) > 5)}" if names else "none"


def _is_of(array: Any, package: str) -> bool:
    return type(array).__module__.partition(".")[0] == package


def _chunks(source: Any) -> tuple[int, ...] | None:
    """Return the chunks of the input, none of which is longer than it."""
    chunks = getattr(source, "chunks", None)
    return chunks and tuple(min(chunk, max(length, 1)) for chunk, length in zip(chunks, source.shape, strict=True))


def _rows(source: Any) -> tuple[int, ...]:
    """Return a chunk of whole rows."""
    length, *others = source.shape
    row = source.dtype.itemsize * int(np.prod(others))
    return max(min(_CHUNK // max(row, 1), length), 1), *(max(other, 1) for other in others)
