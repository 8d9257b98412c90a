"""Tell whoever listens when a first call takes its time because Numba compiles.

It is said through the logger ``mbn.numba``, at INFO, and only of what this project has Numba compile: what is read from
the cache on disk is ready at once and not worth a word.
"""

import logging
from time import perf_counter

from numba.core import event

logger = logging.getLogger("mbn.numba")


def report(module: str) -> None:
    """Report on the functions of a module from now on."""
    event.register("numba:compile", _Reporter(module))


class _Reporter(event.Listener):
    def __init__(self, module: str) -> None:
        self._module = module
        self._running: list[float] = []
        """When those that are being compiled began: a function brings those that it calls along."""

    def on_start(self, event: event.Event) -> None:
        if self._is_own(event):
            if not self._running:
                logger.info("Numba compiles %s, once for this machine.", _name(event))
            self._running.append(perf_counter())

    def on_end(self, event: event.Event) -> None:
        if self._is_own(event):
            seconds = perf_counter() - self._running.pop()
            if not self._running:
                logger.info("Numba compiled %s in %.1f s.", _name(event), seconds)

    def _is_own(self, event: event.Event) -> bool:
        return event.data["dispatcher"].py_func.__module__ == self._module


def _name(event: event.Event) -> str:
    x, *_ = event.data["args"]
    return f"{event.data['dispatcher'].py_func.__name__} for {x.dtype}"
