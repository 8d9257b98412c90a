"""Arrays in files: the pieces that are read, by which thread, and arrays that cannot be read or change meanwhile."""

import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.chunked import reading
from mbn.contract import Settings

X = (1e3 + np.random.default_rng(5).standard_normal((300, 6, 10))).astype(np.float32)
SETTINGS = Settings(None, "float32", 1e-5, 0.1, 1, 1)


class Stored:
    """An array in a file, in chunks, which notes the boxes that are read and the threads that read them."""

    def __init__(self, values: np.ndarray, chunks: tuple[int, ...] | None = None, **others: Any) -> None:
        self.values, self.shape, self.dtype, self.chunks = values, values.shape, values.dtype, chunks
        self.reads: list[tuple[slice, ...]] = []
        self.threads: list[int] = []
        vars(self).update(others)

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        whole = *key, *(slice(0, length) for length in self.shape[len(key) :])
        if key != (slice(None, 0),):
            self.reads.append(whole)
            self.threads.append(threading.get_ident())
        return self.values[key].copy()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pieces be of a few chunks, and have most of them a part of the channels alone."""
    monkeypatch.setattr(reading, "_PIECE", 4000)
    monkeypatch.setattr(reading, "_SMALL", 400)


def fitted(x: Any, **arguments: Any) -> mbn.BatchNorm1d:
    return mbn.BatchNorm1d(None, **arguments).fit(x, progress=False)


def assert_equal(found: mbn.BatchNorm1d, expected: mbn.BatchNorm1d) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_array_equal(mbn.to_numpy(getattr(found, name)), mbn.to_numpy(getattr(expected, name)), name)


CHUNKS = [(300, 1, 10), (50, 6, 10), (7, 2, 3), (1, 1, 1), (300, 6, 1), (1000, 100, 100), (0, 1, 1)]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("axis", [1, -1])
def test_pieces_are_whole_chunks_and_each_is_read_once(chunks: tuple[int, ...], axis: int, *, splits: bool) -> None:
    array = Stored(X, chunks)
    pieces = reading.Pieces(array, SETTINGS._replace(axis=axis), splits_channels=splits)
    _, *found = pieces
    seen = np.zeros(X.shape, int)
    for piece, box in zip(found, array.reads, strict=True):
        assert piece.box == box
        np.testing.assert_array_equal(piece.values, X[box])
        assert piece.nbytes == piece.values.nbytes
        seen[box] += 1
        for part, length, chunk in zip(box, X.shape, chunks, strict=True):
            step = min(max(chunk, 1), length)
            assert part.start % step == 0
            assert part.stop % step == 0 or part.stop == length
        assert splits or piece.channels is None
        assert piece.channels is None or piece.values.shape[axis] == len(piece.channels)
    assert (seen == 1).all()
    assert len(found) == len(pieces)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("backend", ["numpy", "numba", "torch", "jax"])
@pytest.mark.parametrize("chunks", [(300, 1, 10), (7, 2, 3), None])
@pytest.mark.parametrize("axis", [1, -1])
def test_fit_by_chunks_gives_the_statistics_of_the_array(
    chunks: tuple[int, ...] | None, axis: int, backend: str
) -> None:
    x = X if axis == 1 else np.ascontiguousarray(X.swapaxes(1, 2))
    if chunks is not None and axis == -1:
        chunks = chunks[0], chunks[2], chunks[1]
    with mbn.use_backend(backend):
        found, expected = fitted(Stored(x, chunks), axis=axis), fitted([x], axis=axis)
    assert found.backend == backend
    assert_equal(found, expected)


@pytest.mark.usefixtures("tiny")
def test_fit_by_chunks_gives_the_same_bits_on_every_run() -> None:
    x = np.random.default_rng(6).standard_normal(X.shape)
    first = fitted(Stored(x, (7, 2, 3)), dtype="float64")
    for _ in range(3):
        assert_equal(fitted(Stored(x, (7, 2, 3)), dtype="float64"), first)


def test_shard_is_read_as_a_whole_if_it_fits_into_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_SMALL", 0)
    array = Stored(X, (10, 2, 5), shards=(100, 2, 10))
    _, first, *_ = reading.Pieces(array, SETTINGS)
    assert first.values.shape == (300, 2, 10)
    monkeypatch.setattr(reading, "_PIECE", 100 * 2 * 10 * 4)
    _, first, *_ = reading.Pieces(array, SETTINGS)
    assert first.values.shape == (100, 2, 10)
    monkeypatch.setattr(reading, "_PIECE", 100 * 2 * 10 * 4 - 1)
    _, first, *_ = reading.Pieces(array, SETTINGS)
    assert first.values.shape == (190, 2, 5)


def test_chunks_of_another_form_are_ignored() -> None:
    for chunks in (((150, 150), (6,), (10,)), "auto", (300, 6), None):
        assert_equal(fitted(Stored(X, chunks)), fitted([X]))  # type: ignore[arg-type]


def test_population_takes_an_array_in_a_file_as_one_batch() -> None:
    found = mbn.Population().update(X[:100]).update(Stored(X[100:], (50, 1, 10))).statistics()
    expected = mbn.Population().update(X[:100]).update(X[100:]).statistics()
    for name in found._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.num_batches_tracked == 2


@pytest.mark.usefixtures("tiny")
def test_population_is_unchanged_by_an_array_that_fails() -> None:
    population = mbn.Population().update(X)
    before = population.statistics()
    with pytest.raises(OSError, match="broken"):
        population.update(Failing(X, (10, 6, 10)))
    for found, expected in zip(population.statistics(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


# Threads.


class Failing(Stored):
    """An array whose fourth read fails, in every thread."""

    error: type[BaseException] = OSError

    def __getitem__(self, key: Any) -> np.ndarray:
        if len(self.reads) == 3:
            raise self.error("a disk is broken")
        return super().__getitem__(key)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mbn-reading")]


@pytest.mark.usefixtures("tiny")
def test_next_piece_is_read_while_the_last_one_is_used() -> None:
    has_begun = threading.Event()

    class Watched(Stored):
        def __getitem__(self, key: Any) -> np.ndarray:
            if len(self.reads) == 1:
                has_begun.set()
            return super().__getitem__(key)

    array = Watched(X, (10, 6, 10))
    pieces = iter(reading.Pieces(array, SETTINGS))
    assert next(pieces).values.shape == (0, 6, 10)
    assert array.reads == []
    next(pieces)
    assert has_begun.wait(timeout=30)
    pieces.close()
    assert len(array.reads) == 2
    assert set(array.threads) != {threading.get_ident()}
    assert readers() == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_error_of_a_reader_reaches_the_caller_and_leaves_nothing(error: type[BaseException]) -> None:
    bn = fitted([X])
    before = bn.state_dict()
    array = Failing(X, (10, 6, 10), error=error)
    with pytest.raises(error, match="a disk is broken") as caught:
        bn.fit(array, progress=False)
    if error is OSError:
        assert "read of x[30:40, 0:6, 0:10], where x has shape (300, 6, 10)" in caught.value.__notes__[0]
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert readers() == []


@pytest.mark.usefixtures("tiny")
def test_refused_piece_ends_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbn.step.population._merged", None)  # the second piece fails
    with pytest.raises(TypeError):
        fitted(Stored(X, (10, 6, 10)))
    assert readers() == []


@pytest.mark.usefixtures("tiny")
def test_reader_that_works_in_one_thread_alone_is_called_there() -> None:
    class Bound(Stored):
        owner = threading.get_ident()

        def __getitem__(self, key: Any) -> np.ndarray:
            if threading.get_ident() != self.owner:
                raise RuntimeError("another thread has opened it")
            return super().__getitem__(key)

    array = Bound(X, (10, 6, 10))
    assert_equal(fitted(array), fitted([X]))
    assert len(array.reads) == 30
    assert readers() == []


@pytest.mark.usefixtures("tiny")
def test_fit_reads_by_itself_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(reading.ThreadPoolExecutor, "submit", refuse)
    array = Stored(X, (10, 6, 10))
    assert_equal(fitted(array), fitted([X]))
    assert set(array.threads) == {threading.get_ident()}


# Refusals.


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (X.astype(np.int32), TypeError, "x is int32; numpy takes .*Convert x"),
        (X.astype(float), TypeError, "x is float64 and the statistics are float32"),
        (X[0, 0], ValueError, r"x has shape \(10,\)"),
        (np.float32(1), ValueError, r"x has shape \(\)"),
        (X[:0], ValueError, "the batches hold 0 values"),
        (np.zeros(X.shape, "S3"), TypeError, "x holds bytes"),
    ],
    ids=["integers", "float64", "one axis", "scalar", "no rows", "strings"],
)
def test_array_is_refused_before_it_is_read(values: Any, error: type[Exception], words: str) -> None:
    array = Stored(values)
    bn = mbn.BatchNorm1d(None)
    with pytest.raises(error, match=words):
        bn.fit(array, progress=False)
    assert array.reads == []
    assert (bn.backend, bn.num_features) == (None, None)


def test_call_of_an_array_in_a_file_points_to_fit_and_slices() -> None:
    for call in (fitted(X).eval(), lambda x: fitted([x])):
        with pytest.raises(TypeError, match=r"an array in a file goes to bn.fit\(x\) as it is, .* x\[:1000\]"):
            call(Stored(X))


def test_wrong_number_of_channels_is_refused_before_anything_is_read() -> None:
    array = Stored(X, (10, 2, 10))
    with pytest.raises(ValueError, match="6 channels on axis 1; num_features is 5"):
        mbn.BatchNorm1d(5).fit(array, progress=False)
    assert array.reads == []


def test_big_endian_values_are_read_as_they_are() -> None:
    assert_equal(fitted(Stored(X.astype(">f4"), (50, 6, 10))), fitted([X]))


class Lazy:
    """An array whose slices are read only when NumPy asks for their values, as those of xarray."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, key: Any) -> "Lazy":
        return Lazy(self._values[key])

    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> np.ndarray:
        return self._values


