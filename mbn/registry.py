"""The registry: it finds backends by their names and by arrays.

The registry imports a framework only for a backend that is requested by name; the framework of an array is imported
already. A backend that is missing or broken must never hide another one, and a backend whose import hangs must not
block others: each is imported under Python's own locks and constructed under a lock of its own.
The choice of a backend is one immutable value in a ContextVar: threads and asyncio tasks do not see each other's.
"""

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mbn.contract import Backend, Kernels
from mbn.threads import check_environment

ENTRY_POINTS = "mbn.backends"
ENVIRONMENT_VARIABLE = "MBN_BACKEND"

Target: TypeAlias = str | Backend | Callable[[], Backend]
"""The source of a backend: ``"module:attribute"``, a Backend, or a callable that returns one (its class)."""


class BackendNotFoundError(ValueError):
    """No backend has this name."""


class BackendUnavailableError(ImportError):
    """The backend is known, but not installed, not usable on this machine, or broken; the cause is chained."""


class Known(NamedTuple):
    """The description of a backend that has not been imported."""

    target: Target
    source: str
    framework: str | None = None
    install: str | None = None


_BUILT_IN = {
    "numpy": Known("mbn_numpy.backend:NumpyBackend", "built in", "numpy", "pip install numpy"),
    "torch": Known("mbn_torch.backend:TorchBackend", "built in", "torch", "pip install 'torch>=2.8'"),
    "jax": Known("mbn_jax.backend:JaxBackend", "built in", "jax", "pip install 'jax>=0.7'"),
    "cupy": Known(
        "mbn_cupy.backend:CupyBackend",
        "built in",
        "cupy",
        "pip install cupy-cuda13x (or cupy-cuda12x, to match the CUDA driver)",
    ),
    "mlx": Known(
        "mbn_mlx.backend:MlxBackend", "built in", "mlx", "pip install 'mlx>=0.32.2' (on Linux 'mlx[cpu]>=0.32.2')"
    ),
    "numba": Known("mbn_numba.backend:NumbaBackend", "built in", "numba", "pip install 'numba>=0.61'"),
}
_HOST = "numpy"
"""The backend of data without a framework: lists and numbers."""
_STANDARD = "array_api."
"""The prefix of the names of backends for libraries that have none of their own; the library's module follows it."""
_CLAIMED = frozenset({*(known.framework for known in _BUILT_IN.values()), "jaxlib"})
"""Packages of built-in backends: an array of theirs that its backend refuses does not go to the array API backend."""
_registered: dict[str, Known] = {}
_loaded: dict[str, Backend] = {}
_owners: dict[type, Backend] = {}
_locks: dict[str, threading.RLock] = {}
"""By the name of a backend: the lock under which it is constructed, so that this happens once."""
LAZY: set[type] = set()
"""The types of lazy arrays that :func:`owner_of` has met: a faster test than :func:`is_lazy`, for every call."""
PYTHON_DATA = (list, tuple, int, float, complex)
"""The types of data without a framework and a dtype."""
_context: ContextVar[Backend | None] = ContextVar("mbn.use_backend", default=None)
_open_contexts: list[Backend] = []
"""The backends that :func:`use_backend` has chosen in any thread: torch.compile can read a list, but no ContextVar."""
_NOT_LOADED = (
    "backend {0!r} is loaded at its first use, which torch.compile cannot follow: call mbn.get_backend({0!r}) once "
    "before."
)
_UNSEEN_CONTEXT = (
    "torch.compile does not see the choice of mbn.use_backend: give backend= in the compiled function, or choose by "
    "mbn.set_default_backend."
)
_default: Backend | None = None


def register_backend(name: str, target: Target) -> None:
    """Make a backend known under ``name`` for this process.

    Args:
        name: the name that ``backend=`` will take; letters, digits, ``_`` and ``-``.
        target: an import string ``"module:attribute"``, which is imported when the backend is first requested; a
            :class:`mbn.contract.Backend`; or its class. Registering a name again replaces the earlier target.

    Raises:
        ValueError: ``name`` has other characters, or belongs to a built-in backend.
        TypeError: ``target`` is none of these.
    """
    if not _is_name(name):
        raise ValueError(f"a backend's name is made of letters, digits, '_' and '-', not {name!r}.")
    if name in _BUILT_IN:
        raise ValueError(f"{name!r} is built in and can't be replaced; register the backend under a name of its own.")
    if not (isinstance(target, Backend) or callable(target) or (isinstance(target, str) and ":" in target)):
        raise TypeError(f"a backend is registered by 'module:attribute', a Backend or its class, not {target!r}.")
    _registered[name] = Known(target, "register_backend")
    _forget(name)
    for kind in [kind for kind, owner in _owners.items() if owner.name.startswith(_STANDARD)]:
        del _owners[kind]  # the new backend may own these arrays


