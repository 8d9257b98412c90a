"""The checks of all arguments, and the error messages.

Every check comes before anything is computed or stored, so that a refused call changes nothing. A message names the
argument that was given, the one that is needed, and a way to it.
"""

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

import numpy as np

from mbn.contract import Array, Backend, Params, Settings, State, dtype_name

Part = TypeVar("Part", bound=Params | State)

_INPUT_DTYPES = {
    "float32": frozenset({"float16", "bfloat16", "float32"}),
    "float64": frozenset({"float16", "bfloat16", "float32", "float64"}),
}
"""By dtype of the statistics: the dtypes of x that lose no precision."""

_DIGITS = 40
"""Messages give longer integers by their order of magnitude."""
_MOST_FEATURES = 2**60 - 1
"""The number of float64 that fit into an address space."""
_MOST_DEVICES = 2**31
_INT64 = range(-(2**63), 2**63)

_COMPUTE_SIZES = "Let Dask compute the sizes of its chunks before: x.compute_chunk_sizes()."
SHAPELESS = (
    "x has no shape, as a nested tensor has none. Make one array of it, x.to_padded_tensor(0.0), and give lengths=."
)

_MASK_DTYPES = {
    "mask": (("bool",), "bool, True where there is a value"),
    "lengths": (("int", "uint"), "made of integers"),
    "sample_weight": (("int", "uint", "float", "bfloat"), "made of real numbers"),
}
"""By argument: the first letters of its dtypes, and their description for messages."""


def num_features(value: Any) -> int | None:
    """Return the number of channels as an int, or None, for which the first input determines it."""
    if value is None:
        return None
    count = _index(value)
    if _is_unknown(value):
        raise ValueError(f"x has an unknown number of channels. {_COMPUTE_SIZES}")
    if count is None:
        raise TypeError(f"num_features is an int or None (taken from the first input), not {shown(value)}.")
    if not 0 < count <= _MOST_FEATURES:
        limit = "at least 1" if count <= 0 else f"at most {_MOST_FEATURES}"
        raise ValueError(f"num_features is the number of channels C of the input, {limit}, not {short(count)}.")
    return count


def too_many_features(num_features: int | None) -> str:
    """Return the message for more channels than memory suffices for."""
    return (
        f"num_features is {num_features}, the number of channels C of the input; there is no memory here for the "
        "parameters and statistics of so many."
    )


def device_index(value: Any) -> None:
    """Check a device that is given as a number, which Torch and CuPy take for the index of a GPU."""
    if isinstance(value, int) and abs(value) >= _MOST_DEVICES:
        raise ValueError(
            f"a device is given by its name, as 'cpu' or 'cuda:1', or by the index of a GPU, not by {short(value)}."
        )


def eps(value: Any) -> float:
    """Return eps as a float: finite and not negative."""
    number = _real("eps", value)
    if not (0 <= number < math.inf):
        raise ValueError(f"eps is added to a variance and is at least 0 and finite, not {number}.")
    return number


def momentum(value: Any) -> float | None:
    """Return momentum as a float, or None for the cumulative average."""
    if value is None:
        return None
    number = _real("momentum", value, or_none=True)
    if not math.isfinite(number):
        raise ValueError(f"momentum is the weight of the new value and is finite, not {number}.")
    return number


def axis(value: Any) -> int:
    """Return the channel axis, 1 or -1."""
    index = _index(value)
    if index not in (1, -1):
        raise ValueError(f"axis is 1 for (N, C) and (N, C, L) or -1 for (N, C) and (N, L, C), not {shown(value)}.")
    return index


def correction(value: Any) -> int:
    """Return the number subtracted from the number of values for running_var: 1 (unbiased) or 0 (biased)."""
    index = _index(value)
    if index not in (0, 1):
        raise ValueError(
            f"correction is 1 for the unbiased running_var (torch's) or 0 for the biased one, not {shown(value)}."
        )
    return index


