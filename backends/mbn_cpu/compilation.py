"""Have Numba compile, and tell whoever listens when a first call takes its time because of that.

What is compiled is cached on disk where it can be, and must not hold the interpreter's lock while it runs. What is read
from the cache is ready at once and not worth a word; the rest is said through the logger ``mbn.numba``, at INFO, and
only of this project's functions.
"""

import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter

import numba
from numba.core import event

logger = logging.getLogger("mbn.numba")
_modules: set[str] = set()
"""Those whose functions are reported on."""


def compiled(function: Callable[..., object], **options: object) -> Callable[..., object]:
    """Return a function as Numba compiles it for the arguments that come."""
    _modules.add(function.__module__)
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder that may be written to: each process compiles for itself
        return numba.njit(function, **options)


loop = partial(compiled, fastmath={"contract"})
"""The same of loops, where a product and a sum may be one operation. What is once per channel has NumPy's bits."""


class _Reporter(event.Listener):
    def __init__(self) -> None:
        self._running: list[float] = []
        """When those that are being compiled began: a function brings those that it calls along."""

    def on_start(self, event: event.Event) -> None:
        if _is_own(event):
            if not self._running:
                logger.info("Numba compiles %s, once for this machine.", _name(event))
            self._running.append(perf_counter())

    def on_end(self, event: event.Event) -> None:
        if _is_own(event):
            seconds = perf_counter() - self._running.pop()
            if not self._running:
                logger.info("Numba compiled %s in %.1f s.", _name(event), seconds)


def _is_own(event: event.Event) -> bool:
    return event.data["dispatcher"].py_func.__module__ in _modules


def _name(event: event.Event) -> str:
    x, *_ = event.data["args"]
    return f"{event.data['dispatcher'].py_func.__name__} for {x.dtype}"


event.register("numba:compile", _Reporter())
