"""The loops that JAX's programs on the CPU call where Numba is installed."""

import ctypes
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from jax_samples import jax, jnp

import mbn
from mbn_jax import kernels
from mbn_jax.kernels import compiled_loops

numba = pytest.importorskip("numba")

CASES = [
    *[((1100, 37), 1, False), ((300, 5, 29), 1, False), ((9, 5, 131), 1, False), ((9, 5, 131), -1, False)],
    *[((1100, 37), 1, True), ((300, 5, 29), -1, True), ((1, 3, 5000), 1, True)],
]
"""Shapes of (N, C, L), axes of the channels, and whether there is a mask."""


@pytest.fixture
def every_size(monkeypatch):
    """Call the loops for arrays of every size."""
    monkeypatch.setattr(compiled_loops, "LEAST", [0, 0])
    monkeypatch.setattr(compiled_loops, "CHUNK", 1 << 12)
    compiled_loops._planned.cache_clear()


def step(shape, axis=1, **masking):
    """Return a new compiled step, forward and backward, and its arguments."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    given = [jnp.asarray(value.swapaxes(1, -1) if axis == -1 else value) for value in (100 + x, dy)]
    bn = mbn.BatchNorm1d(shape[1], backend="jax", axis=axis)

    def run(params, x, dy):
        def train(params, x):
            return bn.apply(params, bn.state, x, training=True, **masking)

        y, pullback, state = jax.vjp(train, params, x, has_aux=True)
        return y, state, pullback(dy), bn.apply(params, state, x, training=False)[0]

    return jax.jit(run), (bn.params, *given)


def called(function, arguments):
    """Return the loops that a compiled program calls."""
    text = function.lower(*arguments).compile().as_text()
    return {name for name in compiled_loops.TARGETS if f'"{name}"' in text}


@pytest.mark.parametrize(("shape", "axis", "is_masked"), CASES)
def test_loops_give_the_results_of_xlas_form(shape, axis, is_masked, every_size):
    cells = shape[0], *shape[2:]
    masking = {"mask": jnp.asarray(np.arange(np.prod(cells)).reshape(cells) % 3 > 0)} if is_masked else {}
    function, arguments = step(shape, axis, **masking)
    assert called(function, arguments) == set(compiled_loops.TARGETS)
    actual = function(*arguments)
    compiled_loops.LEAST[:] = 2 * [1 << 60]
    function, arguments = step(shape, axis, **masking)
    assert called(function, arguments) == set()
    expected = function(*arguments)
    np.testing.assert_array_equal(actual[-1], expected[-1])  # so a block of evaluation has the bits of the whole
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-7, atol=2e-7 * float(np.max(np.abs(other))))


def test_large_arrays_take_the_loops_and_small_ones_do_not():
    assert called(*step((1024, 256))) == {"mbn_moments", "mbn_grad_sums", "mbn_grad_input"}
    assert called(*step((32, 64))) == called(*step((1024, 256), mask=np.ones(1024, bool))) == set()


def test_programs_for_elsewhere_do_not_call_the_loops(every_size):
    function, arguments = step((64, 4))
    exported = jax.export.export(function)(*arguments)
    assert not any(name in exported.mlir_module() for name in compiled_loops.TARGETS)
    batched = jax.jit(jax.vmap(function, (None, 0, 0)))
    assert called(batched, (arguments[0], *(value[None] for value in arguments[1:]))) == set()


def test_pullback_of_a_traced_layer_takes_the_loops_where_the_order_is_known(every_size):
    pulled = jax.jit(lambda bn, x: bn.vjp(x)[1](x))
    bn = mbn.BatchNorm1d(4, backend="jax")
    assert "mbn_grad_input" in called(pulled, (bn, jnp.ones((8, 4))))
    assert "mbn_grad_input" not in called(pulled, (bn, jnp.ones((8, 4, 2))))


def test_all_threads_flush_subnormal_numbers_alike(every_size):
    x = jnp.full((1 << 14, 4), 1e-40)
    y = mbn.BatchNorm1d(4, backend="jax", affine=False).eval()(x)
    assert len(np.unique(np.asarray(y).view(np.int32))) == 1


BITS = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib, json
import jax
from test_mbn_jax_loops import called, compiled_loops, step
compiled_loops.LEAST[:] = 2 * [0]
compiled_loops.CHUNK = 1 << 12
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
digests = []
for shape, axis in (((3000, 37), 1), ((300, 5, 129), 1), ((300, 5, 129), -1)):
    function, arguments = step(shape, axis)
    assert len(called(function, arguments)) == 4
    bits = [[leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(function(*arguments)))] for _ in range(5)]
    assert all(again == bits[0] for again in bits)
    digests.append(hashlib.sha256(b"".join(bits[0])).hexdigest())
print(json.dumps([digests, "/jax/compilation_cache/cache_hits" in hits]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_bits_are_those_of_one_thread_and_of_a_program_from_the_cache(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    found = []
    for threads in ("all", "one"):
        command = [sys.executable, "-c", BITS, threads]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    (bits, was_cached), (others, is_cached) = found
    assert bits == others
    assert (was_cached, is_cached) == (False, True)


@pytest.fixture
def unregistered(monkeypatch):
    """Forget that the loops are registered."""
    monkeypatch.setattr(compiled_loops, "_errors", [])
    compiled_loops._registered.cache_clear()
    yield
    compiled_loops._registered.cache_clear()


def test_without_numba_xlas_form_computes_silently(every_size, unregistered, monkeypatch, caplog):
    monkeypatch.delattr(kernels, "xla_handlers", raising=False)
    monkeypatch.setitem(sys.modules, "mbn_jax.kernels.xla_handlers", None)
    function, arguments = step((64, 4))
    assert called(function, arguments) == set()
    assert caplog.records == []


def test_refused_handler_leaves_xlas_form_and_one_warning(every_size, unregistered, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("the API version (0.3) is incompatible")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    function, arguments = step((64, 4))
    with caplog.at_level(logging.WARNING, "mbn.numba"):
        assert called(function, arguments) == set()
    (record,) = caplog.records
    assert "the API version (0.3) is incompatible" in record.getMessage()


def words(*values):
    """Return words in memory, among them the addresses of other words, which live as long."""
    made = (ctypes.c_int64 * len(values))(
        *(ctypes.addressof(value) if isinstance(value, ctypes.Array) else value for value in values)
    )
    made.others = values
    return made


def handler():
    from mbn_jax.kernels import xla_handlers

    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(xla_handlers.address_of_pass(compiled_loops.NORMALIZE))


def frame(extension=0, api=0, *, size=168):
    """Return a frame without arguments, results and attributes."""
    nothing = 40, 0, 0, 0, 0
    return words(size, extension, api, 0, 3, *nothing, *nothing, 48, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("frame_size", "size", "answer"), [(168, 32, 3 << 32), (160, 32, -1), (168, 24, -1)])
def test_handler_names_its_version_only_where_it_knows_the_structs(frame_size, size, answer):
    metadata = words(36, 24, 0, 0, 0, 0)
    asked = frame(words(size, 1, 0, metadata), size=frame_size)
    assert handler()(ctypes.addressof(asked)) == 0
    assert metadata[3] == answer


@pytest.mark.parametrize(("size", "version"), [(80, 3 << 32), (192, 1 | 3 << 32), (192, 3 << 32)])
def test_handler_returns_an_error_for_a_frame_of_another_layout(size, version):
    messages = []

    @ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    def create_error(given):
        messages.append((ctypes.cast(given[2], ctypes.c_char_p).value, given[3]))
        return 77

    api = words(size, 0, 24, 0, version, 0, ctypes.cast(create_error, ctypes.c_void_p).value, *(12 * [0]))
    given = frame(api=api)  # it has no attribute, whatever its version
    assert handler()(ctypes.addressof(given)) == 77
    assert messages == [(b"the interface of XLA is not the one that mbn's handlers were made for", 13)]


def test_concurrent_programs_share_the_threads(every_size):
    from concurrent.futures import ThreadPoolExecutor

    function, arguments = step((3000, 37))
    expected = jax.tree.leaves(function(*arguments))
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: jax.device_get(function(*arguments)), range(64)):
            for one, other in zip(jax.tree.leaves(result), expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_donated_arrays_are_normalised(every_size):
    bn = mbn.BatchNorm1d(37, backend="jax")
    x = np.random.default_rng(0).standard_normal((1100, 37), np.float32)
    train = partial(bn.apply, bn.params, bn.state, training=True)
    y, _ = jax.jit(train, donate_argnums=0)(jnp.asarray(x))
    np.testing.assert_array_equal(y, jax.jit(train)(jnp.asarray(x))[0])
