"""What is refused, and the words for it.

Every check runs before anything is computed or stored, so that a refused call leaves everything as it was. A message
says what was given, what is needed and how to get there.
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
"""By dtype of the statistics: what x may be without losing precision."""

_DIGITS = 40
"""How many of an integer's fit a message."""
_MOST_FEATURES = 2**60 - 1
"""How many float64 an address space has room for."""
_MOST_DEVICES = 2**31
_INT64 = range(-(2**63), 2**63)

SHAPELESS = "x has no shape: it is nested, say. Make one array of it: x.to_padded_tensor(0.0), with lengths=."

_MASK_DTYPES = {
    "mask": (("bool",), "bool, True where there is a value"),
    "lengths": (("int", "uint"), "made of integers"),
    "sample_weight": (("int", "uint", "float", "bfloat"), "made of real numbers"),
}
"""The first letters of the dtypes that each may have, and what to say of others."""


def num_features(value: Any) -> int | None:
    """Return the number of channels as an int; None means that the first input will tell."""
    if value is None:
        return None
    count = _index(value)
    if count is None:
        raise TypeError(f"num_features is an int or None (taken from the first input), not {shown(value)}.")
    if not 0 < count <= _MOST_FEATURES:
        limit = "at least 1" if count <= 0 else f"at most {_MOST_FEATURES}"
        raise ValueError(f"num_features is the number of channels C of the input, {limit}, not {short(count)}.")
    return count


def too_many_features(num_features: int | None) -> str:
    """Return what to say where there is no memory for so many channels."""
    return (
        f"num_features is {num_features}, the number of channels C of the input; there is no memory here for the "
        "parameters and statistics of so many."
    )


def device_index(value: Any) -> None:
    """Check a device that is given as a number, which Torch and CuPy take for the index of a GPU."""
    if isinstance(value, int) and abs(value) >= _MOST_DEVICES:
        raise ValueError(
            f"a device is given by its name, 'cpu' or 'cuda:1' say, or the index of a GPU, not by {short(value)}."
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
    """Return what is subtracted from the number of values for running_var: 1 (unbiased) or 0 (biased)."""
    index = _index(value)
    if index not in (0, 1):
        raise ValueError(
            f"correction is 1 for the unbiased running_var (torch's) or 0 for the biased one, not {shown(value)}."
        )
    return index


def flag(name: str, value: Any, error: type[Exception] = TypeError) -> bool:
    """Return True or False, Python's or NumPy's: of anything else, which of them it means is a guess."""
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} is True or False, not {shown(value)}.")
    return bool(value)


def statistics_dtype(value: Any) -> str:
    """Return the name of the dtype of parameters and statistics: float32 (also for None) or float64."""
    try:
        name = "float32" if value is None else dtype_name(value)
    except (TypeError, ValueError):  # nothing that could be the key of a dictionary, or be shown
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
    ):  # NumPy's classes of scalars have one
        return False
    try:
        name = dtype_name(value)
    except TypeError:  # nothing that could be the key of a dictionary
        return False
    return name.startswith(("float", "bfloat", "int", "uint", "complex", "bool"))


def layer(function: str, value: Any, kind: type) -> None:
    """Check that a function about layers gets one."""
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
    """Return what to say where an attribute is set that no layer of this class has."""
    from difflib import get_close_matches

    known = [other for other in dir(kind) if other[0] != "_" and not callable(getattr(kind, other))]
    close = get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"a layer has no attribute {name!r} to set.{hint} It has {', '.join(known)}; a subclass may have more."


def tracked(track_running_stats: bool, method: str) -> None:
    """Check that a layer has the running statistics that a method is about."""
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

    ``training`` by the statistics of the input takes more than one value per channel, since one has no variance;
    ``state`` is what there is instead.
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
            message += "normalise by running statistics, which there are none of here: they need track_running_stats."
        else:
            message += "normalise by the running statistics: eval(), freeze() or training=False."
        raise ValueError(message)


def out(backend: Backend, array: Any, x: Array) -> None:
    """Check that the output of ``x``, an array of ``backend``, can be written to an array of the caller's."""
    if not backend.capabilities.out:
        raise TypeError(
            f"{backend.name} declares no out: it writes to no array of the caller's. Use the output that is returned."
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
    """Check weight and bias of the dense layer before a layer of so many features and this dtype."""
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
    """Check that an array lies where the others do. None is anywhere, or ``spread`` over devices."""
    if len(spread) > 1:
        raise ValueError(
            f"{name} is spread over {', '.join(spread)}, and the layer is on {needed} alone. Make the layer without a "
            f"device, for one that follows its input; or bring {name} to {needed}."
        )
    if given is not None and given != needed:
        raise ValueError(f"{name} is on {given}, the layer on {needed}. Move one of them: bn.to(device=...) or {name}.")


def running_statistics(state: State, *, needed: bool, counted: bool = False) -> None:
    """Check that both running statistics are there, or none if not ``needed``; and their count if that is."""
    if (state.running_mean is None) != (state.running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither.")
    if needed and state.running_mean is None:
        raise ValueError(
            "there are no running statistics to normalise by: give running_mean and running_var, or training=True."
        )
    if counted and state.running_mean is not None and state.num_batches_tracked is None:
        raise ValueError("momentum=None averages over all batches and needs num_batches_tracked, which is None.")


def variance(backend: Backend, running_var: Array) -> None:
    """Check that no variance that a layer takes in is negative, unless it is traced. Diverged models have NaN."""
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
    """Check the count of batches of ``apply``: an integer, or an array of one."""
    kind = dtype_name(value.dtype) if hasattr(value, "dtype") else type(value).__name__
    shape = tuple(getattr(value, "shape", ()))
    if not kind.startswith("int") or shape != ():
        raise TypeError(f"num_batches_tracked is an integer scalar, not {kind} of shape {shape}.")
    if isinstance(value, int) and value not in _INT64:
        raise ValueError(f"num_batches_tracked is {short(value)}, beyond int64; it is at most {_INT64[-1]}.")


def part(name: str, value: Any, kind: type[Part]) -> Part:
    """Return ``params`` or ``state`` as those of a layer, where plain tuples may be given too."""
    if not isinstance(value, tuple | list) or len(value) != len(kind._fields):
        given = f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list) else ''}"
        raise TypeError(
            f"{name} is a tuple of {', '.join(kind._fields)}, as bn.{name} is, each an array or None, not {given}."
        )
    return kind(*value)


