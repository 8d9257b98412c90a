"""What is Numba's own: what is compiled, when, and who is told."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

import mbn
from mbn_cpu import compilation, halves, loops

_STEP = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import numpy as np, mbn
x = np.ones((8, 3), np.float32)
bn = mbn.BatchNorm1d(3, backend="numba")
y, pullback = bn.vjp(x)
pullback(x)
bn.eval()(x)
"""


def step(cache):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=True, env=environment)  # noqa: S603
    return run.stdout.splitlines()


def test_the_first_call_says_that_it_compiles_and_the_next_process_need_not(tmp_path):
    first = step(tmp_path)
    assert [line for line in first if line.startswith("Numba compiles")] == [
        f"Numba compiles {name} for float32, once for this machine." for name in ("train", "pull_back", "evaluate")
    ]
    assert all(line.endswith(" s.") for line in first[1::2])
    assert step(tmp_path) == []


def test_nothing_is_said_of_what_others_compile(caplog):
    import numba  # noqa: PLC0415

    @numba.njit
    def double(x):
        return 2 * x

    with caplog.at_level(logging.INFO, logger=compilation.logger.name):
        double(1)
    assert caplog.records == []


def test_without_a_folder_for_the_cache_each_process_compiles(monkeypatch):
    def njit(function, *, cache=False, **_):
        if cache:
            message = "cannot cache function: no locator available"
            raise RuntimeError(message)
        return function

    monkeypatch.setattr(compilation.numba, "njit", njit)
    assert compilation.compiled(step) is step


@pytest.mark.parametrize("shape", [(8, 3), (30_000, 40), (40, 3, 900)])
def test_read_only_and_unusual_arrays_compile_nothing_more(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bn = mbn.BatchNorm1d(shape[1], backend="numba")

    def run(x):
        y, pullback = bn.vjp(x)
        return y, *pullback(x), bn.eval()(x), bn.train()

    run(x)
    run(np.asfortranarray(x))
    compiled = [loops.train, loops.pull_back, loops.evaluate, loops.shifted_sums, loops.normalize, loops.input_gradient]
    before = [function.signatures for function in compiled]
    frozen = x.copy()
    frozen.flags.writeable = False
    assert frozen[:1].base is not None
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(shape)
    for other in (frozen, unaligned, x[::-1], x[:, ::-1], np.repeat(x, 2, axis=0)[::2]):
        run(other)
    assert [function.signatures for function in compiled] == before
    assert not frozen.flags.writeable


def test_numpy_stays_the_owner_of_numpy_arrays():
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
def test_what_has_no_weight_is_left_out_of_every_loop(shape, dtype, order, *, training):
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


def test_every_half_is_widened_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(bits.size, np.float32)
    halves.widen(bits, values.view(np.uint32), values)
    np.testing.assert_array_equal(values, bits.view(np.float16).astype(np.float32))
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(np.signbit(values[numbers]), bits[numbers] >= 1 << 15)


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def test_halves_are_rounded_to_the_nearest_and_ties_to_even():
    # Every half, what lies in the middle of two, and the neighbours of both.
    places = np.arange(1 << 20, dtype=np.uint32)[:, None] << 12
    bits = (places + np.array([-1, 0, 1]).astype(np.uint32)).reshape(-1)
    rounded = np.empty(bits.size, np.uint16)
    halves.narrow(bits, rounded)
    expected = bits.view(np.float32).astype(np.float16)
    np.testing.assert_array_equal(rounded.view(np.float16), expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(rounded[numbers], expected.view(np.uint16)[numbers])
