"""``mbn normalize``: every kind of file, exact outputs, and files that are whole or not there at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import frameworks
import numpy as np
import pytest

import mbn
from mbn.chunked import reading
from mbn.commands.cli import main
from mbn.commands.normalize import command, stores
from mbn.state import files

zarr, h5py = frameworks.optional("zarr"), frameworks.optional("h5py")
X = (1e3 + np.random.default_rng(7).standard_normal((1200, 6, 10))).astype(np.float32)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"_PIECE": 4000, "_SMALL": 400, "_SLICE": 4000}.items():
        monkeypatch.setattr(reading, name, size)


def save(text: str, x: np.ndarray = X, chunks: tuple[int, ...] | None = None) -> str:
    """Save an array to the file of a text, FILE or FILE:NAME."""
    spec = stores.parse(text)
    if spec.kind == "npy":
        np.save(spec.path, x)
    elif spec.kind == "npz":
        np.savez(spec.path, **{spec.name: x, "other": x[:2]})
    elif spec.kind == "hdf5":
        with h5py.File(spec.path, "a") as file:
            file.create_dataset(spec.name or "x", data=x, chunks=chunks)
    elif spec.is_folder:
        zarr.create_array(store=spec.path, name=spec.name or None, data=x, chunks=chunks or "auto")
    else:
        with zarr.storage.ZipStore(spec.path, mode="w") as store:
            zarr.create_array(store=store, name=spec.name or None, data=x, chunks=chunks or "auto")
    return text


def need(text: str) -> None:
    """Skip the test where the package for a file is not installed."""
    package, _ = stores._PACKAGES.get(stores.parse(text).kind, ("numpy", ""))
    pytest.importorskip(package, reason=f"{package} is not installed")


def load(text: str) -> np.ndarray:
    with stores.opened(stores.parse(text)) as array:
        return np.array(array[:])


def normalized(x: np.ndarray = X, **options: Any) -> np.ndarray:
    bn = mbn.BatchNorm1d(None, backend="numpy", **options).fit([x], progress=False)
    return bn.eval()(x)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """Return the one line with which the command is refused."""
    try:
        found = main(["normalize", *map(str, arguments)])
    except SystemExit as end:
        found = end.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, "")
    assert "Traceback" not in err
    return err.strip().rpartition("\n")[2]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILES = ["x.npy", "x.npz:a", "x.zarr", "x.zarr:g/a", "x.zarr.zip:a", "x.h5", "x.hdf5:g/a"]


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("source", FILES)
def test_every_kind_is_normalised_to_every_kind(source: str, target: str, tmp_path: Path) -> None:
    need(target)
    chunks = None if "np" in source else (70, 4, 3)
    source = save(str(tmp_path / source), chunks=chunks)
    (tmp_path / "out").mkdir()
    target = str(tmp_path / "out" / target)
    assert main(["normalize", source, target, "--backend", "numpy"]) == 0
    np.testing.assert_array_equal(load(target), normalized())
    assert len(left(tmp_path / "out")) == 1


@pytest.mark.parametrize("chunks", [(300, 1, 10), (2, 6, 10), (70, 2, 3), (1000, 100, 100)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("axis", ["1", "-1"])
@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_output_has_the_bits_of_one_call(
    chunks: tuple[int, ...], dtype: str, axis: str, backend: str, tmp_path: Path
) -> None:
    x = (X / 100).astype(dtype)
    source = save(str(tmp_path / "x.h5"), x, tuple(map(min, chunks, x.shape)))
    arguments = ["--axis", axis, "--eps", "0.01", "--save-layer", str(tmp_path / "bn"), "--backend", backend, "--quiet"]
    assert main(["normalize", source, str(tmp_path / "y.h5"), *arguments]) == 0
    y = load(str(tmp_path / "y.h5"))
    bn = mbn.BatchNorm1d.load(tmp_path / "bn", backend=backend)
    assert (bn.training, bn.axis, bn.eps, y.dtype) == (False, int(axis), 0.01, np.dtype(dtype))
    np.testing.assert_array_equal(y, mbn.to_numpy(bn(x)))


def test_layer_of_a_file_normalises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, layer = (str(tmp_path / name) for name in ("x.npy", "y.npy", "bn"))
    save(source)
    bn = mbn.BatchNorm1d(6, eps=0.5, backend="numpy").fit([X / 2], progress=False)
    bn.weight, bn.bias = np.arange(6.0), np.arange(1, 7.0)
    bn.save(layer)
    assert main(["normalize", source, target, "--layer", layer]) == 0
    np.testing.assert_array_equal(np.load(target), bn.eval()(X))
    out, _ = capsys.readouterr()
    assert out == f"{target}: (1200, 6, 10), float32, is {source} normalised by {layer}.\n"


def test_array_without_rows_is_normalised_by_a_layer(tmp_path: Path) -> None:
    mbn.BatchNorm1d(6).save(tmp_path / "bn")
    for name in ("x.npy", "x.zarr", "x.h5"):
        if frameworks.is_installed({"r": "zarr", "5": "h5py"}.get(name[-1], "numpy")):
            source, target = save(str(tmp_path / name), X[:0]), str(tmp_path / f"y{name[1:]}")
            assert main(["normalize", source, target, "--layer", str(tmp_path / "bn"), "--quiet"]) == 0
            assert load(target).shape == (0, 6, 10)


def test_file_in_fortrans_order_is_normalised(tmp_path: Path) -> None:
    source = save(str(tmp_path / "x.npy"), np.asfortranarray(X))
    assert main(["normalize", source, str(tmp_path / "y.npy"), "--backend", "numpy", "--quiet"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), normalized())


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["normalize", save(str(tmp_path / "x.npy")), str(tmp_path / "y.npy"), "--fit", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_store_of_zarr_is_like_its_input(tmp_path: Path) -> None:
    for i, options in enumerate(
        [
            {"chunks": (50, 3, 10), "compressors": zarr.codecs.GzipCodec(level=3), "fill_value": 7.0},
            {"chunks": (10, 6, 10), "shards": (100, 6, 10), "dimension_names": ("n", "c", "l")},
            {"chunks": (50, 3, 10), "zarr_format": 2},
        ]
    ):
        source, target = tmp_path / f"{i}.zarr", tmp_path / f"out{i}.zarr"
        given = zarr.create_array(store=source, data=X, attributes={"unit": "K"}, **options)
        assert main(["normalize", str(source), str(target), "--quiet"]) == 0
        found = zarr.open_array(target, mode="r")
        for name in ("chunks", "shards", "compressors", "fill_value", "dtype"):
            assert getattr(found, name) == getattr(given, name), name
        assert dict(found.attrs) == {"unit": "K"}
        assert getattr(found.metadata, "dimension_names", None) == getattr(given.metadata, "dimension_names", None)
        np.testing.assert_array_equal(found[:], normalized())


def test_filter_that_rounds_is_not_carried_over(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=X.round(), chunks=(50, 6, 10), scaleoffset=0)
    assert main(["normalize", str(tmp_path / "x.h5"), str(tmp_path / "y.h5"), "--quiet"]) == 0
    np.testing.assert_array_equal(load(str(tmp_path / "y.h5")), normalized(X.round()))


def test_dataset_of_hdf5_is_like_its_input(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        options = {"compression": "gzip", "compression_opts": 2, "shuffle": True, "fletcher32": True, "fillvalue": 3.0}
        given = file.create_dataset("g/x", data=X, chunks=(50, 3, 10), maxshape=(None, 6, 10), **options)
        given.attrs["unit"] = "K"
        given.dims[1].label = "channel"
        scale = file.create_dataset("channel", data=np.arange(6))
        scale.make_scale()
        given.dims[1].attach_scale(scale)
    assert main(["normalize", f"{tmp_path}/x.h5:/g/x", f"{tmp_path}/y.h5", "--quiet"]) == 0
    with h5py.File(tmp_path / "y.h5") as file:
        found = file["x"]
        assert (found.chunks, found.maxshape) == ((50, 3, 10), (None, 6, 10))
        for name, value in options.items():
            assert getattr(found, name) == value, name
        assert dict(found.attrs).keys() == {"unit", "DIMENSION_LABELS"}
        assert found.dims[1].label == "channel"


def test_compression_of_npz_is_carried_over(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.ones((500, 6), np.float32))
    assert main(["normalize", f"{tmp_path}/x.npz", f"{tmp_path}/y.npz:b", "--quiet"]) == 0
    with zipfile.ZipFile(tmp_path / "y.npz") as archive:
        (entry,) = archive.infolist()
    assert (entry.filename, entry.compress_type) == ("b.npy", zipfile.ZIP_DEFLATED)


# Refusals.


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x.txt", "names no array: give x.npy"),
        ("", "names no array"),
        ("x.npy:a", "a .npy file has one array, without a name"),
        ("missing.npy", "missing.npy is not there."),
        ("missing.npz", "missing.npz is not there."),
        ("text.npy", "is no .npy file"),
        ("text.npz", "text.npz cannot be read: File is not a zip file."),
        ("two.npz", "holds several arrays or none: name one.*It has a, b."),
        ("two.npz:c", "has no c. It has a, b."),
        ("fortran.npz", "it is in Fortran's order"),
        ("objects.npz", "it holds Python objects"),
        ("integers.npy", "x is int64; .*Convert x"),
        ("vector.npy", r"x has shape \(5,\)"),
        ("scalar.npy", r"x has shape \(\)"),
    ],
)
def test_input_is_refused(source: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "text.npz").write_text("no array")
    np.savez(tmp_path / "two.npz", a=X, b=X)
    np.savez(tmp_path / "fortran.npz", a=np.asfortranarray(X))
    np.savez(tmp_path / "objects.npz", a=np.array([[None]]))
    np.save(tmp_path / "integers.npy", np.ones((4, 3), np.int64))
    np.save(tmp_path / "vector.npy", np.ones(5, np.float32))
    np.save(tmp_path / "scalar.npy", np.float32(5))
    before = left(tmp_path)
    given = str(tmp_path / source) if source else ""
    line = refused(capsys, given, tmp_path / "y.npy", "--backend", "numpy")
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(line)), line
    assert left(tmp_path) == before


def test_array_of_a_store_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.h5", "x.zarr"):
        save(f"{tmp_path}/{name}:g/a")
        save(f"{tmp_path}/{name}:b")
        assert "several arrays or none: name one" in (
            line := refused(capsys, tmp_path / name, tmp_path / "y.npy", "--backend", "numpy")
        )
        assert "It has b, g/a." in line
        line = refused(capsys, f"{tmp_path / name}:c", tmp_path / "y.npy", "--backend", "numpy")
        assert "has no c. It has b, g/a." in line
    assert left(tmp_path) == ["x.h5", "x.zarr"]


@pytest.mark.parametrize(("package", "suffix", "extra"), [("h5py", "h5", "hdf5"), ("zarr", "zarr", "zarr")])
def test_missing_package_is_named_with_its_extra(
    package: str, suffix: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else True)
    line = refused(capsys, save(str(tmp_path / "x.npy")), tmp_path / f"y.{suffix}")
    assert f"needs {package}, which is not installed: pip install 'mbn-batchnorm[{extra}]'." in line


@pytest.mark.parametrize("how", ["path", "other path", "symbolic link", "hard link", "within", "around"])
def test_output_is_never_the_input(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "x.npy"
    save(str(source))
    target = {"other path": tmp_path / ".." / tmp_path.name / "x.npy", "path": source}.get(how, tmp_path / "y.npy")
    if how == "symbolic link":
        target.symlink_to(source)
    if how == "hard link":
        target.hardlink_to(source)
    if how in {"within", "around"}:
        pytest.importorskip("zarr", reason="zarr is not installed")
        folder = tmp_path / "f.zarr"
        folder.mkdir()
        (folder / "zarr.json").write_text("{}")
        source, target = (source.rename(folder / "x.npy"), folder)[:: 1 if how == "around" else -1]
        if how == "within":
            target = folder / "y.npy"
    line = refused(capsys, source, target, "--overwrite", "--backend", "numpy")
    assert "the input: name another file." in line
    for option in ("--layer", "--save-layer"):
        line = refused(capsys, tmp_path / "z.npy", tmp_path / "b.npy", option, tmp_path / "b.npy")
        assert f"{option}: name another file." in line


def test_existing_output_is_kept_unless_overwrite_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = save(str(tmp_path / "x.npy")), tmp_path / "y.npy"
    target.write_text("old")
    target.chmod(0o640)
    line = refused(capsys, source, target)
    assert line == (
        f"mbn normalize: {target} is there already: name another file, or give --overwrite to replace all of it."
    )
    assert target.read_text() == "old"
    assert main(["normalize", source, str(target), "--overwrite", "--quiet"]) == 0
    np.testing.assert_array_equal(np.load(target), normalized())
    assert target.stat().st_mode & 0o777 == 0o640
    assert left(tmp_path) == ["x.npy", "y.npy"]


def test_folder_is_overwritten_only_if_it_is_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = save(f"{tmp_path}/x.npy"), tmp_path / "y.zarr"
    target.mkdir()
    (target / "mine").write_text("mine")
    pytest.importorskip("zarr", reason="zarr is not installed")
    assert "is a folder and no store of zarr" in refused(capsys, source, target, "--overwrite")
    save(str(target), X[:5])
    assert main(["normalize", source, str(target), "--overwrite", "--quiet"]) == 0
    np.testing.assert_array_equal(load(str(target)), normalized())
    assert left(tmp_path) == ["x.npy", "y.zarr"]
    assert not (target / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layer", "bn", "--fit"), "not allowed with argument"),
        (("--layer", "bn", "--eps", "1"), "--eps is for --fit"),
        (("--layer", "missing"), "missing cannot be read: No such file"),
        (("--layer", "x.npy"), "holds no layer"),
        (("--layer", "untracked"), "has no running statistics"),
        (("--layer", "bn"), "6 channels on axis 1; num_features is 4"),
        (("--eps", "-1"), "eps"),
        (("--backend", "numpi"), "Did you mean 'numpy'"),
        (("--dtype", "float16"), "invalid choice"),
        (("--save-layer", "nowhere/bn"), "--save-layer: .*nowhere/bn cannot be written"),
    ],
)
def test_options_are_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save("x.npy")
    mbn.BatchNorm1d(4).save("bn")
    mbn.BatchNorm1d(4, track_running_stats=False).save("untracked")
    line = refused(capsys, "x.npy", "y.npy", *arguments)
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(line)), line
    assert left(tmp_path) == ["bn", "untracked", "x.npy"]


def test_output_in_a_missing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, save(str(tmp_path / "x.npy")), tmp_path / "nowhere" / "y.npy")
    assert "y.npy cannot be written: No such file or directory." in line


# Failures.


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", ["y.npy", "y.npz", "y.zarr", "y.zarr.zip", "y.h5"])
@pytest.mark.parametrize("there", [True, False])
def test_full_disk_leaves_nothing(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, there: bool
) -> None:
    need(target)
    x = np.random.default_rng(8).standard_normal((3000, 6, 10)).astype(np.float32)
    source = save(str(tmp_path / "x.npy"), x)
    before = load(save(str(tmp_path / target) + ":x" * ("npz" in target))) if there else None
    files_before = left(tmp_path)
    with largest_file(200_000):
        line = refused(capsys, source, tmp_path / target, "--overwrite", "--backend", "numpy", code=1)
    assert line.endswith("Nothing has been written: once that is mended, run it again.")
    assert left(tmp_path) == files_before
    if there:
        np.testing.assert_array_equal(load(str(tmp_path / target) + ":x" * ("npz" in target)), before)


def test_interrupt_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    source = save(str(tmp_path / "x.npy"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_evaluated", interrupt)
    assert main(["normalize", source, str(tmp_path / "y.npy"), "--quiet"]) == 130
    assert capsys.readouterr() == ("", "mbn normalize: interrupted\n")
    assert left(tmp_path) == ["x.npy"]


def test_disk_that_fails_at_the_end_leaves_the_old_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    source, target = save(str(tmp_path / "x.npy")), tmp_path / "y.npy"
    target.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", fail)
    line = refused(capsys, source, target, "--overwrite", code=1)
    assert "y.npy cannot be written: Input/output error." in line
    assert target.read_text() == "old"
    assert left(tmp_path) == ["x.npy", "y.npy"]


def test_replaced_store_comes_back_if_the_new_one_cannot_take_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    store = tmp_path / "y.zarr"
    store.mkdir()
    (store / "zarr.json").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", fail)
    replacing = files.replacing(store)
    new = replacing.__enter__()
    new.mkdir()
    (new / "zarr.json").write_text("new")
    with pytest.raises(OSError, match="Input/output"):
        replacing.__exit__(None, None, None)
    assert (store / "zarr.json").read_text() == "old"
    assert left(tmp_path) == ["y.zarr"]


def test_damaged_archive_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "x.npz"
    np.savez(source, a=X)
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    line = refused(capsys, source, tmp_path / "y.npy", "--backend", "numpy", code=1)
    assert "Bad CRC-32" in line
    assert left(tmp_path) == ["x.npz"]


def test_layer_that_cannot_be_saved_after_all_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mbn.BatchNorm1d, "save", fail)
    source, target, layer = save(str(tmp_path / "x.npy")), tmp_path / "y.npy", tmp_path / "bn"
    line = refused(capsys, source, target, "--save-layer", layer, code=1)
    assert line == f"mbn normalize: {target}: (1200, 6, 10), float32, but {layer}: No space left on device."
    np.testing.assert_array_equal(np.load(target), normalized())


ENDED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may inherit that it is ignored
from mbn.commands import cli
from mbn.commands.normalize import command
def wait(*_):
    import time
    print("go", flush=True)
    time.sleep(60)
command._evaluated = wait
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_signal_leaves_nothing_for_long(number: int, code: int, tmp_path: Path) -> None:
    source, target = save(str(tmp_path / "x.npy")), tmp_path / "y.npy"
    arguments = [sys.executable, "-c", ENDED, "normalize", source, str(target), "--backend", "numpy", "--quiet"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "go\n"
            assert len(left(tmp_path)) == 2
            assert main(["normalize", source, str(tmp_path / "z.npy"), "--quiet"]) == 0
            child.send_signal(number)
            child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == code
    if number == signal.SIGKILL:  # the next command removes what it has left
        assert len(left(tmp_path)) == 3
        assert main(["normalize", source, str(target), "--quiet"]) == 0
        target.unlink()
    assert left(tmp_path) == ["x.npy", "z.npy"]


def test_progress_is_in_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("mbn.commands.progress._PERIOD", 0.02)
    evaluated = command._evaluated
    monkeypatch.setattr(command, "_evaluated", lambda *args: time.sleep(0.005) or evaluated(*args))
    assert main(["normalize", save(str(tmp_path / "x.npy")), str(tmp_path / "y.npy"), "--backend", "numpy"]) == 0
    assert " of 576.0 kB" in capsys.readouterr().err


def test_saved_layer_is_not_written_over_the_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = save(str(tmp_path / "x.npy"))
    line = refused(capsys, source, tmp_path / "y.npy", "--save-layer", source)
    assert f"--save-layer {source} is, or is within, the input {source}: name another file." in line
    np.testing.assert_array_equal(np.load(source), X)


def test_output_that_is_no_regular_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "y.npy")
    line = refused(capsys, save(str(tmp_path / "x.npy")), tmp_path / "y.npy", "--overwrite")
    assert "y.npy is no regular file: name another file." in line


def test_backend_that_cannot_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mbn_jax.backend", None)
    monkeypatch.setattr(mbn.registry, "_loaded", {})
    line = refused(capsys, save(str(tmp_path / "x.npy")), tmp_path / "y.npy", "--backend", "jax")
    assert "backend 'jax'" in line
    assert left(tmp_path) == ["x.npy"]


def test_numpy_is_the_backend_where_numba_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mbn_numba.backend", None)
    monkeypatch.setattr(mbn.registry, "_loaded", {})
    assert command._default_backend().name == "numpy"


def test_command_runs_in_a_thread_that_gets_no_signals(tmp_path: Path) -> None:
    source, found = save(str(tmp_path / "x.npy")), []
    thread = threading.Thread(
        target=lambda: found.append(main(["normalize", source, str(tmp_path / "y.npy"), "--quiet"]))
    )
    thread.start()
    thread.join(60)
    assert found == [0]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy").shape, X.shape)


def test_folder_may_end_with_a_slash() -> None:
    assert stores.parse("x.zarr/") == stores.parse("x.zarr")


def test_small_output_has_the_bits_of_one_call(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    x = np.ascontiguousarray(X[:20])
    source = save(str(tmp_path / "x.h5"), x, (7, 2, 3))
    assert main(["normalize", source, str(tmp_path / "y.h5"), "--backend", "numpy", "--quiet"]) == 0
    bn = mbn.BatchNorm1d(6, backend="numpy").fit(x, progress=False).eval()
    np.testing.assert_array_equal(load(str(tmp_path / "y.h5")), bn(x))


def test_environment_chooses_the_backend(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("MBN_BACKEND", "numpy")
    assert command._default_backend().name == "numpy"
    monkeypatch.setenv("MBN_BACKEND", "numpi")
    assert "MBN_BACKEND is 'numpi'" in refused(capsys, save(str(tmp_path / "x.npy")), tmp_path / "y.npy")


def test_existing_layer_is_kept_without_overwrite(tmp_path: Path, capsys: Any) -> None:
    source, layer = save(str(tmp_path / "x.npy")), tmp_path / "notes.csv"
    layer.write_text("mine")
    assert f"{layer} is there already" in refused(capsys, source, tmp_path / "y.npy", "--save-layer", layer)
    assert layer.read_text() == "mine"
    assert main(["normalize", source, str(tmp_path / "y.npy"), "--save-layer", str(layer), "--overwrite"]) == 0
    assert mbn.BatchNorm1d.load(layer).num_features == 6


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    source, target = save(str(tmp_path / "x.npy")), tmp_path / "y.npy"
    evaluated = command._evaluated
    monkeypatch.setattr(command, "_evaluated", lambda *args: target.write_text("theirs") and evaluated(*args))
    assert "y.npy is there already" in refused(capsys, source, target, "--backend", "numpy")
    assert target.read_text() == "theirs"
    assert left(tmp_path) == ["x.npy", "y.npy"]


def test_store_that_a_killed_command_had_moved_away_is_kept(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    target = tmp_path / "y.zarr"
    folder = tmp_path / f"{files._prefix(target)}0.tmp"
    save(str(target), X[:5])
    folder.mkdir()
    target.rename(folder / files._OLD)
    assert "y.zarr is there already" in refused(capsys, save(str(tmp_path / "x.npy")), target)
    np.testing.assert_array_equal(load(str(target)), X[:5])
    assert left(tmp_path) == ["x.npy", "y.zarr"]


def test_output_is_no_file_that_the_input_links_to(tmp_path: Path, capsys: Any) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    data = save(str(tmp_path / "data.h5"))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["linked"] = h5py.ExternalLink("data.h5", "/x")
        layout = h5py.VirtualLayout(X.shape, X.dtype)
        with h5py.File(data) as source:
            layout[...] = h5py.VirtualSource(source["x"])
        file.create_virtual_dataset("virtual", layout)
    before = Path(data).read_bytes()
    for name in ("linked", "virtual"):
        line = refused(capsys, f"{tmp_path}/link.h5:{name}", f"{tmp_path}/data.h5:y", "--overwrite")
        assert "data.h5 is, or is within, " in line
    assert Path(data).read_bytes() == before


@pytest.mark.parametrize("name", ["y.npz:../y", "y.zarr:../y", "y.h5:a/../../y"])
def test_name_within_a_file_stays_within_it(name: str, tmp_path: Path, capsys: Any) -> None:
    assert "has no '..'" in refused(capsys, save(str(tmp_path / "x.npy")), tmp_path / name)


def test_result_line_names_the_output_as_it_is(tmp_path: Path, capsys: Any) -> None:
    target = f"{tmp_path}/y.npz:train"
    assert main(["normalize", save(str(tmp_path / "x.npy")), target, "--backend", "numpy"]) == 0
    assert f"{target}: (1200, 6, 10), float32" in capsys.readouterr().out


def test_signal_has_no_effect_once_the_output_takes_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    source, layer = save(str(tmp_path / "x.npy")), tmp_path / "bn"
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    arguments = ["normalize", source, str(tmp_path / "y.npy"), "--save-layer", str(layer), "--quiet"]
    assert main([*arguments, "--backend", "numpy"]) == 0
    assert left(tmp_path) == ["bn", "x.npy", "y.npy"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_termination_during_the_import_of_a_backend_is_one(tmp_path: Path, monkeypatch: Any) -> None:
    def terminated(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(mbn.registry, "_loaded", {})
    monkeypatch.setattr(mbn.registry, "_import", terminated)
    assert main(["normalize", save(str(tmp_path / "x.npy")), str(tmp_path / "y.npy"), "--backend", "numpy"]) == 143
    assert left(tmp_path) == ["x.npy"]