def flag(name: str, value: Any, error: type[Exception] = TypeError) -> bool:
    """Return a bool from Python's or NumPy's; refuse anything else, whose truth value may not be the one meant."""
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} is True or False, not {shown(value)}.")
    return bool(value)


def statistics_dtype(value: Any) -> str:
    """Return the name of the dtype of parameters and statistics: float32 (also for None) or float64."""
    try:
        name = "float32" if value is None else dtype_name(value)
    except (TypeError, ValueError):  # it has no hash, or no text
        name = type(value).__name__
    if name not in _INPUT_DTYPES:
        raise TypeError(
            f"dtype is that of parameters and statistics, float32 or float64, not {name}. float16 and bfloat16 inputs "
            "go into a float32 layer, which keeps their statistics in float32."
        )
    return name


def is_dtype(value: Any) -> bool:
    """Tell whether this is a dtype of any framework, or the name of one, rather than a device."""
    if value is None or (
        hasattr(value, "shape") and not isinstance(value, type)
    ):  # NumPy's scalar types have an attribute shape
        return False
    try:
        name = dtype_name(value)
    except TypeError:  # it has no hash
        return False
    return name.startswith(("float", "bfloat", "int", "uint", "complex", "bool"))


def layer(function: str, value: Any, kind: type) -> None:
    """Check that the argument of ``function`` is a layer."""
    if not isinstance(value, kind):
        package, name = type(value).__module__.partition(".")[0], type(value).__name__
        given = name if package == "builtins" else f"a {name} of {package}"
        message = f"{function} takes a mbn.BatchNorm1d, not {given}."
        if isinstance(getattr(value, "layer", None), kind):
            message += " Of a module from as_module(), give its layer: module.layer."
        else:
            message += " mbn.from_torch, from_flax, from_keras and from_onnx make one of another package's layer."
        raise TypeError(message)


def no_attribute(name: str, kind: type) -> str:
    """Return the message for setting an attribute that no layer of this class has."""
    from difflib import get_close_matches

    known = [other for other in dir(kind) if other[0] != "_" and not callable(getattr(kind, other))]
    close = get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"a layer has no attribute {name!r} to set.{hint} It has {', '.join(known)}; a subclass may have more."


def tracked(track_running_stats: bool, method: str) -> None:
    """Check that a layer has the running statistics that a method needs."""
    if not track_running_stats:
        raise ValueError(f"a layer with track_running_stats=False has no running statistics for {method}().")


def rank(shape: tuple[int, ...], axis: int) -> None:
    """Check that x has two or three axes."""
    if len(shape) not in (2, 3):
        layout = "(N, C) or (N, C, L)" if axis == 1 else "(N, C) or (N, L, C)"
        raise ValueError(f"x has shape {tuple(shape)}; BatchNorm1d takes {layout}: reshape it.")


def batch(
    backend: Backend, shape: tuple[int, ...], dtype: str, settings: Settings, state: State | None, *, training: bool
) -> None:
    """Check the shape and dtype of an input of ``backend`` against the settings of a layer.

    With ``training`` the input is normalised by its own statistics, and has more than one value per channel, since one
    value has no variance. ``state`` has the running statistics, which a message may recommend instead.
    """
    axis = settings.axis
    rank(shape, axis)
    if dtype not in _INPUT_DTYPES[settings.dtype] or dtype not in backend.capabilities.dtypes:
        raise TypeError(_wrong_dtype("x", dtype, settings.dtype, backend))
    if shape[axis] != settings.num_features:
        raise ValueError(_wrong_channels(shape, settings))
    if training and math.prod(shape) == settings.num_features:
        message = (
            f"x has shape {tuple(shape)}: one value per channel has no variance to train on. Give more values, or "
        )
        if state is None or state.running_mean is None:
            message += "normalise by running statistics: there are none here, since they need track_running_stats."
        else:
            message += "normalise by the running statistics: eval(), freeze() or training=False."
        raise ValueError(message)


