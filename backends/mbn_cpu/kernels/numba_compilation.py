"""Have Numba compile, and tell whoever listens when a first call takes its time because of that.

What is compiled is cached on disk where it can be, and must not hold the interpreter's lock while it runs. What is read
from the cache is ready at once and not worth a word; the rest is said through the logger ``mbn.numba``, at INFO, and
only of this project's functions. A cache that fails, whose disk is full or whose files a crash has emptied, costs the
time of a compilation and a warning, and no call.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numba
from numba.core import event
from numba.core.caching import FunctionCache

logger = logging.getLogger("mbn.numba")
_modules: set[str] = set()
"""Those whose functions are reported on."""
_warned: list[Exception] = []
"""The error of the cache that the warning has named, if there was one."""


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function as Numba compiles it for the arguments that come."""
    _modules.add(function.__module__)
    made = numba.njit(function, nogil=True, error_model="numpy", **options)
    made.compile = partial(_compile, made.compile)
    try:
        made._cache = _Cache(function)  # noqa: SLF001 - as its enable_caching() does with Numba's own
    except Exception as error:  # noqa: BLE001 - there may be no folder that can be written to
        _warn("", error)
    return made


loop = partial(compiled, fastmath={"contract"})
"""The same of loops, where a product and a sum may be one operation. What is once per channel has NumPy's bits."""


class _Cache(FunctionCache):
    """Numba's cache, without which compilation goes on."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what has been compiled for a signature, or None."""
        try:
            found = super().load_overload(sig, target_context)
            if found is None or found.signature.args == tuple(sig):
                return found
            error: Exception = ValueError(f"its entry for {sig} is another's")  # two processes wrote at the same time
        except Exception as raised:  # noqa: BLE001 - a damaged file raises anything
            error = raised
        self._fail(error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what has been compiled for a signature, if that can be done."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        _warn(f" in {self.cache_path}", error)


def _warn(place: str, error: Exception) -> None:
    """Say that the cache fails, once in a process: where it does, each function has a file of its own."""
    if not _warned:
        _warned.append(error)
        message = (
            "Numba's cache%s cannot be used (%s: %s), so every process compiles anew. Have NUMBA_CACHE_DIR name a "
            "folder that can be written to, or delete what is damaged."
        )
        logger.warning(message, place, type(error).__name__, error)


class _Reporter(event.Listener):
    def __init__(self) -> None:
        self.lock, self.is_listening = threading.RLock(), False
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


_REPORTER = _Reporter()


def _compile(compile_as_numba_does: Callable[..., Any], *signature: Any) -> Any:
    """Compile for a signature; the reporter listens to Numba meanwhile, and at no other time."""
    with _REPORTER.lock:
        if _REPORTER.is_listening:  # to the function that calls this one
            return compile_as_numba_does(*signature)
        _REPORTER.is_listening = True
        try:
            with event.install_listener("numba:compile", _REPORTER):
                return compile_as_numba_does(*signature)
        finally:
            _REPORTER.is_listening = False
