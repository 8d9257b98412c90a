"""Two simulated GPUs; each thread has one as its current device, and a call returns when its work is done."""

import threading
from types import SimpleNamespace

_COUNT = 2
_current = threading.local()


class Device:
    """A simulated GPU; ``with`` makes it the current device."""

    __hash__ = None

    def __init__(self, device=None):
        self.id = current_id() if device is None else int(device)
        self._previous = []

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return self.id == other.id if isinstance(other, Device) else NotImplemented

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def __enter__(self):
        self._previous.append(current_id())
        _current.id = self.id
        return self

    def __exit__(self, *error):
        _current.id = self._previous.pop()


def current_id():
    return getattr(_current, "id", 0)


class Event:
    """A mark in a thread's queue, behind the communication that is there when it is recorded."""

    def __init__(self, *, disable_timing=False):
        self._works = []

    def record(self):
        self._works = list(queue())

    @property
    def done(self):
        return all(work() for work in self._works)


def queue():
    """Return the communication of this thread: functions that do what they can and tell whether they are done."""
    if not hasattr(_current, "queue"):
        _current.queue = []
    return _current.queue


cuda = SimpleNamespace(Device=Device, Event=Event, runtime=SimpleNamespace(getDeviceCount=lambda: _COUNT))