def list_backends() -> list[str]:
    """Return the names of all known backends, usable or not: built in, registered, and from entry points.

    Nothing is imported; ``get_backend(name)`` raises for a backend that does not work here.
    """
    return list(known_backends())


def known_backends() -> dict[str, Known]:
    """Return all known backends by name: built in, then registered, then entry points; an earlier one prevails."""
    known = dict(_BUILT_IN)
    for name, other in chain(_registered.items(), _entry_points().items()):
        known.setdefault(name, other)
    return known


def get_backend(backend: str | Backend | None = None) -> Backend:
    """Return a backend, ready for use.

    Args:
        backend: a name; a Backend, returned as it is; or None for the one chosen by :func:`use_backend`,
            :func:`set_default_backend` or ``MBN_BACKEND``, and NumPy's where none is chosen.

    Raises:
        BackendNotFoundError: no backend of this name is known.
        BackendUnavailableError: the backend is known, but not installed, not usable here, or broken.
        TypeError: ``backend`` is neither a name, a Backend nor None.
        ValueError: the environment variable ``MBN_NUM_THREADS`` is no number of threads.
    """
    if backend is None:
        return chosen_backend() or get_backend(_HOST)
    if isinstance(backend, Backend):
        return backend
    if not isinstance(backend, str):
        raise TypeError(f"backend is a name or a mbn.contract.Backend, not {type(backend).__name__}.")
    return _loaded.get(backend) or _load(backend)


def chosen_backend() -> Backend | None:
    """Return the backend chosen by context, default or environment, in this order; None where none is chosen."""
    chosen = _chosen_in_context() or _default
    if chosen is not None:
        return chosen
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return None
    try:
        return get_backend(name)
    except BackendNotFoundError as error:
        raise BackendNotFoundError(f"the environment variable {ENVIRONMENT_VARIABLE} is {name!r}: {error}") from error


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[Backend]:
    """Choose the backend for layers and functions within a ``with`` block, in this thread or task alone.

    Layers made within the block stay bound to it after the block.

    Raises:
        BackendNotFoundError, BackendUnavailableError: as :func:`get_backend`; the choice is then unchanged.
    """
    if backend is None:
        raise TypeError("use_backend needs a backend's name or a mbn.contract.Backend, not None.")
    chosen = get_backend(backend)
    token = _context.set(chosen)
    _open_contexts.append(chosen)
    try:
        yield chosen
    finally:
        _open_contexts.remove(chosen)
        _context.reset(token)


def set_default_backend(backend: str | Backend | None) -> None:
    """Choose the backend of the process, for code outside of :func:`use_backend`; None undoes the choice.

    Raises:
        BackendNotFoundError, BackendUnavailableError: as :func:`get_backend`; the choice is then unchanged.
    """
    global _default
    _default = None if backend is None else get_backend(backend)


def owner_of(x: object) -> Backend:
    """Return the backend of an array; that of lists and scalars, which have no framework, is NumPy's.

    The result is kept for each class of array, so this is one dictionary look-up from the second call on.

    Raises:
        TypeError: no working backend takes such arrays. If a backend does not work, its error is the cause.
    """
    return _owners.get(type(x)) or _find_owner(x)


def _chosen_in_context() -> Backend | None:
    if not is_compiling():
        return _context.get()
    if _open_contexts:
        raise RuntimeError(_UNSEEN_CONTEXT)
    return None


def is_compiling() -> bool:
    """Tell whether torch.compile or torch.export is tracing this code: neither can follow it into an import."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def backend_of_package(module: str) -> Backend | None:
    """Return the built-in backend whose framework a module belongs to, ``cupyx`` to CuPy; None without one."""
    package = module.partition(".")[0]
    framework = "cupy" if package == "cupyx" else package
    name = next((name for name, known in _BUILT_IN.items() if known.framework == framework), None)
    return None if name is None else get_backend(name)


def check_uncompiled(operation: str) -> None:
    """Refuse an operation by way of NumPy, which a compiler cannot follow.

    Raises:
        RuntimeError: torch.compile or torch.export is tracing this code.
    """
    if is_compiling():
        raise RuntimeError(f"torch.compile cannot follow {operation}: do it before or after the compiled function.")


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile does not trace, nor the functions that it calls."""
    dynamo = sys.modules.get("torch._dynamo")  # its import takes a second; before that, nothing is compiled
    return function if dynamo is None else dynamo.disable(function)