def lazy(*, training: bool, vjp: bool, out: Any) -> None:
    """Check that a step of a lazy array is evaluation alone."""
    if training:
        raise TypeError(
            "x is a Dask array, which is lazy, and training takes the statistics of all its values at once. Set the "
            "running statistics by bn.fit(x), and normalise by them: eval(), freeze() or training=False; or train on a "
            "batch in memory, x.compute()."
        )
    if vjp or out is not None:
        raise TypeError(
            f"x is a Dask array, which is lazy, and has no {'pullback' if vjp else 'out'} here. Give an array in "
            "memory, x.compute(), or each block: x.map_blocks(...)."
        )


def out(backend: Backend, array: Any, x: Array) -> None:
    """Check that the output of ``x``, an array of ``backend``, can be written to an array of the caller's."""
    if not backend.capabilities.out:
        raise TypeError(
            f"{backend.name} declares no out: it cannot write to an array of the caller's. Use the returned output."
        )
    if not backend.owns(array):
        raise TypeError(f"out is {type(array).__name__}; it has to be an array of {backend.name}, as the output is.")
    readable(backend, "out", array)
    given, needed = dtype_name(array.dtype), dtype_name(x.dtype)
    if given != needed:
        raise TypeError(f"out is {given}; the output has the dtype of x, {needed}.")
    if tuple(array.shape) != tuple(x.shape):
        raise ValueError(f"out has shape {tuple(array.shape)}; the output has that of x, {tuple(x.shape)}.")
    if backend.device(array) != backend.device(x):
        raise ValueError(f"out is on {backend.device(array)}, and x on {backend.device(x)}.")
    conflict = backend.conflict(array, x)
    if conflict is not None:
        raise ValueError(f"out {conflict}. Give x itself, or an array of its own that can be written to.")


def linear(backend: Backend, weight: Array, bias: Array, num_features: int | None, dtype: str) -> None:
    """Check the weight and bias of a dense layer that comes before a layer of ``num_features`` channels and a dtype."""
    shape = tuple(weight.shape)
    if len(shape) != 2 or shape[0] != num_features:
        message = f"weight has shape {shape}; it has to be (C, in), and C is {num_features}."
        if shape[1:] == (num_features,):
            message += " Transpose an (in, C) kernel, as flax and Keras have it: kernel.T."
        raise ValueError(message)
    if tuple(bias.shape) != (num_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it has to be (C,), and C is {num_features}.")
    for name, given in (("weight", dtype_name(weight.dtype)), ("bias", dtype_name(bias.dtype))):
        if given not in _INPUT_DTYPES[dtype] or given not in backend.capabilities.dtypes:
            raise TypeError(_wrong_dtype(name, given, dtype, backend))
    readable(backend, "weight", weight)
    readable(backend, "bias", bias)


def device(name: str, given: Any, needed: Any, spread: tuple[str, ...] = ()) -> None:
    """Check that an array is on the device of the layer.

    ``given`` is None if any device will do, or if the array is spread over several devices, ``spread``.
    """
    if len(spread) > 1:
        raise ValueError(
            f"{name} is spread over {', '.join(spread)}, and the layer is on {needed} alone. Make the layer without a "
            f"device, for one that follows its input; or bring {name} to {needed}."
        )
    if given is not None and given != needed:
        raise ValueError(f"{name} is on {given}, the layer on {needed}. Move one of them: bn.to(device=...) or {name}.")


def running_statistics(state: State, *, needed: bool, counted: bool = False) -> None:
    """Check that both running statistics are given, or neither unless ``needed``; and, if ``counted``, their count."""
    if (state.running_mean is None) != (state.running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither.")
    if needed and state.running_mean is None:
        raise ValueError(
            "there are no running statistics to normalise by: give running_mean and running_var, or training=True."
        )
    if counted and state.running_mean is not None and state.num_batches_tracked is None:
        raise ValueError("momentum=None averages over all batches and needs num_batches_tracked, which is None.")


def variance(backend: Backend, running_var: Array) -> None:
    """Check that no running variance from outside is negative, unless traced. NaN passes, as of diverged models."""
    if backend.within(running_var, 0, math.inf) is False:
        host = backend.to_numpy(running_var)
        negative = np.flatnonzero(host < 0)
        if negative.size:
            raise ValueError(
                f"running_var is {host[negative[0]]} in channel {negative[0]}; a variance is at least 0 (or NaN)."
            )


def vector(name: str, value: Array, num_features: int, dtype: str) -> None:
    """Check a parameter or statistic of the functional API or of ``apply``."""
    shape, given = tuple(value.shape), dtype_name(value.dtype)
    if shape != (num_features,):
        raise ValueError(f"{name} has shape {shape}; it needs one value per channel: ({num_features},).")
    if given != dtype:
        raise TypeError(
            f"{name} is {given} and the other parameters and statistics are {dtype}: convert it to {dtype}."
        )


def count(value: Any) -> None:
    """Check the count of batches given to ``apply``: an integer, or an array of shape () with one."""
    kind = dtype_name(value.dtype) if hasattr(value, "dtype") else type(value).__name__
    shape = tuple(getattr(value, "shape", ()))
    if not kind.startswith("int") or shape != ():
        raise TypeError(f"num_batches_tracked is an integer scalar, not {kind} of shape {shape}.")
    if isinstance(value, int) and value not in _INT64:
        raise ValueError(f"num_batches_tracked is {short(value)}, beyond int64; it is at most {_INT64[-1]}.")


def part(name: str, value: Any, kind: type[Part]) -> Part:
    """Return ``params`` or ``state`` as a named tuple; the caller may give a plain one."""
    if not isinstance(value, tuple | list) or len(value) != len(kind._fields):
        given = f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list) else ''}"
        raise TypeError(
            f"{name} is a tuple of {', '.join(kind._fields)}, as bn.{name} is, each an array or None, not {given}."
        )
    return kind(*value)