def masks(backend: Backend) -> None:
    """Check that a backend knows weights."""
    if not backend.capabilities.masks:
        raise TypeError(
            f"{backend.name} declares no masks: it takes no mask, lengths or sample_weight. Leave out what has no "
            "value before the call, or move the layer: bn.to(backend='numpy')."
        )


def wrong_mask_dtype(name: str, kind: str) -> str:
    """Return what to say of a mask, lengths or sample weights of a wrong dtype or type."""
    hint = ""
    if name == "mask" and kind.startswith("str"):
        hint = ": compare the strings, np.asarray(mask) == 'yes' say"
    elif name == "mask" and kind.startswith(("int", "uint", "float", "bfloat")):
        hint = ": mask != 0 makes one of an array, np.asarray(mask) != 0 of a list"
    return f"{name} {held(kind)}; it has to be {_MASK_DTYPES[name][1]}{hint}."


def readable(backend: Backend, name: str, array: Array) -> None:
    """Check that a backend can read an array of its own: a sparse one does not have all its values in memory."""
    flaw = backend.flaw(name, array)
    if flaw is not None:
        raise TypeError(flaw)


def mask_values(name: str, values: Array, full: tuple[int, ...]) -> None:
    """Check the dtype and shape of a mask, lengths or sample weights; a full one is (N,) or (N, L): ``full``."""
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
    """Refuse lengths or sample weights by the first that is not at least 0 and below ``limit``, in their new dtype."""
    wrong = given[~((values >= 0) & (values < limit))].flat[0]
    needed = (
        f"at least 0 and finite in {dtype_name(values.dtype)}"
        if math.isinf(limit)
        else f"from 0 to {limit - 1}, the length of x"
    )
    raise ValueError(f"{name} has a value of {wrong}; it has to be {needed}.")


def gradient(backend: Backend, dy: Array, shape: tuple[int, ...], dtype: str) -> None:
    """Check that what a pullback is given, an array of ``backend``, could be the gradient of its output."""
    given = dtype_name(dy.dtype)
    if tuple(dy.shape) != shape:
        raise ValueError(
            f"dy has shape {tuple(dy.shape)}; it is the gradient of the output and has its shape, {shape}."
        )
    if given != dtype:
        raise TypeError(f"dy is {given}; it is the gradient of the output and has its dtype: convert it to {dtype}.")
    readable(backend, "dy", dy)


def held(kind: str) -> str:
    """Return what to say of an array of a wrong dtype."""
    for start, what in (("str", "strings"), ("bytes", "bytes"), ("object", "Python objects, None say")):
        if kind.lower().startswith(start):
            return f"holds {what}"
    return f"is {kind}"


def shown(value: Any) -> str:
    """Return a wrong argument as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return short(value)
    try:
        return repr(value)
    except ValueError:  # of an integer in it, which has more digits than Python writes
        return type(value).__name__


def short(number: int) -> str:
    """Return an integer as text, or about how large it is."""
    exponent = int(abs(number).bit_length() * math.log10(2))
    return str(number) if exponent < _DIGITS else f"{'-' * (number < 0)}10**{exponent}"


def few(keys: Iterable[Any], limit: int = 5) -> str:
    """Return the first keys, and how many more there are."""
    names = [str(key) for key in keys]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _wrong_channels(shape: tuple[int, ...], settings: Settings) -> str:
    axis, other = settings.axis, -settings.axis
    needed = settings.num_features
    message = f"x has shape {tuple(shape)}, so {shape[axis]} channels on axis {axis}; num_features is {needed}."
    if len(shape) == 3 and shape[other] == needed:
        message += f" For channels on axis {other}, make the layer with axis={other}."
    return message


def _wrong_dtype(name: str, given: str, dtype: str, backend: Backend) -> str:
    usable = sorted(_INPUT_DTYPES[dtype] & backend.capabilities.dtypes)
    if given == "float64" and given in backend.capabilities.dtypes:
        return (
            f"{name} is float64 and the statistics are float32, which would lose its precision. Convert {name} to "
            "float32, or make the layer dtype='float64' (bn.to(dtype='float64') for one that exists)."
        )
    hint = "" if given.lower().startswith(("str", "bytes")) else f" Convert {name}, to float32 say."
    return f"{name} {held(given)}; {backend.name} takes {', '.join(usable)}.{hint}"


def _index(value: Any) -> int | None:
    """Return an int from one of any kind; None of what is none, or a truth value."""
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
