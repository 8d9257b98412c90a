"""Arithmetic on host memory: the same bits for every memory order and number of threads, little memory, the pool."""

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import mbn
from mbn.conformance import oracle, strategies, ulp
from mbn.threads import limited
from mbn_cpu import thread_pool

BACKENDS = ["numpy", "numba"]
SHAPES = [
    (300, 5),
    (30, 5, 70),
    (70_001, 3),
    (5000, 300),
    (300, 5, 100),
    (33, 40, 257),
    (40, 80, 70),
    (2, 3, 500_000),
    (100_000, 2, 3),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(5, 3, shape).astype(dtype)


def step(backend, x, dy, **masking):
    """Return the output of a training step, its gradients, the new statistics, and the output in evaluation."""
    bn = mbn.BatchNorm1d(x.shape[1], dtype="float64" if x.dtype == np.float64 else None, backend=backend)
    y, pullback = bn.vjp(x, **masking)
    return y, *pullback(dy), bn.running_mean, bn.running_var, bn.eval()(x)


@pytest.mark.parametrize("name", [*BACKENDS, "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [None, "real weights"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        *(((9000, 3), 1), ((64, 900), 1), ((145, 7, 18), 1), ((145, 7, 18), -1)),
        *(((40, 3, 600), 1), ((40, 3, 600), -1), ((2, 3, 20_000), 1)),
    ],
)
def test_statistics_are_accurate_where_one_value_dwarfs_the_others(name, dtype, kind, shape, axis):
    counts, arguments = np.ones((shape[0], *shape[2:])), {}
    if kind is not None:
        arguments, counts = strategies.maskings(counts.shape)[kind]
    n, *position = np.argwhere(counts)[0]
    x = np.ones(shape)
    x[n, :, *position] = np.resize([3.22e6, 12147.75, 1e10, 188.2, 4.2e8, 1129002.5, 1e6], shape[1])
    x = x.astype(dtype)
    bn = mbn.BatchNorm1d(shape[1], dtype="float64", momentum=1.0, axis=axis, backend=name)
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    exact = oracle.train(x, zeros, ones, momentum=1.0, eps=1e-5, weights=counts)
    bn(np.ascontiguousarray(np.moveaxis(x, 1, axis)), **arguments)
    for statistic, truth in ((bn.running_mean, exact.running_mean), (bn.running_var, exact.running_var)):
        assert ulp.error(np.asarray(statistic), truth, "float64") <= ulp.STATISTICS_BOUNDS["float64"]


def assert_same_bits(given, expected):
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("masked", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(backend, shape, dtype, monkeypatch, *, masked):
    x, dy = draw(shape, dtype), draw(shape, dtype, 1)
    masking = {"mask": np.arange(x.size // shape[1]).reshape(shape[:1] + shape[2:]) % 3 > 0} if masked else {}
    monkeypatch.setattr(thread_pool, "get_num_threads", lambda: 1)
    alone = step(backend, x, dy, **masking)
    monkeypatch.setattr(thread_pool, "get_num_threads", lambda: 5)
    assert_same_bits(step(backend, x, dy, **masking), alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("masked", [False, True])
def test_bits_do_not_depend_on_memory_order(backend, shape, dtype, *, masked):
    x, dy = draw(shape, dtype), draw(shape, dtype, 1)
    masking = {"mask": np.arange(x.size // shape[1]).reshape(shape[:1] + shape[2:]) % 3 > 0} if masked else {}
    expected = step(backend, x, dy, **masking)
    sliced = np.repeat(x, 2, axis=0)[::2]
    last = np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    for other in (sliced, last, np.asfortranarray(x)):
        assert not other.flags.c_contiguous
        assert_same_bits(step(backend, other, dy, **masking), expected)
    assert_same_bits(step(backend, x, np.asfortranarray(dy), **masking), expected)


@pytest.mark.parametrize("shape", [(3000, 2), (300_000, 2), (4000, 70), (30, 3, 1000), (2000, 3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_are_within_bounds_at_every_size(backend, shape, dtype):
    x = draw(shape, dtype)
    x[0] = 1e6  # a bad shift: differences from it lose digits
    bn = mbn.BatchNorm1d(shape[1], momentum=1.0, eps=0.0, dtype=dtype, backend=backend)
    y = bn(x)
    exact = oracle.train(x, np.zeros(shape[1]), np.ones(shape[1]), momentum=1.0, eps=0.0)
    assert ulp.error(y, exact.y, dtype) <= ulp.OUTPUT_BOUNDS[dtype]
    assert ulp.error(bn.running_mean, exact.running_mean, dtype) <= ulp.STATISTICS_BOUNDS[dtype]
    assert ulp.error(bn.running_var, exact.running_var, dtype) <= ulp.STATISTICS_BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(65536, 256), (1_048_576, 16), (1024, 128, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_call_takes_a_few_mebibytes_beside_the_output(backend, shape, *, transposed):
    x = draw(shape)
    x = np.asfortranarray(x) if transposed else x
    bn = mbn.BatchNorm1d(shape[1], backend=backend)
    bn(x[:64])
    for call in (bn, bn.eval()):
        tracemalloc.start()
        y = call(x)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - y.nbytes <= 8 << 20


def test_layer_gives_the_same_output_in_many_threads(backend):
    x = draw((200_000, 7))
    bn = mbn.BatchNorm1d(7, backend=backend).eval()
    expected = bn(x)
    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(bn, [x] * 24):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_process_has_a_pool_of_its_own(backend):
    program = f"""
import os, threading
import numpy as np
import mbn
from mbn_cpu import thread_pool

thread_pool.get_num_threads = lambda: 3
x = np.random.default_rng(0).standard_normal((500_000, 7), dtype=np.float32)
bn = mbn.BatchNorm1d(7, backend={backend!r}).eval()
expected = bn(x).tobytes()
assert threading.active_count() > 1
child = os.fork()
if not child:
    os._exit(0 if bn(x).tobytes() == expected and threading.active_count() > 1 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


_LATE = """
import atexit, functools, os, sys, threading
import numpy as np
import mbn, mbn.threads

backend, when, before = sys.argv[1:]
mbn.threads.num_processors = functools.partial(int, 4)  # a function of this module would keep the module alive
x = np.random.default_rng(0).standard_normal((1 << 19, 4), dtype=np.float32)
if backend == "torch":
    import torch
    torch.set_num_threads(4)
    x = torch.from_numpy(x)

layers = []

def step(x):
    layers[:] = layers or [mbn.BatchNorm1d(4, momentum=1, backend=backend)]
    bn = layers[0].train()
    y, pullback = bn.vjp(x)
    pullback(y)
    bn.eval()(x)
    return bn.running_mean.tolist()

class Late:
    def __call__(self, write=os.write):
        if all(abs(a - b) < 1e-6 for a, b in zip(step(x), expected)):
            write(1, b"done")

    def __del__(self):
        if when == "__del__":
            self()

late, expected = Late(), x.mean(0).tolist()
if before != "nothing":
    step(x if before == "large call" else x[:64])
if when == "atexit":
    atexit.register(late)
elif when == "thread":
    threading.Thread(target=lambda: (threading.main_thread().join(), late())).start()
"""


@pytest.mark.parametrize(
    ("backend", "when", "before"),
    [
        *(("numpy", "atexit", before) for before in ("nothing", "small call", "large call")),
        *(("numpy", "thread", before) for before in ("nothing", "large call")),
        *((backend, "atexit", "large call") for backend in ("numba", "torch")),
        *((backend, "__del__", "large call") for backend in ("numpy", "numba", "torch")),
    ],
)
def test_large_call_works_while_the_interpreter_shuts_down(backend, when, before):
    arguments = [sys.executable, "-c", _LATE, backend, when, before]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    assert (run.stdout, run.stderr) == ("done", "")


def test_small_calls_start_no_thread():
    program = (
        "import mbn, numpy as np, threading\n"
        "bn = mbn.BatchNorm1d(64, backend='numpy')\n"
        "_, pullback = bn.vjp(np.ones((1024, 64), 'float32'))\n"
        "pullback(np.ones((1024, 64), 'float32'))\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class TestThreads:
    @pytest.fixture(autouse=True)
    def many(self, monkeypatch):
        monkeypatch.setattr(mbn.threads, "_num_threads", 4)
        monkeypatch.setattr(thread_pool, "num_processors", lambda: 4)
        monkeypatch.setattr(thread_pool, "_pool", None)
        yield
        if thread_pool._pool is not None:
            thread_pool._pool.shutdown()

    def test_every_task_is_executed_once(self):
        done = []
        thread_pool.run_tasks(done.append, 1000)
        assert sorted(done) == list(range(1000))

    @pytest.mark.parametrize(
        ("backward", "own", "others"), [(False, [0, 1, 2], [5, 4, 3]), (True, [2, 1, 0], [3, 4, 5])]
    )
    def test_each_thread_has_the_same_tasks_in_every_call(self, backward, own, others):
        barrier, done = threading.Barrier(2, timeout=30), {True: [], False: []}

        def task(i):
            barrier.wait()
            done[threading.current_thread() is threading.main_thread()].append(i)

        with limited(2):
            thread_pool.run_tasks(task, 6, backward=backward)
        assert done == {True: own, False: others}

    def test_one_thread_can_go_backward(self):
        done = []
        with limited(1):
            thread_pool.run_tasks(done.append, 4, backward=True)
        assert done == [3, 2, 1, 0]

    def test_caller_executes_all_tasks_if_no_thread_starts(self, monkeypatch):
        def start(thread):
            raise RuntimeError(f"can't start new thread {thread.name}")

        monkeypatch.setattr(threading.Thread, "start", start)
        names = []
        for _ in range(2):
            thread_pool.run_tasks(lambda _: names.append(threading.current_thread().name), 50)
        assert names == [threading.current_thread().name] * 100

    def test_caller_waits_for_a_thread_that_starts_despite_an_error(self, monkeypatch):
        begun, done = threading.Event(), []

        class Pool(ThreadPoolExecutor):
            def submit(self, *call):
                super().submit(*call)
                raise RuntimeError("can't start new thread")

        def task(i):
            if threading.current_thread() is threading.main_thread():
                begun.wait(30)
            else:
                begun.set()
                time.sleep(0.2)
            done.append(i)

        with Pool(1) as pool:
            monkeypatch.setattr(thread_pool, "_executor", lambda: pool)
            thread_pool.run_tasks(task, 8)
            assert sorted(done) == list(range(8))

    def test_several_threads_share_the_tasks(self):
        barrier = threading.Barrier(4, timeout=30)
        thread_pool.run_tasks(lambda _: barrier.wait(), 4)

    def test_limited_caps_the_number_of_threads(self):
        names = set()
        with limited(1):
            thread_pool.run_tasks(lambda _: names.add(threading.current_thread().name), 100)
        assert names == {threading.current_thread().name}

    def test_tasks_see_the_context_of_the_caller(self):
        seen = []
        with np.errstate(over="raise"):
            thread_pool.run_tasks(lambda _: seen.append(np.geterr()["over"]), 50)
        assert set(seen) == {"raise"}

    @pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt])
    def test_error_of_a_task_is_raised_and_stops_the_others(self, error):
        done = []

        def task(i):
            if i == 10:
                raise error
            done.append(i)

        with pytest.raises(error):
            thread_pool.run_tasks(task, 100_000)
        after = len(done)
        assert after < 100_000
        thread_pool.run_tasks(lambda _: None, 100)
        assert len(done) == after
