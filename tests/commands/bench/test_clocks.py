"""Clocks of devices, tested with events of a simulated device on which every call takes a known time."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mbn.commands.bench import clocks
from mbn.commands.bench.clocks import EventClock, HostClock, QueueClock
from mbn.commands.bench.messages import Preparation, Turn
from mbn.commands.bench.subjects import Subject, subject
from mbn.commands.bench.worker import Worker
from mbn.commands.bench.workloads import PASSES, PULLBACK, Workload

MEBIBYTE = 2**20


class Device:
    """A simulated device: its time advances by the durations of its calls, and the host never waits."""

    def __init__(self, *durations):
        self.now, self.done, self._durations = 0.0, 0, durations

    def work(self):
        self.now += self._durations[self.done % len(self._durations)]
        self.done += 1


class Events(EventClock):
    def __init__(self, device):
        self._device = device

    def record(self):
        return self._device.now

    def between(self, start, end):
        return end - start

    def beyond_arrays(self, _):
        return None


def test_event_clock_divides_the_time_between_events_by_the_calls():
    device = Device(1e-5)
    assert Events(device).seconds([device.work] * 4) == pytest.approx(1e-5)
    assert device.done * 1e-5 > clocks.TURN + clocks._WARM_UP


def test_event_clock_repeats_a_slow_call_often_enough_for_a_median():
    device = Device(*[0.01] * 9, 1.0)  # a disturbance that a mean would show
    assert Events(device).seconds([device.work]) == pytest.approx(0.01)
    assert device.done >= Events.intervals


def test_event_clock_leaves_out_a_slow_first_call():
    first = Device(10.0, *[1e-3] * 10_000)
    assert Events(first).seconds([first.work]) == pytest.approx(1e-3)


def test_event_clock_cycles_through_all_sets_of_arrays():
    device, calls = Device(1e-4), [[], [], []]

    def call(index):
        calls[index].append(device.done)
        device.work()

    Events(device).seconds([lambda index=index: call(index) for index in range(3)])
    assert len({len(done) for done in calls}) == 1
    assert all(second == first + 1 for first, second in zip(calls[0], calls[1], strict=True))


def test_sets_of_arrays_exceed_the_cache_up_to_a_limit():
    device = Events(Device(1))
    assert [device.sets(nbytes) for nbytes in (2**30, 64 * MEBIBYTE, MEBIBYTE, 8192)] == [1, 4, 32, 32]
    assert HostClock().sets(8192) == 1


def test_queue_clock_waits_once_an_interval(monkeypatch):
    now, waited, called = [0.0], [], []
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call():
        called.append(1)
        now[0] += 1e-4
        return len(called)

    def wait(last):
        waited.append(last)
        now[0] += 1e-4  # far less than the calls that are queued

    assert QueueClock(wait).seconds([call, call]) == pytest.approx(1e-4, rel=0.02)
    assert waited[-1] == len(called)
    assert len(called) > 50 * QueueClock.intervals


def test_passes_of_forward_and_backward_add_up():
    assert PASSES["train"] + PASSES[PULLBACK] == PASSES["backward"]
    assert Workload((4, 3), dtype="float16").nbytes == 24


def test_large_workload_repeats_drawn_values(monkeypatch):
    monkeypatch.setattr("mbn.commands.bench.workloads._DRAWN", 8)
    x = Workload((5, 4)).x()
    assert x.shape == (5, 4)
    np.testing.assert_array_equal(x.ravel()[8:16], x.ravel()[:8])


def test_twin_has_arrays_of_its_own_and_shares_the_layer():
    first = subject("numpy", Workload((8, 3)))
    first.step("backward")()
    twin = first.twin()
    assert twin.layer is first.layer
    assert not np.shares_memory(twin.x, first.x)
    np.testing.assert_array_equal(twin.dy, first.dy)


class Queued(Subject):
    """A subject on a simulated device."""

    version, device = "1.0", "cuda"

    def __init__(self, workload):
        self.workload, self.work = workload, Device(1e-3)
        self.clock = Events(self.work)

    def own(self, host):
        return host

    def call(self, mode):
        return self.work.work


def test_worker_times_by_the_clock_of_its_subject(monkeypatch):
    monkeypatch.setattr("mbn.commands.bench.worker.subject", lambda _, workload: Queued(workload))
    worker = Worker()
    assert worker.answer(Preparation("queued", Workload((64, 8)), ("train",))).memory == {"train": None}
    assert len(worker._subjects) == 32
    assert worker.answer(Turn("train")) == pytest.approx(1e-3)
    refused = worker.answer(Preparation("queued", Workload((64, 8)), ("train",), captured=True))
    assert (refused.broken, "captures no calls" in refused.why) == (False, True)


def test_worker_times_the_captured_calls_of_a_clock(monkeypatch):
    class Capturing(Events):
        captures = True

        def captured(self, call):
            return lambda: [call() for _ in range(2)]

    monkeypatch.setattr("mbn.commands.bench.worker.subject", lambda _, workload: Queued(workload))
    monkeypatch.setattr(Queued, "clock", property(lambda self: Capturing(self.work), lambda *_: None), raising=False)
    worker = Worker()
    worker.answer(Preparation("queued", Workload((64, 8)), ("train",), captured=True))
    assert worker.answer(Turn("train")) == pytest.approx(2e-3)


class Pool:
    """A memory pool that keeps freed memory until ``free_all_blocks``."""

    def __init__(self):
        self.total = self.used = 0
        self.malloc = object()

    def free_all_blocks(self):
        self.total = self.used

    def total_bytes(self):
        return self.total

    def take(self, nbytes):
        self.used += nbytes
        self.total = max(self.total, self.used)


@pytest.fixture
def cupy_clock(monkeypatch):
    """Return the benchmarks' clock for CuPy, over a stand-in for CuPy that logs its calls; the log, device and pool."""
    log, device, pool = [], Device(1e-3), Pool()

    class Event:
        def record(self):
            self.at = device.now

        def synchronize(self):
            log.append("synchronize event")

    class Context:
        def __init__(self, name):
            self._name = name

        def __enter__(self):
            log.append(f"enter {self._name}")
            return self

        def __exit__(self, *_):
            log.append(f"leave {self._name}")

        def synchronize(self):
            log.append(f"synchronize {self._name}")

        def begin_capture(self):
            log.append("begin")

        def end_capture(self):
            log.append("end")
            return SimpleNamespace(launch=lambda: log.append("launch"))

    cupy = ModuleType("cupy")
    cupy.__version__, cupy.ndarray = "14", object
    cupy.get_default_memory_pool = lambda: pool
    cupy.cuda = SimpleNamespace(
        Event=Event,
        Stream=lambda *, non_blocking: Context("stream"),
        MemoryPool=Pool,
        Device=lambda: Context("device"),
        using_allocator=lambda _: Context("pool"),
        get_elapsed_time=lambda start, end: 1e3 * (end.at - start.at),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delitem(sys.modules, "mbn.commands.bench.peers.cupy", raising=False)
    from mbn.commands.bench.peers.cupy import Clock

    yield Clock(SimpleNamespace(device=SimpleNamespace(use=lambda: log.append("use")))), log, device, pool
    monkeypatch.delitem(sys.modules, "mbn.commands.bench.peers.cupy")


def test_cupy_clock_times_by_events(cupy_clock):
    clock, log, device, _ = cupy_clock
    assert clock.seconds([device.work]) == pytest.approx(1e-3)
    assert log[0] == "use"


def test_cupy_clock_captures_a_warm_call_in_its_own_stream_and_pool(cupy_clock):
    clock, log, *_ = cupy_clock
    replay = clock.captured(lambda: log.append("call"))
    replay()
    replay()
    assert log[1:] == [
        *("synchronize device", "enter stream", "enter pool", "call", "call", "call", "synchronize stream"),
        *("begin", "call", "end", "leave pool", "leave stream", "launch", "launch"),
    ]


def test_cupy_clock_counts_growth_of_the_pool_less_outputs(cupy_clock):
    clock, *_, pool = cupy_clock
    pool.take(100)

    def call():
        pool.take(50)
        pool.take(20)
        pool.used -= 20
        return SimpleNamespace(nbytes=50)

    assert clock.beyond_arrays(call) == 20


@pytest.mark.torch
def test_torch_clock_times_by_events(monkeypatch):
    import torch

    from mbn.commands.bench.peers.torch import Clock

    device = Device(1e-3)

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert Clock("cuda").seconds([device.work]) == pytest.approx(1e-3)
