"""What is compared: the built-in examples, seeded random data or the arrays of a file.

Whatever is let through here has an exact reference: it is finite, has more than one value per channel, and its
variance fits the layer's dtype.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mbn.commands.options import DTYPES, UsageError, check_memory, numpy_dtype
from mbn.contract import dtype_name, layer_dtype

_SEED = 0


class Example(NamedTuple):
    """A layer and its input: ``steps`` training steps on ``x``, then evaluation on ``x``."""

    name: str
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    momentum: float = 0.1
    eps: float = 1e-5
    steps: int = 3
    statistics: tuple[float, float] | None = None
    """The running mean and variance set before evaluation, in place of the trained ones."""

    @property
    def dtype(self) -> str:
        """The dtype of x and of the outputs."""
        return dtype_name(self.x.dtype)

    @property
    def layer_dtype(self) -> str:
        """The dtype of parameters and running statistics."""
        return layer_dtype(self.dtype)


def built_in(dtype: str) -> list[Example]:
    """Return torch's and mbn's textbook examples, and one that is hard: its mean is 10 000 standard deviations."""
    matrix = np.arange(12).reshape(3, 4)
    series = np.arange(60).reshape(3, 4, 5)
    random = np.random.default_rng(_SEED)
    hard = 1e4 + random.standard_normal((256, 32))
    return [
        _plain("arange(12) as (3, 4), momentum=1", matrix, dtype),
        _plain("arange(60) as (3, 4, 5), eps=0, momentum=1", series, dtype)._replace(eps=0.0),
        _plain("the same, then running_mean=10, running_var=1: evaluates to x - 10", series, dtype)._replace(
            eps=0.0, statistics=(10.0, 1.0)
        ),
        _with_random_parameters("1e4 + N(0, 1) as (256, 32), random weight and bias", hard, dtype),
    ]


def seeded(shape: tuple[int, ...], dtype: str) -> Example:
    """Return N(0, 1) values around an offset of each channel's own, of the size of 1000.

    Raises:
        UsageError: nothing can be trained on this shape.
    """
    check_memory(shape, np.dtype(np.float64))
    random = np.random.default_rng(_SEED)
    offset = 1e3 * random.standard_normal((shape[1], *[1] * (len(shape) - 2)))
    x = offset + random.standard_normal(shape)
    name = f"seeded random data as {shape}"
    _check_array(name, x, dtype)
    return _with_random_parameters(name, x, dtype)


def read(path: Path, dtype: str | None) -> list[Example]:
    """Return an example for each array of a .npy or .npz file.

    Args:
        path: the file.
        dtype: what to convert to; None keeps the dtype of each array.

    Raises:
        UsageError: the file or one of its arrays is of no use.
    """
    arrays = _load(path)
    if not arrays:
        raise UsageError(f"{path} holds no arrays.")
    for name, x in arrays.items():
        _check_array(name, x, dtype)
    return [_with_random_parameters(f"{name} {x.shape}", x, dtype or dtype_name(x.dtype)) for name, x in arrays.items()]


def _plain(name: str, x: np.ndarray, dtype: str) -> Example:
    vector = np.ones(x.shape[1], layer_dtype(dtype))
    return Example(name, x.astype(numpy_dtype(dtype)), vector, 0 * vector, momentum=1.0, steps=1)


def _with_random_parameters(name: str, x: np.ndarray, dtype: str) -> Example:
    with np.errstate(over="ignore"):  # refused below
        x = x.astype(numpy_dtype(dtype))
    limit = float(np.sqrt(np.finfo(layer_dtype(dtype)).max) / 2)
    if not (np.abs(x.astype(np.float64)) <= limit).all():
        raise UsageError(
            f"{name} holds NaN, infinite or huge values as {dtype}: only variances that fit can be compared."
        )
    weight, bias = np.random.default_rng(_SEED).standard_normal((2, x.shape[1])).astype(layer_dtype(dtype))
    return Example(name, x, weight, bias)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:  # np.load leaves a file that it opened and disliked to the garbage collector
            loaded = np.load(file, allow_pickle=False)
            arrays = {path.name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a file can have Python's parser, zlib or the memory raise anything
        why = "" if "pickle" in str(error) else f" ({_first_line(error)})"  # what NumPy takes all other files for
        raise UsageError(f"{path} is no .npy or .npz file of numbers that fit into memory{why}.") from error
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise UsageError(f"{path} is no .npz file of numbers: {name} is no array.")
    return arrays


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _check_array(name: str, x: np.ndarray, dtype: str | None) -> None:
    if x.ndim not in (2, 3):
        raise UsageError(f"{name} has shape {x.shape}; BatchNorm1d takes (N, C) or (N, C, L).")
    if x.size <= x.shape[1]:
        raise UsageError(f"{name} has shape {x.shape}; training takes more than one value per channel.")
    convertible = x.dtype.kind in "fiu"
    if not convertible or (dtype is None and dtype_name(x.dtype) not in DTYPES):
        message = f"{name} is {x.dtype}, and what can be compared is {', '.join(DTYPES)}."
        if convertible:
            message += " Say what to convert it to: --dtype float32, for instance."
        raise UsageError(message)
