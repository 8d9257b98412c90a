"""The conversion of arrays between frameworks.

Conversion is explicit, except that every backend takes host data (NumPy arrays, lists, scalars). An array on a device
is handed over there; it goes by way of the host only where the two frameworks cannot exchange it. A layer keeps copies
of its own, so that it shares no memory with the caller's arrays.
"""

from contextlib import suppress
from typing import Any

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, Backend, Params, State, dtype_name, layer_dtype

_HOST_MEMORY = frozenset({1, 3, 11})
"""DLPack's codes of memory that the host can address: kDLCPU, kDLCUDAHost and kDLROCMHost."""
_LARGEST = float(np.finfo(np.float64).max)


def asarray(x: Any, dtype: Any = None, *, backend: str | Backend | None = None, device: Any = None) -> Array:
    """Convert an array of any known framework to an array of a backend.

    Args:
        x: an array of any known framework, nested lists or a scalar. An array of Dask is computed.
        dtype: the new dtype, of any framework or by name; by default that of ``x``.
        backend: the new backend; by default the chosen one, or that of ``x`` where none is chosen.
        device: the new device; by default that of ``x`` where the framework can reach it (its own arrays, and those on
            a GPU that both frameworks use), else the framework's default.

    Returns:
        An array of the backend. It may share memory with ``x``, on a GPU even if one of the two is JAX's: writing to
        one of them then changes both.

    Raises:
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        TypeError: ``x`` is an array of no known backend, or the backend has no such dtype.
        ValueError: the backend has no such device.
    """
    checks.device_index(device)
    x, owner = _computed(x), registry.owner_of(x)
    target = registry.get_backend(backend) if backend is not None else registry.chosen_backend() or owner
    host_or_own = x if target is owner else native(x) if registry.is_host_data(x) else _handed_over(x, owner, target)
    return target.asarray(host_or_own, None if dtype is None else dtype_name(dtype), device)


def _handed_over(x: Any, owner: Backend, target: Backend) -> Array | np.ndarray:
    """Return another framework's array as one of ``target`` on the device of ``x``, or else as NumPy's.

    An array in host memory becomes NumPy's, which each framework shares or copies as its rules demand: memory of JAX
    must not be written to, for example. On a device a copy by way of the host would take too long.
    """
    for prepared in (owner.constant, owner.copy):
        with suppress(Exception):  # the exchange may fail in any way; the one by way of the host always works
            if x.__dlpack_device__()[0] in _HOST_MEMORY:
                break
            with owner.exported(prepared(x)) as exported:
                return target.from_dlpack(exported)
    return owner.to_numpy(x)


def _computed(x: Any) -> Array:
    return x.compute() if registry.is_lazy(x) else x


def to_numpy(x: Any) -> np.ndarray:
    """Return an array of any known framework, nested lists or a scalar as a NumPy array, perhaps in the same memory.

    Raises:
        TypeError: ``x`` is an array of no known backend.
    """
    return registry.owner_of(x).to_numpy(_computed(x))


def received(backend: Backend, name: str, x: Any, dtype: str, device: Any) -> Array:
    """Return an input as an array of ``backend``: its own as it is, host data converted, anything else refused.

    Messages call the input ``name``. Lists and scalars have no dtype of their own, so numbers in them take ``dtype``,
    the layer's.
    """
    if isinstance(x, registry.PYTHON_DATA):
        x = from_python(name, x)
        if x.dtype.kind in "fiu":
            with np.errstate(over="ignore"):  # beyond float32 it is inf, as in an array
                x = x.astype(dtype)
    if is_own(backend, name, x, device) or type(x) in registry.LAZY:  # of a lazy array, each block is converted
        return x
    if dtype_name(x.dtype) not in backend.capabilities.dtypes:
        return x  # unconverted: the checks refuse its dtype, with the same message for every backend
    return backend.asarray(native(x), device=device)


def native(x: Any) -> Any:
    """Return host data in this machine's byte order, the only one that most frameworks support."""
    return x.astype(x.dtype.newbyteorder("=")) if isinstance(x, np.ndarray) and not x.dtype.isnative else x


def from_python(name: str, values: Any, integers: str = "") -> np.ndarray:
    """Return lists and scalars as an array, and an array as it is.

    ``integers``, if given, is the allowed range in words for a message: then an integer beyond int64 is refused.

    Raises:
        ValueError: the lists make no array, or hold an integer beyond all floats; or beyond int64, given ``integers``.
    """
    try:
        array = np.asarray(values)
        if array is values or array.dtype.kind not in ("Of" if integers else "O"):
            return array
        given = np.asarray(values, object)  # NumPy makes floats or objects of integers beyond int64
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} is a {type(values).__name__} that NumPy makes no array of, as of lists of different lengths "
            f"({error}). Pad the shorter ones, and give lengths= or mask=."
        ) from error
    numbers = given.ravel().tolist()
    if integers and all(type(number) is int for number in numbers):
        beyond = [checks.short(number) for number in numbers if not -(2**63) <= number < 2**63]
        if beyond:
            raise ValueError(f"{name} has a value of {beyond[0]}, beyond int64; it has to be {integers}.")
    if array.dtype.kind == "O" and all(isinstance(number, int | float) for number in numbers):
        try:
            return array.astype(np.float64)
        except OverflowError as error:
            beyond = [checks.short(number) for number in numbers if abs(number) > _LARGEST]
            raise ValueError(
                f"{name} has a value of {beyond[0]}, beyond all floats, which end at {_LARGEST:.3g}."
            ) from error
    return array


