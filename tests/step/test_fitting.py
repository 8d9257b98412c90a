"""``fit`` on all sources of data: loaders, mapped files, arrays in files, and streams that are interrupted."""

import os
import signal
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import frameworks
import numpy as np
import pytest
import second_framework

import mbn
from mbn.contract import Batch, Kernels
from mbn_numpy.backend import NumpyBackend

torch, jax = frameworks.optional("torch"), frameworks.optional("jax")

X = np.random.default_rng(1).normal(2, 3, (10, 4)).astype(np.float32)
FOREIGN = second_framework.asarray(X)


def test_fit_on_batches_of_a_mapped_file_takes_the_memory_of_one(tmp_path: Path) -> None:
    batch, path = 1 << 20, tmp_path / "data.npy"
    np.save(path, np.random.default_rng(2).standard_normal((32 * 4096, 64)).astype(np.float32))
    data = np.load(path, mmap_mode="r")
    mbn.BatchNorm1d(64).fit([data[:2]], progress=False)  # imports modules before the measurement
    tracemalloc.start()
    bn = mbn.BatchNorm1d(64).fit((np.array(data[i : i + 4096]) for i in range(0, len(data), 4096)), progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data[:4096].nbytes == batch
    assert peak <= 3 * batch  # one batch, and tiles of it in float64
    np.testing.assert_allclose(bn.running_var, data.var(0, dtype=float, ddof=1), rtol=1e-6)


def watched(make: Callable[[], Any], count: int) -> Iterator[Any]:
    """Yield batches, and check that each has been freed when the next is requested."""
    before: weakref.ref[Any] | None = None
    for _ in range(count):
        if before is not None:
            assert before() is None
        batch = make()
        before = weakref.ref(batch[0] if isinstance(batch, list) else batch)
        yield batch
        del batch


BATCHES: dict[str, Callable[[], Any]] = {
    "NumPy": X.copy,
    "NumPy and labels": lambda: [X.copy(), np.arange(10)],
    "Torch": lambda: torch.tensor(X),
    "Torch and labels": lambda: [torch.tensor(X), torch.arange(10)],
    "JAX": lambda: jax.numpy.array(X),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("progress", [True, False])
def test_fit_holds_one_batch_at_a_time(name: str, *, progress: bool) -> None:
    bn = mbn.BatchNorm1d(None).fit(watched(BATCHES[name], 9), progress=progress)
    assert int(bn.num_batches_tracked) == 9


class Later(NumpyBackend):
    """A backend that computes lazily: it holds a batch until ``finish`` is called."""

    name = "later"
    is_waiting = False

    def kernels_for(self, *args: Any) -> tuple[Kernels, Batch]:
        self.is_waiting = True
        return super().kernels_for(*args)

    def finish(self, *values: Any) -> None:
        self.is_waiting = False
        super().finish(*values)


def test_fit_finishes_a_batch_before_it_requests_the_next() -> None:
    mbn.register_backend("later", Later)
    bn = mbn.BatchNorm1d(4, backend="later")

    def batches() -> Iterator[np.ndarray]:
        for _ in range(3):
            assert not mbn.get_backend(bn.backend).is_waiting
            yield X

    bn.fit(batches(), progress=False)


def test_first_batch_of_a_fit_binds_the_layer() -> None:
    for bn in (mbn.BatchNorm1d(None), mbn.BatchNorm1d(4)):
        bn.fit([FOREIGN], progress=False)
        assert (bn.backend, bn.num_features) == (second_framework.NAME, 4)


@pytest.mark.parametrize(
    "last", [X, FOREIGN[:, :3], second_framework.asarray(X.astype("int32"))], ids=["host", "shape", "dtype"]
)
def test_fit_with_a_refused_batch_leaves_the_layer_unbound(last: Any) -> None:
    bn, batches = mbn.BatchNorm1d(None), [FOREIGN, FOREIGN, last]
    if isinstance(last, np.ndarray):  # a bound layer takes it, so another batch has to be refused
        batches = [*batches, FOREIGN[:0, :2]]
    with pytest.raises((TypeError, ValueError)):
        bn.fit(batches, progress=False)
    assert bn.backend is None
    assert bn.num_features is None


def test_changes_of_the_layer_by_its_batches_stay() -> None:
    bn = mbn.BatchNorm1d(4, backend="numpy")

    def batches() -> Iterator[np.ndarray]:
        bn.eval()
        bn.weight = 3
        yield X

    bn.fit(batches(), progress=False)
    assert not bn.training
    assert bn.weight.tolist() == [3] * 4


def talking() -> Iterator[np.ndarray]:
    for _ in range(3):
        print("a batch")  # noqa: T201 - as user code may
        yield X


class Talking:
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[np.ndarray]:
        return talking()


@pytest.mark.parametrize(("batches", "progress"), [(Talking, "3/3"), (talking, "3/?")], ids=["sized", "unsized"])
@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}], ids=["to a file", "to a terminal"])
def test_progress_goes_to_standard_error(
    batches: Callable[[], Iterable[np.ndarray]],
    progress: str,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mbn.BatchNorm1d(4).fit(batches())
    out, err = capsys.readouterr()
    assert out == "a batch\n" * 3
    assert "fit" in err
    assert progress in err
    assert environment or len(err.splitlines()) == 1


def test_fit_without_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    mbn.BatchNorm1d(4).fit([X, X], progress=False)
    assert capsys.readouterr() == ("", "")


INTERRUPTED = """\
import signal
import sys
import numpy as np
import mbn

def batches():
    for i in range(10**9):
        if i == 10:
            print("go", flush=True)
        yield x

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
x = np.ones((1000, 4), np.float32)
bn = mbn.BatchNorm1d(4)
bn(x)
before = vars(bn) | bn._storage._asdict()
try:
    bn.fit(batches(), progress=sys.argv[1] == "progress")
except KeyboardInterrupt:
    after = vars(bn) | bn._storage._asdict()
    print(all(after[name] is value for name, value in before.items()))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("progress", ["progress", "no progress"])
def test_interrupted_fit_leaves_the_layer_unchanged(progress: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, progress]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "go\n"
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (out, child.returncode) == ("True\n", 0), err


class Rows:
    """An array in a file, like those of h5py: it has a shape and slices, but no backend owns it."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.longest = 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.longest = max(self.longest, len(self.values[rows]))
        return self.values[rows]


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("longest", [3, len(X)])
def test_fit_reads_an_array_in_a_file_by_slices(longest: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbn.chunked.reading._PIECE", longest * X[0].nbytes + 1)
    rows = Rows(X)
    bn = mbn.BatchNorm1d(4, backend=backend).fit(rows, progress=False)
    assert rows.longest == longest
    np.testing.assert_array_equal(mbn.to_numpy(bn.running_mean), X.astype(float).mean(0).astype(np.float32))
    np.testing.assert_array_equal(mbn.to_numpy(bn.running_var), X.astype(float).var(0, ddof=1).astype(np.float32))
    assert int(bn.num_batches_tracked) == 1


def test_fit_on_a_mapped_file_takes_the_memory_of_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(3).standard_normal((1 << 16, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    monkeypatch.setattr("mbn.chunked.reading._SLICE", 1 << 16)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    bn = mbn.BatchNorm1d(16, backend="numpy")
    bn.fit(mapped[:4096], progress=False)
    tracemalloc.start()
    bn.fit(mapped, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < data.nbytes / 2
    np.testing.assert_array_equal(bn.running_var, data.astype(float).var(0, ddof=1).astype(np.float32))


class Named(dict[str, Any]):
    """A batch as a dict, as some loaders return it."""


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (None, TypeError, "batches is an array, or an iterable of inputs, not NoneType"),
        (3, TypeError, "not int"),
        ("abc", TypeError, "not str"),
        ({"x": X}, TypeError, "not dict"),
        ([{"x": X, "y": X}], TypeError, r"not a dict of x, y.*batch\[key\]"),
        ([Named(x=X)], TypeError, "not a Named of x"),
        ([[[1.0] * 4, [1.0]]], ValueError, "ragged|makes no array"),
        ([[1.0] * 4, [2.0] * 4], ValueError, r"x has shape \(4,\): a list.*one array"),
        ([None], TypeError, "None is no array"),
    ],
)
def test_fit_refuses_other_data(batches: Any, error: type[Exception], words: str) -> None:
    bn = mbn.BatchNorm1d(4, backend="numpy")
    before = bn.state
    with pytest.raises(error, match=words):
        bn.fit(batches, progress=False)
    assert bn.state is before


def test_mode_that_changes_during_a_fit_stays() -> None:
    for bn in (mbn.BatchNorm1d(4, backend="numpy"), mbn.BatchNorm1d(None)):
        bn.fit((bn.eval() and X for _ in range(2)), progress=False)
        assert bn.training is False
