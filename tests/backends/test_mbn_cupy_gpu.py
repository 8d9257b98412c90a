"""Tests of CuPy's backend that need a GPU: streams, CUDA graphs, the memory pool, and more than 2**31 values."""

import importlib
import socket

import gpus
import numpy as np
import pytest

import mbn


@pytest.fixture(scope="module")
def cupy():
    if reason := gpus.missing("cupy"):
        pytest.skip(reason)
    return importlib.import_module("cupy")


@pytest.fixture
def pool(cupy):
    """Give CuPy a memory pool of its own, so that other tests cannot take memory that a graph writes to."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        yield pool


def _sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(32, 64), (1024, 256), (64, 32, 128)])
def test_cuda_graph_replays_training(cupy, pool, shape):
    del pool
    x, y = cupy.asarray(_sample(*shape)), cupy.empty(shape, np.float32)
    mean, var = cupy.zeros(shape[1], np.float32), cupy.ones(shape[1], np.float32)

    def step():
        result = mbn.functional.batch_norm(x, mean, var, training=True, out=y)
        mean[...], var[...] = result.running_mean, result.running_var

    reference = mbn.BatchNorm1d(shape[1], backend="numpy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        step()  # compiles, and fills the pool
        reference(x.get())
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for seed in range(1, 4):
            x.set(_sample(*shape, seed=seed))
            graph.launch()
            expected = reference(_sample(*shape, seed=seed))
            np.testing.assert_allclose(y.get(), expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(mean.get(), reference.running_mean, rtol=3e-7)
        np.testing.assert_allclose(var.get(), reference.running_var, rtol=3e-7)


def test_cuda_graph_replays_the_backward_pass(cupy, pool):
    del pool
    x, dy = cupy.asarray(_sample(512, 48)), cupy.asarray(_sample(512, 48, seed=1))
    bn = mbn.BatchNorm1d(48, backend="cupy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        _, pullback = bn.vjp(x)
        expected = [gradient.get() for gradient in pullback(dy)]
        stream.begin_capture()
        gradients = pullback(dy)
        graph = stream.end_capture()
        graph.launch()
        for gradient, value in zip(gradients, expected, strict=True):
            np.testing.assert_array_equal(gradient.get(), value)


def test_kernels_are_launched_in_the_current_stream(cupy):
    bn, x = mbn.BatchNorm1d(256, backend="cupy"), cupy.asarray(_sample(4096, 256))
    expected = bn(x).get()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        late = cupy.full_like(x, np.nan)
        for _ in range(50):  # slow work that y has to wait for
            late += 1
        late[...] = x
        y = bn(late)
        assert np.array_equal(y.get(stream=stream), expected)


def test_call_takes_little_memory_beyond_the_output_and_frees_it(cupy, pool):
    x, bn = cupy.asarray(_sample(65536, 256)), mbn.BatchNorm1d(256, backend="cupy")
    bn(x)
    before = pool.used_bytes()
    y = bn(x)
    assert pool.used_bytes() - before <= 1.01 * y.nbytes
    assert pool.total_bytes() <= before + 1.1 * y.nbytes


def test_world_of_one_gathers_over_nccl_and_trains_as_alone(cupy):
    from mbn_cupy.group import NcclGroup

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = importlib.import_module("cupyx.distributed").init_process_group(1, 0, port=port)
    try:
        vector = cupy.arange(5, dtype=np.float64)
        np.testing.assert_array_equal(NcclGroup(world).gather(vector).get(), vector.get()[None])
        bn, alone = mbn.BatchNorm1d(256, backend="cupy", group=world), mbn.BatchNorm1d(256, backend="cupy")
        x = cupy.asarray(_sample(4096, 256))
        np.testing.assert_array_equal(bn(x).get(), alone(x).get())
        np.testing.assert_array_equal(bn.running_var.get(), alone.running_var.get())
    finally:
        world.stop()


@pytest.mark.parametrize("axes", ["rows", "positions"])
def test_more_values_than_32_bits_can_count_are_normalised(cupy, pool, axes):
    del pool
    n, c = (1 << 20) + 3, 2064  # 2.2e9 values of 2 bytes, and as many for the output
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * n * c:
        pytest.skip("the GPU has too little memory free: 11 GB are needed")
    x = cupy.empty((n, c) if axes == "rows" else (1, c, n), np.float16)
    piece = cupy.asarray(_sample(c) if axes == "rows" else _sample(c, 1)).astype(np.float16)
    x[...] = piece
    half = n // 2
    (x[:half] if axes == "rows" else x[:, :, :half])[...] += 1
    y = mbn.functional.batch_norm(x, training=True, out=x).output
    moments = mbn.get_backend("cupy").moments(y)
    np.testing.assert_allclose(moments.mean.hi.get(), 0, atol=1e-3)
    np.testing.assert_allclose(moments.m2.get() / n, 1, rtol=1e-3)
    last = y[-1] if axes == "rows" else y[0, :, -1]
    np.testing.assert_allclose(last.get(), -1, atol=2e-3)
