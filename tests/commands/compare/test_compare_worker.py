"""The time of a call in a comparison: that of the call and its work, without that of the wait for its output."""

from types import SimpleNamespace

import numpy as np
import pytest

from mbn.commands.compare import worker


class Framework:
    """A backend and a layer with a simulated clock, on which a call, its work and a wait take these seconds."""

    def __init__(self, call, work, wait):
        self.now, self.queued = 0.0, 0.0
        self.call, self.work, self.wait = call, work, wait

    def perf_counter(self):
        return self.now

    def layer(self, x):
        self.now += self.call
        self.queued = self.work
        return x

    def to_numpy(self, y):
        assert y.size == 1
        self.now += self.queued + self.wait
        self.queued = 0.0
        return y


@pytest.mark.parametrize(
    ("call", "work", "wait", "expected"),
    [
        (1e-3, 0.0, 2e-3, 1e-3),  # a framework that returns when its work is done
        (1e-4, 4e-3, 2e-3, 41e-4),  # a framework that queues its work
        (1e-3, 0.0, 0.0, 1e-3),
    ],
)
def test_time_of_a_call_excludes_the_wait(monkeypatch, call, work, wait, expected):
    framework = Framework(call, work, wait)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=framework.perf_counter))
    for shape in ((4, 3), (4, 3, 1)):
        x = np.ones(shape, np.float32)
        assert worker._seconds_per_call(framework, framework.layer, x) == pytest.approx(expected)


def test_time_of_a_call_is_never_negative(monkeypatch):
    framework = Framework(0.0, 0.0, 2e-3)
    layer = framework.layer
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=framework.perf_counter))

    def hidden(x):
        framework.now -= 1e-3
        return layer(x)

    assert worker._seconds_per_call(framework, hidden, np.ones((4, 3), np.float32)) == 0
