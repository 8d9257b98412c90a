"""The statistics of a data set, from its batches one after another.

They must not depend on the sizes of the batches, and no more than one batch may be in memory.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import partial, reduce
from numbers import Number
from operator import length_hint
from typing import Any

import numpy as np

from mbn import checks, registry
from mbn.chunked import dask
from mbn.contract import Array, Backend, Batch, Kernels, Moments, Settings, dtype_name, transposed
from mbn.convert import received
from mbn.step.empty import stand_in
from mbn.threads import limited


class Total:
    """The statistics of all batches so far.

    They are merged in pairs, and pairs of pairs: so rounding errors and memory grow with the logarithm of the number of
    batches.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    def __init__(self) -> None:
        self.num_batches = 0
        self._parts: list[tuple[int, Moments]] = []
        """Pairs of a number of batches and their statistics, in decreasing order of the numbers."""

    def add(self, backend: Backend, x: Array, settings: Settings, device: Any = None) -> None:
        """Add a batch ``x``, an array of ``backend`` or a lazy one; only its statistics are kept.

        Blocks of a lazy array are received on ``device``.

        Raises:
            TypeError, ValueError: ``x`` is refused as in a call.
        """
        if type(x) in registry.LAZY:
            moments = _moments_of_blocks(backend, x, settings, device)
        else:
            moments = _moments(backend, settings, x)
        if moments is not None:
            self._parts = self._with(backend, 1, moments)
        self.num_batches += 1

    def merge(self, backend: Backend, other: "Total") -> None:
        """Add the batches of another total, whose statistics are those of the same backend."""
        moments = other.moments(backend)
        if moments is not None:
            self._parts = self._with(backend, other.num_batches, moments)
        self.num_batches += other.num_batches

    def _with(self, backend: Backend, size: int, moments: Moments) -> list[tuple[int, Moments]]:
        """Return the parts with another, which is merged with those of as few batches: so no part has many merges."""
        parts = list(self._parts)
        while parts and parts[-1][0] <= size:
            other_size, other = parts.pop()
            moments, size = _merged(backend, other, moments), size + other_size
        return [*parts, (size, moments)]

    def share(self, backend: Backend, settings: Settings, device: Any, replicas: Any) -> None:
        """Add the batches of all other replicas; the result has the same bits on each."""
        moments = self.moments(backend)
        if moments is None:  # this replica has no values, and takes part nevertheless
            x = backend.asarray(np.zeros((0, settings.num_features or 0)), "float32", device)
            moments = backend.kernels.moments(stand_in(backend, x, settings))
        every = replicas.moments(backend.kernels, moments, settings.dtype)
        self.num_batches = sum(replicas.numbers(self.num_batches))
        self._parts = [(self.num_batches, reduce(partial(_merged, backend), every))]

    def moments(self, backend: Backend) -> Moments | None:
        """Return the statistics of all batches together; None without a value."""
        if not self._parts:
            return None
        *others, (_, moments) = self._parts
        for _, other in reversed(others):
            moments = _merged(backend, other, moments)
        return moments

    def statistics(self, backend: Backend, settings: Settings, device: Any) -> dict[str, Array]:
        """Return running mean and variance, (C,) in the layer's dtype.

        Raises:
            ValueError: there are too few values for a variance.
        """
        moments = self.moments(backend)
        n = 0 if moments is None else moments.count
        if moments is None or n <= settings.correction:
            raise ValueError(
                f"the batches hold {n:g} values per channel, and a variance with correction={settings.correction} "
                f"takes at least {settings.correction + 1}."
            )
        return {
            "running_mean": _vector(backend, moments.mean, settings, device),
            "running_var": _vector(backend, backend.kernels.variance(moments, settings.correction), settings, device),
        }


def _moments(backend: Backend, settings: Settings, x: Array) -> Moments | None:
    """Check a batch, and return its statistics; None without a value."""
    try:
        shape = x.shape
    except RuntimeError as error:
        raise TypeError(checks.SHAPELESS) from error
    checks.batch(backend, shape, dtype_name(x.dtype), settings, None, training=False)
    if 0 in shape:
        return None
    x = backend.constant(x)
    batch = Batch(transposed(x) if settings.has_channels_last(x.ndim) else x, None, settings.dtype)
    kernels, batch = backend.kernels_for("moments", batch)
    moments = kernels.moments(batch)
    backend.finish(*moments)  # before that, lazy results keep the batch in memory
    return moments