def is_lazy(x: object) -> bool:
    """Tell whether ``x`` is an array of Dask: its owner is that of its blocks."""
    dask = sys.modules.get("dask.array")
    if dask is None or not isinstance(x, getattr(dask, "Array", ())):  # another thread may be importing it
        return False
    LAZY.add(type(x))
    return True


def is_host_data(x: object) -> bool:
    """Tell whether ``x`` is a NumPy array, a list or a scalar; layers of every backend take them."""
    return owner_of(x) is get_backend(_HOST)


def _find_owner(x: Any) -> Backend:
    if is_lazy(x):
        return owner_of(x._meta)  # noqa: SLF001 - an empty block
    return _find_owner_in_memory(x)


def _find_owner_in_memory(x: object) -> Backend:
    if is_compiling() and isinstance(x, sys.modules["torch"].Tensor):
        _preload("torch")
        return _loaded["torch"]
    if isinstance(x, PYTHON_DATA):
        return get_backend(_HOST)
    if x is None or isinstance(x, str | bytes):
        raise TypeError(f"{'None' if x is None else f'a {type(x).__name__}'} is no array: give an array of numbers.")
    kind = type(x)
    broken: BackendUnavailableError | None = None
    may_be_refused = False
    # Entry points come last, since finding and importing them takes long: for arrays that no other backend takes.
    for name in chain.from_iterable(names() for names in (_candidates, _entry_points)):
        try:
            backend = get_backend(name)
        except BackendUnavailableError as error:  # it must not hide the backends after it
            broken = broken or error
            may_be_refused |= name not in _BUILT_IN  # the arrays of a built-in backend are known by their package
            continue
        try:
            owned = backend.owns(x)
        except Exception as error:
            if name in _BUILT_IN:  # the backend refuses a placeholder of its framework, and gives the reason
                raise
            # A broken plug-in must not hide the backends after it.
            broken = broken or BackendUnavailableError(f"backend {name!r} is broken: {type(error).__name__}: {error}")
            broken.__cause__ = broken.__cause__ or error
            may_be_refused = True
            continue
        if owned:
            _owners[kind] = backend
            return backend
    library = None if may_be_refused else _standard_library(x)
    if library is None:
        raise TypeError(_unknown(x, broken if may_be_refused else None)) from broken
    _owners[kind] = get_backend(f"{_STANDARD}{library}")
    return _owners[kind]


def _unknown(x: object, broken: BackendUnavailableError | None) -> str:
    kind = type(x)
    message = (
        f"no backend knows arrays of type {kind.__module__}.{kind.__qualname__}: {_way_in(x)}. Known backends: "
        f"{', '.join(list_backends())}; mbn.register_backend adds one."
    )
    return message if broken is None else f"{message} A backend for them may be one that does not work: {broken}"


def _standard_library(x: object) -> str | None:
    """Return the module of x's library, if it follows the array API standard and is of no built-in backend."""
    if any(_package(kind.__module__) in _CLAIMED for kind in type(x).__mro__) or not hasattr(x, "__dlpack__"):
        return None
    try:
        namespace = x.__array_namespace__()  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - an array of the standard raises nothing here
        return None
    name = getattr(namespace, "__name__", None)
    if not isinstance(name, str) or _package(name) in _CLAIMED or not hasattr(namespace, "__array_namespace_info__"):
        return None
    return name


def _package(module: str) -> str:
    return module.partition(".")[0]


def _of_standard(module: str, name: str) -> Backend:
    from mbn.array_api import ArrayAPIBackend

    namespace = importlib.import_module(module)
    if not hasattr(namespace, "__array_namespace_info__"):
        raise TypeError(
            f"{module} does not follow the array API standard of 2023 or later: it has no __array_namespace_info__."
        )
    return ArrayAPIBackend(namespace, name)


def _preload(name: str) -> bool:
    if name not in _loaded:
        _load(name, may_import=True)
    return True


# torch.compile cannot follow an import: by this mark it calls the function instead of tracing it. The function that
# sets the mark, torch.compiler.assume_constant_result, would take an import of torch.
_preload._dynamo_marked_constant = True  # type: ignore[attr-defined] # noqa: SLF001


def _way_in(x: object) -> str:
    """Return the advice for an object that is no array of any backend: a conversion to one."""
    if isinstance(x, np.ma.MaskedArray):
        return (
            "give its data, x.filled(0), and its mask by mask=. NumPy's mask has the opposite sense, True where there "
            "is no value, and x's shape; mask= is True where there is a value, and is (N,) or (N, L)"
        )
    if isinstance(x, Mapping):
        return "give one of its values, x[key]"
    for method in ("to_numpy", "to_dense", "toarray", "todense"):  # of data frames, and of sparse arrays
        if hasattr(x, method):
            return f"give x.{method}()"
    if hasattr(x, "shape") and hasattr(x, "chunks"):  # of zarr and h5py
        return "an array in a file goes to bn.fit(x) as it is, and by parts to all else, x[:1000]"
    return "convert it, for example by np.asarray(x)"