def masks(backend: Backend) -> None:
    """Check that a backend takes sample weights."""
    if not backend.capabilities.masks:
        raise TypeError(
            f"{backend.name} declares no masks: it takes no mask, lengths or sample_weight. Remove the values that do "
            "not count before the call, or move the layer: bn.to(backend='numpy')."
        )


def wrong_mask_dtype(name: str, kind: str) -> str:
    """Return the message for a mask, lengths or sample weights of a wrong dtype or type."""
    hint = ""
    if name == "mask" and kind.startswith("str"):
        hint = ": compare the strings, as in np.asarray(mask) == 'yes'"
    elif name == "mask" and kind.startswith(("int", "uint", "float", "bfloat")):
        hint = ": mask != 0 makes one of an array, np.asarray(mask) != 0 of a list"
    return f"{name} {held(kind)}; it has to be {_MASK_DTYPES[name][1]}{hint}."


def readable(backend: Backend, name: str, array: Array) -> None:
    """Check that a backend can read an array of its own: a sparse one does not have all its values in memory."""
    flaw = backend.flaw(name, array) if backend.owns(array) else None  # a lazy array is none of the backend's own
    if flaw is not None:
        raise TypeError(flaw)


def mask_values(name: str, values: Array, full: tuple[int, ...]) -> None:
    """Check the dtype and shape of a mask, lengths or sample weights; ``full`` is (N,), or (N, L) with positions."""
    kind, shape = dtype_name(values.dtype), tuple(values.shape)
    first_letters, _ = _MASK_DTYPES[name]
    if not kind.startswith(first_letters):
        raise TypeError(wrong_mask_dtype(name, kind))
    if name == "lengths" and len(full) == 1:
        raise ValueError("lengths are those of sequences, and an x of (N, C) has none: give a mask, (N,).")
    allowed = [full[:1]] if name == "lengths" or len(full) == 1 else [full[:1], full]
    if shape not in allowed:
        raise ValueError(f"{name} has shape {shape}; this x needs {' or '.join(map(str, allowed))}.")