def _moments_of_blocks(backend: Backend, x: Any, settings: Settings, device: Any) -> Moments | None:
    """Compute the statistics of a lazy array, block by block."""
    checks.batch(backend, x.shape, dtype_name(x.dtype), settings, None, training=False)
    kernels = backend.kernels
    has_vectors = type(kernels).to_vectors is not Kernels.to_vectors
    if x.numblocks[settings.axis] > 1 and not has_vectors:
        x = x.rechunk({settings.axis: -1})
    of_block, merge = partial(_moments_of_block, backend, settings, device), partial(_merged_blocks, backend)
    first: Moments | None
    first, *others = dask.reduced(x, settings.axis, of_block, merge)
    if first is None or not others:
        return first
    parts = [kernels.to_vectors(moments, settings.dtype) for moments in (first, *others)]
    return kernels.from_vectors(first.count, tuple(map(backend.concatenated, zip(*parts, strict=True))))


def _moments_of_block(backend: Backend, settings: Settings, device: Any, block: Array) -> Moments | None:
    with limited(1):  # the scheduler has a thread for each processor that it may use
        x = received(backend, "x", block, settings.dtype, device)
        return _moments(backend, settings._replace(num_features=x.shape[settings.axis]), x)


def _merged_blocks(backend: Backend, a: Moments | None, b: Moments | None) -> Moments | None:
    return a if b is None else b if a is None else _merged(backend, a, b)


_SLICE = 1 << 25
"""Bytes of a slice of an array, or those of one row if a row has more."""


class Slices:
    """An array in slices along its first axis, of which one at a time has to be in memory.

    A framework's array is one slice: all of it is in memory already, perhaps on several devices.
    """

    def __init__(self, array: Any, settings: Settings) -> None:
        self._array, shape = array, tuple(array.shape)
        checks.rank(shape, settings.axis)
        row = math.prod(shape[1:]) * getattr(array.dtype, "itemsize", 8) if hasattr(array, "dtype") else 0
        self._is_read = not hasattr(array, "__dlpack__")  # a dataset of a file, for example: slicing reads it
        is_framework = not isinstance(array, np.ndarray) and not self._is_read
        self._step = shape[0] or 1 if is_framework else max(_SLICE // max(row, 1), 1)
        self._starts = range(0, shape[0] or 1, self._step)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Any]:
        if len(self) == 1 and not self._is_read:
            return iter((self._array,))
        return (self._array[start : start + self._step] for start in self._starts)


def inputs(batches: Iterable[Any], *, progress: bool) -> Generator[Any]:
    """Iterate over the inputs of batches, and keep no reference to them; ``progress`` shows a bar on standard error."""
    if (
        batches is None
        or isinstance(batches, Mapping | str | bytes)
        or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"))
    ):
        raise TypeError(f"batches is an array, or an iterable of inputs, not {type(batches).__name__}.")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = "fit", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without redirect_stdout, the output of the caller's iterator goes to standard output as usual.
    with Progress(*columns, console=Console(stderr=True), disable=not progress, redirect_stdout=False) as bar:
        task = bar.add_task("", total=length_hint(batches) or None)
        for batch in batches:
            yield _input(batch)
            del batch  # so that it is freed before the next one is made
            bar.advance(task)


def _input(batch: Any) -> Any:
    """Return the input of a batch: of several arrays, the first."""
    if isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is an array, or a tuple or list of which the first is the input, and not a "
            f"{type(batch).__name__} of {checks.few(batch)}: give the input alone, (batch[key] for batch in batches)."
        )
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Number):
        raise ValueError(
            f"x has shape ({len(batch)},): a list is read as batches, each (N, C) or (N, C, L). For a list of samples "
            "give one array: bn.fit(np.asarray(samples))."
        )
    is_several = isinstance(batch, tuple | list) and len(batch) > 0 and hasattr(batch[0], "shape")
    return batch[0] if is_several and len(batch[0].shape) > 1 else batch


def _merged(backend: Backend, a: Moments, b: Moments) -> Moments:
    """Return the statistics of both, merged in the order of ``Kernels.merge``: the larger first."""
    merged = backend.kernels.merge(a, b) if a.count >= b.count else backend.kernels.merge(b, a)
    backend.finish(*merged)  # another thread may merge the result, and cannot evaluate it
    return merged


def _vector(backend: Backend, statistic: Any, settings: Settings, device: Any) -> Array:
    """Return a mean or variance in the layer's dtype, rounded once."""
    zeros = backend.asarray(np.zeros(settings.num_features or 0), settings.dtype, device)
    return backend.kernels.lerp(zeros, statistic, 1.0)