def _candidates() -> list[str]:
    """Return the backends whose framework is imported, as that of an array is, and the registered ones."""
    built_in = [name for name, known in _BUILT_IN.items() if known.framework in sys.modules]
    return built_in + list(_registered)


def _load(name: str, *, may_import: bool = False) -> Backend:
    known = _BUILT_IN.get(name) or _registered.get(name) or _entry_points().get(name)
    if known is None and name.startswith(_STANDARD):
        module = name.removeprefix(_STANDARD)
        known = Known(partial(_of_standard, module, name), "the array API standard", module.partition(".")[0])
    if known is None:
        raise BackendNotFoundError(_not_found(name))
    if not may_import and is_compiling():
        raise RuntimeError(_NOT_LOADED.format(name))
    check_environment()  # now, and not in the first call that is large enough for more than one thread
    make = _usable(name, known, lambda: _import(known.target) if isinstance(known.target, str) else known.target)
    with _locks.setdefault(name, threading.RLock()):
        if name in _loaded:
            return _loaded[name]
        backend: Backend = uncompiled(_construct)(name, known, make)
        if _registered.get(name, known) is known:  # unless another has been registered in the meantime
            _loaded[name] = backend
        return backend


def _construct(name: str, known: Known, target: Any) -> Backend:
    backend = target if isinstance(target, Backend) else _usable(name, known, target)
    if not isinstance(backend, Backend):
        raise BackendUnavailableError(
            f"backend {name!r} ({known.source}) is broken: {known.target!r} gives a {type(backend).__name__}, which is "
            "not a mbn.contract.Backend."
        )
    if not isinstance(getattr(backend, "kernels", None), Kernels):
        raise BackendUnavailableError(
            f"backend {name!r} ({known.source}) is broken: its attribute kernels is to be an instance of a subclass of "
            "mbn.contract.Kernels."
        )
    if backend.name != name:  # layers show and pickle the backend's own name
        raise BackendUnavailableError(f"backend {name!r} ({known.source}) is broken: it calls itself {backend.name!r}.")
    return backend


def _usable(name: str, known: Known, step: Callable[[], Any]) -> Any:
    """Return the result of importing or constructing a backend.

    Raises:
        BackendUnavailableError: ``step`` raised anything, even SystemExit, but not KeyboardInterrupt.
    """
    try:
        return step()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in or a framework may raise anything; the message names it
        raise BackendUnavailableError(_unavailable(name, known, error)) from error


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


Backend.named = staticmethod(get_backend)


def _forget_locks() -> None:
    """Drop the locks in a forked child: it has none of the threads that might hold and release them."""
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _forget(name: str) -> None:
    backend = _loaded.pop(name, None)
    for kind in [kind for kind, owner in _owners.items() if owner is backend]:
        del _owners[kind]


def _entry_points() -> dict[str, Known]:
    return {name: known for name, known in _all_entry_points().items() if _is_name(name)}


def misnamed_entry_points() -> dict[str, Known]:
    """Return the ignored entry points: no backend can have their names."""
    return {name: known for name, known in _all_entry_points().items() if not _is_name(name)}


def _all_entry_points() -> dict[str, Known]:
    from importlib import metadata

    return {
        point.name: Known(point.value, f"entry point of {point.dist.name if point.dist else 'an unknown distribution'}")
        for point in metadata.entry_points(group=ENTRY_POINTS)
    }


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.replace("-", "_").isidentifier()


def _not_found(name: str) -> str:
    from difflib import get_close_matches

    names = list_backends()
    close = get_close_matches(name.strip().lower(), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no backend {name!r}.{hint} Known backends: {', '.join(names)}."


def _unavailable(name: str, known: Known, error: BaseException) -> str:
    cause = f"{type(error).__name__}: {error}"
    way_out = f" To install it: {known.install}." if known.install else ""
    if isinstance(error, ModuleNotFoundError) and known.framework and error.name == known.framework:
        return f"backend {name!r} is known but {known.framework} is not installed.{way_out}"
    if known.framework:
        return f"backend {name!r}: {known.framework} is installed but cannot be used here: {cause}.{way_out}"
    return f"backend {name!r} ({known.source}) is broken: {cause}"