def out_of_range(name: str, given: np.ndarray, values: np.ndarray, limit: float) -> NoReturn:
    """Raise the error for lengths or sample weights, by the first that is not at least 0 and below ``limit``.

    ``given`` are they as the caller gave them, and ``values`` in the dtype that they are converted to.
    """
    wrong = given[~((values >= 0) & (values < limit))].flat[0]
    needed = (
        f"at least 0 and finite in {dtype_name(values.dtype)}"
        if math.isinf(limit)
        else f"from 0 to {limit - 1}, the length of x"
    )
    raise ValueError(f"{name} has a value of {wrong}; it has to be {needed}.")


def gradient(backend: Backend, dy: Array, shape: tuple[int, ...], dtype: str) -> None:
    """Check that ``dy``, an array of ``backend``, has the shape and dtype of the output that it is the gradient of."""
    given = dtype_name(dy.dtype)
    if tuple(dy.shape) != shape:
        raise ValueError(
            f"dy has shape {tuple(dy.shape)}; it is the gradient of the output and has its shape, {shape}."
        )
    if given != dtype:
        raise TypeError(f"dy is {given}; it is the gradient of the output and has its dtype: convert it to {dtype}.")
    readable(backend, "dy", dy)


def held(kind: str) -> str:
    """Return the words for an array of a wrong dtype, as ``is int64`` or ``holds strings``."""
    for start, contents in (("str", "strings"), ("bytes", "bytes"), ("object", "Python objects, such as None")):
        if kind.lower().startswith(start):
            return f"holds {contents}"
    return f"is {kind}"


def shown(value: Any) -> str:
    """Return a wrong argument as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return short(value)
    try:
        return repr(value)
    except ValueError:  # it contains an integer of more digits than Python writes
        return type(value).__name__


def short(number: int) -> str:
    """Return an integer as text, or its order of magnitude if it is long."""
    exponent = int(abs(number).bit_length() * math.log10(2))
    return str(number) if exponent < _DIGITS else f"{'-' * (number < 0)}10**{exponent}"


def few(keys: Iterable[Any], limit: int = 5) -> str:
    """Return the first keys, and the number of the others."""
    names = [str(key) for key in keys]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _wrong_channels(shape: tuple[int, ...], settings: Settings) -> str:
    axis, other = settings.axis, -settings.axis
    needed = settings.num_features
    message = f"x has shape {tuple(shape)}, so {shape[axis]} channels on axis {axis}; num_features is {needed}."
    if _is_unknown(shape[axis]):
        message += f" {_COMPUTE_SIZES}"
    elif len(shape) == 3 and shape[other] == needed:
        message += f" For channels on axis {other}, make the layer with axis={other}."
    return message


def _wrong_dtype(name: str, given: str, dtype: str, backend: Backend) -> str:
    usable = sorted(_INPUT_DTYPES[dtype] & backend.capabilities.dtypes)
    if given == "float64" and given in backend.capabilities.dtypes:
        return (
            f"{name} is float64 and the statistics are float32, which would lose its precision. Convert {name} to "
            "float32, or make the layer dtype='float64' (bn.to(dtype='float64') for one that exists)."
        )
    hint = "" if given.lower().startswith(("str", "bytes")) else f" Convert {name}, for example to float32."
    return f"{name} {held(given)}; {backend.name} takes {', '.join(usable)}.{hint}"


def _is_unknown(size: Any) -> bool:
    """Tell whether Dask does not know the size of an axis."""
    return isinstance(size, float) and math.isnan(size)


def _index(value: Any) -> int | None:
    """Return an integer of any type as an int, and None for anything else or a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _real(name: str, value: Any, *, or_none: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a real number{' or None' if or_none else ''}, not {shown(value)}.")
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats
        number: Any = value
        return math.inf if number > 0 else -math.inf