def test_lazy_slices_are_read() -> None:
    assert_equal(fitted(Lazy(X)), fitted([X]))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("how", ["shape", "rows"])
def test_array_that_changes_while_it_is_read_is_refused(how: str) -> None:
    class Changing(Stored):
        def __getitem__(self, key: Any) -> np.ndarray:
            if len(self.reads) == 3:
                self.values = self.values[:30]
                self.shape = self.values.shape if how == "shape" else self.shape
            return super().__getitem__(key)

    bn = mbn.BatchNorm1d(None)
    with pytest.raises(ValueError, match="changed while it was read"):
        bn.fit(Changing(X, (10, 6, 10)), progress=False)
    assert bn.num_features is None
    assert readers() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows truncates no mapped files")
def test_truncated_mapped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_SLICE", 10 * X[0].nbytes)
    path = tmp_path / "x.npy"
    np.save(path, X)
    mapped = np.load(path, mmap_mode="r")
    assert_equal(fitted(mapped), fitted([X]))
    os.truncate(path, path.stat().st_size - 1)
    for x in (mapped, mapped[10:200], np.asarray(mapped)):
        with pytest.raises(ValueError, match=f"file of x has {path.stat().st_size} bytes"):
            fitted(x)


def test_progress_shows_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    mbn.BatchNorm1d(6).fit(Stored(np.tile(X, (20, 1, 1)), (100, 6, 10)))
    assert "1.4/1.4 MB" in capsys.readouterr().err


