"""Tests of Numba alone: when functions are compiled, their cache, and the messages about both."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

import mbn
from mbn_cpu import installed

numba = pytest.importorskip("numba")
ml_dtypes = pytest.importorskip("ml_dtypes")

from mbn_cpu.kernels import numba_compilation, numba_halves, numba_loops

HALVES = [np.float16, ml_dtypes.bfloat16]
_STEP = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import numpy as np, mbn
x = np.ones((8, 3), np.float32)
bn = mbn.BatchNorm1d(3, backend="numba")
y, pullback = bn.vjp(x)
pullback(x)
bn.eval()(x)
if "numba.np.linalg" in sys.modules:
    print("It imported all that a compilation needs.")
"""


def step(cache):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.splitlines()


def test_first_call_logs_its_compilation_and_the_next_process_uses_the_cache(tmp_path):
    first = step(tmp_path)
    assert [line for line in first if line.startswith("Numba compiles")] == [
        f"Numba compiles {name} for float32, once for this machine." for name in ("train", "pull_back", "normalize_by")
    ]
    assert all(line.endswith(" s.") for line in first[1:-1:2])
    assert first[-1] == "It imported all that a compilation needs."
    assert step(tmp_path) == []


def test_compilation_of_other_functions_is_not_logged(caplog):
    import numba

    @numba.njit
    def double(x):
        return 2 * x

    with caplog.at_level(logging.INFO, logger=numba_compilation.logger.name):
        double(1)
    assert caplog.records == []


_CALLS = """
import sys
import numpy as np
from mbn_cpu.kernels.numba_compilation import compiled

@compiled
def doubled(x):
    return 2 * x[0]

if sys.argv[1] == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
print(*(doubled(np.array([1.5]).astype(dtype)) for dtype in sys.argv[2:]))
"""
_EVALUATION = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
import torch, mbn
print(mbn.BatchNorm1d(3, eps=0, backend="torch").eval()(torch.full((2, 3), 3.0)).tolist())
"""


_CALLBACK = """
import ctypes, logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import other
from mbn_cpu.kernels.numba_compilation import callback

def moved(address):
    return address + other.distance()

