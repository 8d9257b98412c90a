"""The examples of a comparison: built-in ones, seeded random data or the arrays of a file.

Every example has an exact reference: its values are finite, each channel has more than one, and the variance fits the
layer's dtype.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from mbn.commands.options import DTYPES, UsageError, check_memory, numpy_dtype
from mbn.contract import dtype_name, layer_dtype

_SEED = 0
_VALUES = 2**23
"""Values of an array of a file that are compared by default: with six backends half a minute of CPU time and 800 MB."""


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
    total_rows: int | None = None
    """The rows of the array of which ``x`` is a sample; None where ``x`` is all of it."""

    @property
    def title(self) -> str:
        """The name of the data with its shape, and the dtype."""
        return f"{self.name}, {self.dtype}"

    @property
    def sampled(self) -> str | None:
        """The sentence that tells which rows are compared; None where all are."""
        if self.total_rows is None:
            return None
        rows = f"{len(self.x):,} of its {self.total_rows:,}"
        return f"Compared {rows} rows, evenly spaced; --rows 0 compares all."

    @property
    def dtype(self) -> str:
        """The dtype of x and of the outputs."""
        return dtype_name(self.x.dtype)

    @property
    def layer_dtype(self) -> str:
        """The dtype of parameters and running statistics."""
        return layer_dtype(self.dtype)


def built_in(dtype: str) -> list[Example]:
    """Return three textbook examples and a hard one, whose mean is 10 000 standard deviations."""
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
    """Return N(0, 1) values around an offset for each channel, about 1000 in size.

    Raises:
        UsageError: the shape has one value per channel, or takes more memory than there is.
    """
    check_memory(shape, np.dtype(np.float64))
    random = np.random.default_rng(_SEED)
    offset = 1e3 * random.standard_normal((shape[1], *[1] * (len(shape) - 2)))
    x = offset + random.standard_normal(shape)
    name = f"seeded random data as {shape}"
    _check_array(name, x, dtype)
    return _with_random_parameters(name, x, dtype)


def read(path: Path, dtype: str | None, rows: int | None = None) -> list[Example]:
    """Return an example for each array of a .npy or .npz file.

    Args:
        path: the file.
        dtype: the dtype to convert to; None keeps the dtype of each array.
        rows: the number of rows of each array to compare, evenly spaced; 0 for all. By default as many as hold about
            eight million values.

    Raises:
        UsageError: the file or one of its arrays cannot be compared.
    """
    examples = [_of_array(name, x, dtype, rows) for name, x in _arrays(path)]
    if not examples:
        raise UsageError(f"{path} holds no arrays.")
    return examples


def _of_array(name: str, x: np.ndarray, dtype: str | None, rows: int | None) -> Example:
    _check_array(name, x, dtype)
    total = len(x)
    limit = max(2, _VALUES * total // x.size) if rows is None else rows or total
    if limit < total:
        x = x[np.arange(limit) * total // limit]
        _check_array(f"{name}, {limit} rows of it,", x, dtype)
    example = _with_random_parameters(f"{name} {(total, *x.shape[1:])}", x, dtype or dtype_name(x.dtype))
    return example._replace(total_rows=total if limit < total else None)


def _plain(name: str, x: np.ndarray, dtype: str) -> Example:
    vector = np.ones(x.shape[1], layer_dtype(dtype))
    return Example(name, x.astype(numpy_dtype(dtype)), vector, 0 * vector, momentum=1.0, steps=1)


def _with_random_parameters(name: str, x: np.ndarray, dtype: str) -> Example:
    with np.errstate(over="ignore"):  # refused below
        x = x.astype(numpy_dtype(dtype))
    limit = float(np.sqrt(np.finfo(layer_dtype(dtype)).max) / 2)
    if not (np.abs(x.astype(np.float64)) <= limit).all():
        raise UsageError(
            f"{name} as {dtype} has NaN, infinite or huge values, and so no variance that {layer_dtype(dtype)} holds."
        )
    weight, bias = np.random.default_rng(_SEED).standard_normal((2, x.shape[1])).astype(layer_dtype(dtype))
    return Example(name, x, weight, bias)


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Iterate over the arrays of a file by name: one in a .npy, which is mapped, and those in a .npz one at a time."""
    try:
        with path.open("rb") as file:  # np.load would leave a refused file that it has opened to the garbage collector
            if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                yield path.name, np.load(path, mmap_mode="r", allow_pickle=False)
                return
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            yield from ((f"{name} of {path.name}", _member(path, name, loaded[name])) for name in loaded)
    except (UsageError, GeneratorExit):
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a file can have Python's parser, zlib or the memory raise anything
        why = "" if "pickle" in str(error) else f" ({_first_line(error)})"  # NumPy takes every other file for a pickle
        raise UsageError(f"{path} is no .npy or .npz file of numbers that fit into memory{why}.") from error


def _member(path: Path, name: str, x: Any) -> np.ndarray:
    if not isinstance(x, np.ndarray):
        raise UsageError(f"{path} is no .npz file of numbers: {name} is no array.")
    return x


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _check_array(name: str, x: np.ndarray, dtype: str | None) -> None:
    if x.ndim not in (2, 3):
        raise UsageError(f"{name} has shape {x.shape}; BatchNorm1d takes (N, C) or (N, C, L).")
    if x.size <= x.shape[1]:
        raise UsageError(f"{name} has shape {x.shape}; training takes more than one value per channel.")
    convertible = x.dtype.kind in "fiu"
    if not convertible or (dtype is None and dtype_name(x.dtype) not in DTYPES):
        message = f"{name} is {x.dtype}; arrays of {', '.join(DTYPES)} can be compared."
        if convertible:
            message += " Give a dtype to convert it to: --dtype float32, say."
        raise UsageError(message)