def test_fit_takes_the_memory_of_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 1 << 20)

    class Made(Stored):
        def __getitem__(self, key: Any) -> np.ndarray:
            rows = key[0] if isinstance(key, tuple) else key
            return np.ones((len(range(*rows.indices(1 << 20))), 64), np.float32)

    array = Made(np.broadcast_to(np.float32(1), (1 << 18, 64)), (1 << 10, 64))
    bn = mbn.BatchNorm1d(64, backend="numpy")
    bn.fit(np.ones((1 << 14, 64), np.float32), progress=False)
    tracemalloc.start()
    bn.fit(array, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 4 << 20  # two pieces, and tiles of one in float64
    assert (bn.running_mean[0], bn.running_var[0]) == (1, 0)


# zarr and h5py themselves.


def zarr_arrays(folder: Path) -> Iterator[Any]:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    whole = np.concatenate([X] * 3)
    for i, options in enumerate(
        [{}, {"chunks": (70, 2, 3)}, {"chunks": (10, 2, 5), "shards": (100, 2, 10)}, {"zarr_format": 2}]
    ):
        for dtype in ("<f4", ">f4"):
            yield zarr.create_array(store=folder / f"{i}{dtype[0]}.zarr", data=whole.astype(dtype), **options)
    yield zarr.create_array(store={}, data=whole, chunks=(900, 1, 1))
    with zarr.storage.ZipStore(folder / "x.zip", mode="w") as store:
        zarr.create_array(store=store, data=whole, chunks=(70, 2, 3))
    with zarr.storage.ZipStore(folder / "x.zip", mode="r") as store:
        yield zarr.open_array(store, mode="r")


def h5py_datasets(folder: Path) -> Iterator[Any]:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    whole = np.concatenate([X] * 3)
    with h5py.File(folder / "x.h5", "w") as file:
        for i, options in enumerate([{}, {"chunks": (70, 2, 3)}, {"compression": "gzip", "shuffle": True}]):
            for dtype in ("<f4", ">f4"):
                yield file.create_dataset(f"{i}/{dtype[0]}", data=whole.astype(dtype), **options)
        yield file["0/<"].astype("f4")


@pytest.mark.parametrize("size", [4000, 1 << 23])
@pytest.mark.parametrize("library", ["zarr", "h5py"])
def test_fit_reads_arrays_of_a_library(
    library: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PIECE", size)
    expected = fitted([np.concatenate([X] * 3)])
    count = 0
    for array in {"zarr": zarr_arrays, "h5py": h5py_datasets}[library](tmp_path):
        assert_equal(fitted(array), expected)
        count += 1
    assert count == {"zarr": 10, "h5py": 7}[library]
    assert readers() == []


def test_group_is_refused_with_the_names_of_its_arrays(tmp_path: Path) -> None:
    zarr, h5py = (
        pytest.importorskip("zarr", reason="zarr is not installed"),
        pytest.importorskip("h5py", reason="h5py is not installed"),
    )
    with h5py.File(tmp_path / "x.h5", "w") as file:
        stores = [file, zarr.open_group(tmp_path / "x.zarr")]
        for group in stores:
            with pytest.raises(TypeError, match="holds arrays and is none.*It has none"):
                fitted(group)
            for name in ("b/x", "a", "c"):
                group.create_dataset(name, data=X) if group is file else group.create_array(name, data=X)
            for take in (fitted, mbn.Population().update):
                with pytest.raises(TypeError, match=r"give one of its arrays, group\[name\]. It has a, b/x, c"):
                    take(group)


def test_closed_file_of_h5py_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=X)
    for closed in (dataset, file):
        with pytest.raises(ValueError, match="Closed HDF5.*: open the file"):
            fitted(closed)


def test_empty_and_scalar_datasets_of_h5py_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        with pytest.raises(ValueError, match="empty dataset, without a shape"):
            fitted(file.create_dataset("empty", data=h5py.Empty("f4")))
        with pytest.raises(ValueError, match=r"x has shape \(\)"):
            fitted(file.create_dataset("scalar", data=np.float32(1)))
        with pytest.raises(TypeError, match="x is int64"):
            fitted(file.create_dataset("integers", data=np.ones((4, 2), int)))


def _resized_by_its_object(array: Any) -> None:
    array.resize((200, 6, 10))


def _resized_in_its_store(array: Any) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    zarr.open_array(array.store, mode="a").resize((200, 6, 10))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("resize", [_resized_by_its_object, _resized_in_its_store])
def test_array_of_zarr_that_is_resized_meanwhile_is_refused(resize: Callable[[Any], None], tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    array = zarr.create_array(store=tmp_path / "x.zarr", data=X, chunks=(10, 6, 10))
    bn = mbn.BatchNorm1d(6, backend="numpy")
    before, add = bn.state, mbn.step.population.Total.add

    def added(*args: Any) -> None:
        add(*args)
        resize(array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbn.step.population.Total.add", added)
        with pytest.raises(ValueError, match=r"x had shape \(300, 6, 10\) and has \(200, 6, 10\) now.*changed while"):
            bn.fit(array, progress=False)
    assert bn.state is before


@pytest.mark.usefixtures("tiny")
def test_dataset_of_h5py_that_is_resized_meanwhile_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    add = mbn.step.population.Total.add
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=X, chunks=(10, 6, 10), maxshape=(None, 6, 10))

        def added(*args: Any) -> None:
            add(*args)
            dataset.resize(20, axis=0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mbn.step.population.Total.add", added)
            with pytest.raises(ValueError, match="changed while it was read"):
                fitted(dataset)


VISITED = """
import sys
import h5py, mbn, numpy as np
from mbn.chunked import reading
reading._PIECE = 400
with h5py.File(sys.argv[1], "w") as file:
    file.create_dataset("x", data=np.eye(100, 4, dtype="f4"), chunks=(10, 4))
    file.visititems(lambda _, x: print(mbn.BatchNorm1d(4).fit(x, progress=False).running_mean.tolist()))
"""


@pytest.mark.processes
def test_fit_within_visititems_of_h5py_does_not_wait_for_ever(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    command = [sys.executable, "-c", VISITED, str(tmp_path / "x.h5")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == f"{[np.float32(0.01).item()] * 4}\n"