print(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(callback(moved, other))(40))
"""


def test_callback_is_compiled_again_after_a_change_of_a_function_in_it(tmp_path):
    (tmp_path / "program.py").write_text(_CALLBACK)
    found = []
    for distance in (1, 1, 2):
        (tmp_path / "other.py").write_text(f"import numba\n\n@numba.njit\ndef distance():\n    return {distance}\n")
        out, said = run([tmp_path / "program.py"], tmp_path)
        *messages, result = out.splitlines()
        found.append((int(result), [message.startswith("Numba compiled moved in ") for message in messages], said))
    assert found == [(41, [True], ""), (41, [], ""), (42, [True], "")]


def calls(folder, disk, *dtypes):
    """Return the output and the warnings of a process that calls a compiled function."""
    program = folder / "program.py"
    if not program.exists():
        program.write_text(_CALLS)
    return run([program, disk, *dtypes], folder)


def run(arguments, cache):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment)
    return done.stdout, done.stderr


def empty(file):
    file.write_bytes(b"")


def scramble(file):
    file.write_bytes(b"\x80\x04garbage")


def make_unreadable(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [empty, scramble, make_unreadable])
def test_damaged_cache_is_compiled_again_with_one_warning(tmp_path, damage, suffix):
    assert calls(tmp_path, "there", "float32") == ("3.0\n", "")
    (file,) = tmp_path.rglob(f"*.{suffix}")
    damage(file)
    out, said = calls(tmp_path, "there", "float32", "float64")
    assert out == "3.0 3.0\n"
    assert said.startswith(f"Numba's cache in {file.parent} cannot be used (")
    assert said.count("\n") == 1


def test_full_disk_leads_to_a_compilation_with_one_warning(tmp_path):
    pytest.importorskip("resource", reason="no limits on this system")
    out, said = calls(tmp_path, "full", "float32", "float64")
    assert out == "3.0 3.0\n"
    assert "cannot be used (OSError: [Errno 27] File too large" in said
    assert said.count("\n") == 1


def test_torch_works_without_the_cache(tmp_path):
    pytest.importorskip("resource", reason="no limits on this system")
    out, said = run(["-c", _EVALUATION], tmp_path)
    assert out == f"{[[3.0] * 3] * 2}\n"
    assert "cannot be used (OSError: [Errno 27] File too large" in said
    assert said.count("\n") == 1


def test_cached_code_of_another_signature_is_compiled_again(tmp_path):
    both = "float32", "int64"
    assert calls(tmp_path, "there", *both) == ("3.0 2\n", "")
    one, two = sorted(tmp_path.rglob("*.nbc"))  # swap the files, as two processes may that write at the same time
    contents = one.read_bytes(), two.read_bytes()
    two.write_bytes(contents[0])
    one.write_bytes(contents[1])
    out, said = calls(tmp_path, "there", *both)
    assert out == "3.0 2\n"
    assert "is another's" in said
    assert said.count("\n") == 1


def test_broken_numba_is_logged_and_torch_uses_numpy_kernels(monkeypatch, caplog):
    class Broken:
        def find_spec(self, name, *_):
            if name == "mbn_cpu.kernels.numba_passes":
                raise OSError("could not load libllvmlite.so")

    monkeypatch.delitem(sys.modules, "mbn_cpu.kernels.numba_passes", raising=False)
    monkeypatch.delattr("mbn_cpu.kernels.numba_passes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert type(installed.fastest.__wrapped__()) is installed.WithNumpy
    (said,) = caplog.messages
    assert said == "Numba does not work here, which makes mbn slower: OSError: could not load libllvmlite.so"


def test_missing_cache_folder_leads_to_a_compilation_with_a_warning(monkeypatch, caplog):
    def no_folder(_):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba_compilation, "_Cache", no_folder)
    monkeypatch.setattr(numba_compilation, "_warned", [])
    for _ in range(2):
        assert numba_compilation.compiled(lambda x: x[0] + 1)(np.ones(1)) == 2
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("Numba's cache cannot be used (RuntimeError: cannot cache function: no locator available)")


@pytest.mark.parametrize("shape", [(8, 3), (30_000, 40), (40, 3, 900)])
def test_read_only_unaligned_and_strided_arrays_compile_nothing_more(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bn = mbn.BatchNorm1d(shape[1], backend="numba")

    def run(x):
        y, pullback = bn.vjp(x)
        return y, *pullback(x), bn.eval()(x), bn.train()

    run(x)
    run(np.asfortranarray(x))
    compiled = [
        numba_loops.train,
        numba_loops.pull_back,
        numba_loops.normalize_by,
        numba_loops.shifted_sums,
        numba_loops.normalize,
        numba_loops.input_gradient,
    ]
    before = [function.signatures for function in compiled]
    frozen = x.copy()
    frozen.flags.writeable = False
    assert frozen[:1].base is not None
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(shape)
    for other in (frozen, unaligned, x[::-1], x[:, ::-1], np.repeat(x, 2, axis=0)[::2]):
        run(other)
    assert [function.signatures for function in compiled] == before
    assert not frozen.flags.writeable


def test_numpy_arrays_still_belong_to_the_numpy_backend():
    mbn.get_backend("numba")
    bn = mbn.BatchNorm1d(3)
    bn(np.ones((4, 3), np.float32))
    assert bn.backend == "numpy"
    with mbn.use_backend("numba"):
        assert mbn.BatchNorm1d(3).backend == "numba"


@pytest.mark.parametrize("shape", [(3001, 3), (300, 300), (301, 5, 7), (33, 3, 300), (3, 2, 5000)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "last", "F"])
@pytest.mark.parametrize("training", [False, True])
def test_values_of_weight_0_are_left_out_of_every_loop(shape, dtype, order, *, training):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    weight = rng.integers(0, 3, shape[:1] + shape[2:])
    x = np.where(np.expand_dims(weight, 1) == 0, np.asarray(np.nan, dtype), x)
    if order != "C":
        x = np.asfortranarray(x) if order == "F" else np.ascontiguousarray(x.swapaxes(1, -1)).swapaxes(1, -1)

    def step(backend):
        bn = mbn.BatchNorm1d(shape[1], backend=backend, dtype="float64" if dtype == "float64" else None)
        y, pullback = bn.train(training).vjp(x, sample_weight=weight)
        return y, *pullback(dy), bn.running_mean, bn.running_var

    tolerance = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-12}[dtype]
    for one, other in zip(step("numba"), step("numpy"), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("dtype", HALVES)
def test_widen_is_exact_for_every_half(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(bits.size, np.float32)
    numba_halves.of(np.dtype(dtype)).widen(bits, values)
    expected = bits.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(values, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(values[numbers]), bits[numbers] >= 1 << 15)


@pytest.mark.parametrize("dtype", HALVES)
@np.errstate(over="ignore", under="ignore", invalid="ignore")
def test_narrow_rounds_to_nearest_even(dtype):
    # Every half, every midpoint of two, and the neighbours of both.
    points = np.arange(1 << 20, dtype=np.uint32)[:, None] << 12
    bits = (points + np.array([-1, 0, 1]).astype(np.uint32)).reshape(-1)
    rounded = np.empty(bits.size, np.uint16)
    numba_halves.of(np.dtype(dtype)).narrow(bits.view(np.float32), rounded)
    expected = bits.view(np.float32).astype(dtype)
    np.testing.assert_array_equal(rounded.view(dtype).astype(np.float32), expected.astype(np.float32))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(rounded[numbers], expected.view(np.uint16)[numbers])


@pytest.mark.parametrize(("features", "converts"), [("+avx,+f16c", True), ("+avx", False), ("", False)])
def test_float16_is_converted_by_numpy_without_instructions(features, converts, monkeypatch):
    monkeypatch.setattr(numba.core.config, "CPU_FEATURES", features)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert (numba_halves.of.__wrapped__(np.dtype("float16")) is not None) is converts


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("shape", [(3, 2), (700, 300)])
@pytest.mark.parametrize("training", [True, False])
def test_out_may_have_the_other_byte_order(backend: str, shape: tuple[int, ...], *, training: bool) -> None:
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    vectors = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    for dtype in (np.float32, np.float64):
        out = np.empty(shape, np.dtype(dtype).newbyteorder())
        arrays = [array.astype(dtype) for array in (x, *vectors)]
        result = mbn.functional.batch_norm(*arrays, training=training, out=out, backend=backend)
        assert result.output is out
        expected = mbn.functional.batch_norm(*arrays, training=training, backend=backend)
        np.testing.assert_array_equal(out, expected.output)
