"""Compilation by Numba, with a cache on disk and messages of the time that a first call takes.

Compiled functions must not hold the interpreter's lock. The logger ``mbn.numba`` reports each compilation of a function
of this project at INFO, and no load from the cache, which takes no time. If the cache fails, because the disk is full
or a crash has emptied its files, the function is compiled, with one warning, and no call fails.
"""

import inspect
import logging
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numba
from numba import types
from numba.core import ccallback, cgutils, event
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys  # type: ignore[attr-defined]
from numba.extending import intrinsic

logger = logging.getLogger("mbn.numba")
_modules: set[str] = set()
"""The modules whose compilations are reported."""
_warned: list[Exception] = []
"""The error of the cache that the warning was about, if there was one."""


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function that Numba compiles for each combination of argument types."""
    _modules.add(function.__module__)
    made = numba.njit(function, nogil=True, error_model="numpy", **options)
    made.compile = partial(_compile, made.compile)
    try:
        made._cache = _Cache(function)  # noqa: SLF001 - as its enable_caching() does with Numba's own
    except Exception as error:  # noqa: BLE001 - there may be no folder that can be written to
        _warn("", error)
    return made


loop = partial(compiled, fastmath={"contract"})
"""As ``compiled``, for loops over values, in which a product and a sum may be one operation (FMA).

Functions on vectors have no FMA, so that their bits are NumPy's.
"""


def _pointer(_: Any, address: Any) -> Any:
    """Return the type of an address as a pointer, and the function that generates the code for it."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(address), generate


pointer: Any = intrinsic(_pointer)
"""In compiled code ``pointer(address)``, an integer as a pointer for ``numba.carray``."""


class _Cache(FunctionCache):
    """Numba's cache, whose errors end in a warning."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for a signature, or None.

        Numba's own would first import all that a compilation needs, which takes as long as the rest of the first call.
        """
        found: Any = None
        try:
            rtsys.initialize(target_context)  # the memory of arrays that compiled code allocates
            with self._guard_against_spurious_io_errors():
                found = self._load_overload(sig, target_context)
            if found is None or found.signature.args == tuple(sig):
                return found
            error: Exception = ValueError(f"its entry for {sig} is another's")  # two processes wrote at the same time
        except Exception as raised:  # noqa: BLE001 - a damaged file raises anything
            error = raised
        self._fail(error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store the compiled function for a signature, if the cache can be written to."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        _warn(f" in {self.cache_path}", error)


def _warn(where: str, error: Exception) -> None:
    """Log that the cache fails, once in a process and not for each function's file."""
    if not _warned:
        _warned.append(error)
        message = (
            "Numba's cache%s cannot be used (%s: %s), so every process compiles anew. Set NUMBA_CACHE_DIR to a "
            "folder that can be written to, or delete the damaged files."
        )
        logger.warning(message, where, type(error).__name__, error)


def callback(function: Callable[..., Any], *others: Any) -> int:
    """Return the address of a C function of one word that returns a word, compiled for this process or loaded.

    Its cache is renewed by a change of its own file, and of those of ``others``, the modules whose functions it
    contains.
    """
    made: Any = ccallback.CFunc(function, ((types.intp,), types.intp), {}, {"nopython": True, "error_model": "numpy"})
    try:
        made._cache = _CallbackCache(function, others)  # noqa: SLF001 - as above
    except Exception as error:  # noqa: BLE001 - as above
        _warn("", error)
    start = perf_counter()
    made.compile()
    if not made.cache_hits:
        logger.info(
            "Numba compiled %s in %.1f s, once for this machine.", function.__qualname__, perf_counter() - start
        )
    address: int = made.address
    return address


class _CallbackCache(_Cache):
    """The cache of a C function, and of the functions of other modules in it."""

    def __init__(self, function: Callable[..., Any], others: tuple[Any, ...]) -> None:
        super().__init__(function)
        index = self._cache_file
        index._source_stamp = (index._source_stamp, *map(inspect.getsource, others))  # noqa: SLF001 - as above

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        return super().load_overload(sig.args, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        super().save_overload(sig.args, data)


class _Reporter(event.Listener):
    def __init__(self) -> None:
        self.lock, self.is_listening = threading.RLock(), False
        self._running: list[float] = []
        """The start times of running compilations: that of a function includes those of the functions it calls."""

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
    first, *_ = event.data["args"]  # an array, or a number of a function that takes addresses of float32
    return f"{event.data['dispatcher'].py_func.__name__} for {getattr(first, 'dtype', 'float32')}"


_REPORTER = _Reporter()


def _compile(compile_as_numba_does: Callable[..., Any], *signature: Any) -> Any:
    """Compile for a signature, with the reporter listening to Numba's events for that time alone."""
    with _REPORTER.lock:
        if _REPORTER.is_listening:  # in the compilation of the function that calls this one
            return compile_as_numba_does(*signature)
        _REPORTER.is_listening = True
        try:
            with event.install_listener("numba:compile", _REPORTER):
                return compile_as_numba_does(*signature)
        finally:
            _REPORTER.is_listening = False
