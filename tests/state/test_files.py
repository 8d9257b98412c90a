"""Files of layers, apart from any backend: their contents, safe writing, and loading."""

import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import killed_while_saving
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

import mbn
from mbn.conformance.target import configured
from mbn.state import files

X = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a saved layer."""
    configured(mbn.BatchNorm1d(4, momentum=0.25), seed=1).save(tmp_path / "bn.safetensors")
    return tmp_path / "bn.safetensors"


@given(data=st.data())
@settings(deadline=None)
def test_loaded_layer_equals_the_saved_one(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    flags = st.booleans()
    dtype, num_features = data.draw(st.sampled_from(["float32", "float64"])), data.draw(st.integers(1, 4))
    arguments = {
        "num_features": num_features,
        "dtype": dtype,
        "eps": data.draw(st.floats(0, allow_infinity=False)),
        "momentum": data.draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        "axis": data.draw(st.sampled_from([1, -1])),
        "correction": data.draw(st.sampled_from([0, 1])),
        "affine": data.draw(flags),
        "track_running_stats": data.draw(flags),
        "bias": data.draw(flags),
    }
    bn = mbn.BatchNorm1d(**arguments).train(data.draw(flags))
    if bn.track_running_stats and data.draw(flags):
        bn.freeze()
    vectors = arrays(dtype, num_features, elements=st.floats(width=32 if dtype == "float32" else 64))
    for key in bn.state_dict():
        drawn = data.draw(st.integers(0, 2**63 - 2) if key == "num_batches_tracked" else vectors)
        setattr(bn, key, np.abs(drawn) if key == "running_var" else drawn)
    path = tmp_path_factory.mktemp("round") / "bn"
    bn.save(path)
    loaded, saved = mbn.BatchNorm1d.load(path)._snapshot(), bn._snapshot()
    assert loaded.arguments == saved.arguments == arguments
    assert (loaded.training, loaded.frozen) == (saved.training, saved.frozen)
    assert list(loaded.entries) == list(saved.entries)
    for key, value in saved.entries.items():
        assert (loaded.entries[key].dtype, loaded.entries[key].tobytes()) == (value.dtype, value.tobytes())


def test_loaded_layer_is_unbound_unless_a_backend_is_chosen(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="a second framework binds the layer")
    bn = mbn.BatchNorm1d.load(str(path))
    assert bn.backend is None
    assert isinstance(bn(torch.from_numpy(X)), torch.Tensor)
    with mbn.use_backend("torch"):
        assert mbn.BatchNorm1d.load(path).backend == "torch"
    assert mbn.BatchNorm1d.load(path, backend="numpy").backend == "numpy"
    with pytest.raises(mbn.BackendNotFoundError, match="numpi"):
        mbn.BatchNorm1d.load(path, backend="numpi")


def test_subclass_loads_a_file_as_itself(path: Path) -> None:
    class Mine(mbn.BatchNorm1d):
        pass

    assert type(Mine.load(path)) is Mine


def test_file_has_the_entries_of_torch(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="it is the one that loads them")
    from safetensors.torch import load_file as load_tensors

    theirs = torch.nn.BatchNorm1d(4)
    theirs.load_state_dict(load_tensors(path))
    np.testing.assert_array_equal(theirs.running_var.numpy(), mbn.BatchNorm1d.load(path).running_var)
    assert theirs.num_batches_tracked.dtype == torch.int64


def test_equal_layers_make_equal_files(path: Path, tmp_path: Path) -> None:
    bn = mbn.BatchNorm1d.load(path)
    for number in range(20):
        bn.save(tmp_path / str(number))
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {path.read_bytes()}


def test_arrays_of_any_memory_order_make_the_same_file(path: Path) -> None:
    snapshot = files.read(path)
    strided = {key: value.repeat(3)[::-3][::-1] if value.ndim else value for key, value in snapshot.entries.items()}
    before = path.read_bytes()
    files.write(path, snapshot._replace(entries=strided))
    assert path.read_bytes() == before


def test_save_to_a_link_keeps_the_link(path: Path, tmp_path: Path) -> None:
    link, ahead = tmp_path / "link", tmp_path / "ahead"
    link.symlink_to(path)
    ahead.symlink_to("not there yet")
    for name in (link, ahead):
        mbn.BatchNorm1d(7).save(name)
        assert name.is_symlink()
        assert mbn.BatchNorm1d.load(name).num_features == 7
    assert mbn.BatchNorm1d.load(path).num_features == 7
    assert mbn.BatchNorm1d.load(tmp_path / "not there yet").num_features == 7


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_save_uses_default_permissions_or_those_of_the_old_file(path: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        mbn.BatchNorm1d(4).save(tmp_path / "new")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
        for mode in (0o600, 0o664, 0o644):
            path.chmod(mode)
            mbn.BatchNorm1d(4).save(path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("folder", "folder"),
        ("missing/bn", "missing"),
        ("bn.safetensors/bn", "bn.safetensors/bn"),
        ("pipe", "pipe"),
        ("circle", "circle"),
    ],
)
def test_save_to_an_impossible_path_is_an_oserror(path: Path, tmp_path: Path, name: str, named: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = path.read_bytes(), sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=f"{tmp_path / named}'"):
        mbn.BatchNorm1d(4).save(tmp_path / name)
    assert (path.read_bytes(), sorted(tmp_path.rglob("*"))) == before
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


STEPS = [(os, "open"), (os, "fsync"), (Path, "replace")]


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("name", "step"),
    [*(("new", step) for step in STEPS), *(("bn.safetensors", step) for step in [*STEPS, (Path, "chmod")])],
    ids=str,
)
def test_failed_save_changes_nothing(
    path: Path, name: str, step: tuple[Any, str], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    before = path.read_bytes()
    bn = mbn.BatchNorm1d(4)
    with monkeypatch.context() as patch:
        patch.setattr(*step, fail)
        with pytest.raises(error):
            bn.save(path.with_name(name))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with largest_file(2_000), pytest.raises(OSError, match="File too large"):
        mbn.BatchNorm1d(1_000).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_syncs_the_file_before_it_is_renamed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    replace = Path.replace

    def sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        if is_folder:
            raise OSError("not every system can do this")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", lambda *names: (steps.append("name"), replace(*names)))
    size = path.stat().st_size
    mbn.BatchNorm1d.load(path).save(path)
    assert steps == [f"file of {size}", "name", "folder"]


@pytest.mark.processes
def test_killed_save_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, killed_while_saving.__file__, tmp_path, "200"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    left = json.loads(run.stdout)
    assert left["whole"] == 200
    assert left["unfinished"] > 0  # some processes were killed during a save


_KILLED = """
import os, signal, sys
import mbn
from pathlib import Path
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
mbn.BatchNorm1d(4).save(sys.argv[1])
"""


def leave_unfinished(path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", _KILLED, path], check=False)
    assert run.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["new", "bn.safetensors", "[x]*?" + 240 * "y"])
def test_next_save_removes_the_temporary_file_of_a_killed_one(path: Path, name: str) -> None:
    other = path.with_name("other")
    leave_unfinished(path.with_name(name))
    leave_unfinished(other)
    before = set(path.parent.glob(".mbn-*.tmp"))
    assert len(before) == 2
    mbn.BatchNorm1d(4).save(path.with_name(name))
    (left,) = path.parent.glob(".mbn-*.tmp")  # that of the other path
    assert left in before
    with largest_file(0), pytest.raises(OSError, match="File too large"):
        mbn.BatchNorm1d(4).save(other)  # save removes leftovers before it needs disk space
    assert set(path.parent.iterdir()) == {path, path.with_name(name)}


def test_save_keeps_the_temporary_file_of_a_concurrent_save(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def save_between(beside: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        mbn.BatchNorm1d(5).save(path)
        assert beside.exists()
        return replace(beside, target)

    monkeypatch.setattr(Path, "replace", save_between)
    mbn.BatchNorm1d(6).save(path)
    assert mbn.BatchNorm1d.load(path).num_features == 6
    assert list(path.parent.iterdir()) == [path]


def test_save_starts_again_if_its_temporary_file_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def clear_up_before(descriptor: int, operation: int) -> None:
        if not operation & fcntl.LOCK_NB and next(first, False):
            files._clear_up(path, Path.unlink)
        flock(descriptor, operation)

    first = iter([True])
    monkeypatch.setattr(fcntl, "flock", clear_up_before)
    mbn.BatchNorm1d(6).save(path)
    assert mbn.BatchNorm1d.load(path).num_features == 6
    assert list(path.parent.iterdir()) == [path]


def fill(bn: mbn.BatchNorm1d, number: int) -> None:
    keys = list(mbn.BatchNorm1d(4).state_dict())
    bn.load_state_dict({key: np.full(() if "batches" in key else 4, number) for key in keys})


def assert_filled(path: Path) -> None:
    values = mbn.BatchNorm1d.load(path).state_dict().values()
    assert len({number for value in values for number in value.ravel().tolist()}) == 1


def test_save_writes_the_state_of_one_moment(path: Path) -> None:
    other = mbn.BatchNorm1d(4)
    fill(other, 2)

    class Disturbed(mbn.BatchNorm1d):
        @property
        def params(self) -> mbn.Params:
            seen = self._storage.params
            bn._storage = bn._storage._replace(params=other.params, state=other.state)  # as another thread might
            return seen

    bn = Disturbed(4)
    fill(bn, 1)
    bn.save(path)
    assert_filled(path)


def test_concurrent_saves_and_loads_are_consistent(path: Path) -> None:
    bn = mbn.BatchNorm1d(4)
    fill(bn, 0)
    bn.save(path)
    work: list[Future[None]] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for number in range(200):
                work += [pool.submit(fill, bn, number), pool.submit(bn.save, path), pool.submit(assert_filled, path)]
        for done in work:
            done.result()
    finally:
        sys.setswitchinterval(before)


class Layer(mbn.BatchNorm1d):
    """A subclass of a user."""


def test_load_is_a_method_of_the_class_alone(tmp_path: Path) -> None:
    path = tmp_path / "bn.safetensors"
    bn = Layer(4)
    bn.save(path)
    assert type(Layer.load(path)) is Layer
    save_file({key: mbn.to_numpy(value) for key, value in bn.state_dict().items()}, tmp_path / "state_dict")
    assert type(Layer.from_checkpoint(tmp_path / "state_dict")) is Layer
    for name in ("load", "from_checkpoint"):
        with pytest.raises(TypeError, match=rf"{name}\(\) makes a new layer.*BatchNorm1d.{name}.*load_state_dict"):
            getattr(bn, name)(path)