def received_vectors(
    backend: Backend, params: Params, state: State, num_features: int, dtype: str, device: Any
) -> tuple[Params, State]:
    """Return parameters and statistics from outside as checked arrays of ``backend``."""

    def receive(name: str, value: Any) -> Array | None:
        if value is None:
            return None
        vector = received(backend, name, value, dtype, device)
        checks.vector(name, vector, num_features, dtype)
        return vector

    count = state.num_batches_tracked
    if count is not None:
        checks.count(count)
        count = backend.asarray(count, "int64", device) if registry.is_host_data(count) else count
    return (
        Params(receive("weight", params.weight), receive("bias", params.bias)),
        state._replace(
            running_mean=receive("running_mean", state.running_mean),
            running_var=receive("running_var", state.running_var),
            num_batches_tracked=count,
        ),
    )


def dtype_and_device_of(backend: Backend, params: Params, state: State, dtype: str, device: Any) -> tuple[str, Any]:
    """Return the dtype and device of the first of the given parameters and statistics that is an array of ``backend``.

    Host data and scalars have neither, and leave the layer's; so does a dtype that no layer can have.
    """
    for value in (*params, *state[:2]):
        if value is not None and backend.owns(value):
            given = dtype_name(value.dtype)
            return given if given == layer_dtype(given) else dtype, backend.device(value)
    return dtype, device


def device_of(backend: Backend, x: Array) -> Any:
    """Return the device of an array of ``backend``; None for a lazy one, whose blocks may be on any device."""
    return None if type(x) in registry.LAZY else backend.device(x)


def is_own(backend: Backend, name: str, x: Any, device: Any) -> bool:
    """Tell whether ``x`` is an array of ``backend`` or host data, and refuse anything else.

    Raises:
        TypeError: another framework's array.
        ValueError: an own array on another device.
    """
    owner = registry.owner_of(x)
    if owner is backend:
        if device is not None and type(x) not in registry.LAZY:
            given = backend.device(x)
            checks.device(name, given, device, () if given is not None else backend.devices(x))
        return True
    if owner is not registry.get_backend("numpy"):
        raise TypeError(
            f"{name} is an array of {owner.name} and the backend is {backend.name}. Move the layer: "
            f"bn.to(backend={owner.name!r}); or the array: mbn.asarray({name}, backend={backend.name!r})."
        )
    return False


def owned(
    name: str, value: Any, *, backend: Backend, shape: tuple[int, ...], dtype: str, device: Any, fill: bool
) -> Array:
    """Return a layer's own copy of a parameter or statistic, on its backend.

    Args:
        name: its name, for messages.
        value: real numbers, of any known framework.
        backend, shape, dtype, device: those of the layer; ``"int64"`` is a count.
        fill: allow one number for all channels.

    Raises:
        TypeError: ``value`` is no array of real numbers, or a count is no integer.
        ValueError: ``value`` has another shape, or a count is negative or too large.
    """
    registry.check_uncompiled(f"setting {name}")
    # The copy is made by the array's own backend, which can copy a traced one; another backend then takes the copy.
    owner = registry.owner_of(value)
    if registry.is_host_data(value):
        array = from_python(name, value, "at least 0 and at most 9223372036854775807" * (dtype == "int64"))
    else:
        checks.readable(owner, name, value)
        array = owner.copy(value)
        array = array if owner is backend else _handed_over(array, owner, backend)
    given, is_count = dtype_name(array.dtype), dtype == "int64"
    if not given.startswith(("int", "uint") if is_count else ("int", "uint", "float", "bfloat")):
        holds = checks.held(given).removeprefix("is ").removeprefix("holds ")
        raise TypeError(f"{name} is made of {'integers' if is_count else 'real numbers'}, not {holds}.")
    is_filling = fill and tuple(array.shape) == ()
    if tuple(array.shape) != shape and not is_filling:
        raise ValueError(f"{name} has shape {tuple(array.shape)}; this layer needs {shape}.")
    with np.errstate(over="ignore"):  # as in torch, beyond float32 it is inf
        own: Array = backend.asarray(array.astype(dtype) if isinstance(array, np.ndarray) else array, dtype, device)
    if is_count:
        limit = np.iinfo(dtype_name(own.dtype)).max  # int32's, if the framework has no int64
        if registry.owner_of(array).within(array, 0, limit) is False and int(array) != limit:
            raise ValueError(f"{name} counts batches and is at least 0 and at most {limit}, not {array}.")
    return backend.copy(own + backend.asarray(np.zeros(shape, dtype), dtype, device)) if is_filling and shape else own
