"""The statistics of a data set, from its batches one after another.

They must not depend on the sizes of the batches, and no more than one batch may be in memory.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from functools import partial, reduce
from numbers import Number
from operator import length_hint
from typing import Any

import numpy as np

from mbn import checks, registry
from mbn.chunked import dask
from mbn.chunked.reading import Pieces
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
        self._sections: dict[range, Total] = {}
        """Of an array in pieces that have some of the channels alone: the totals of these, in increasing order."""

    def of(self, channels: range | None) -> "Total":
        """Return the total to add a piece of an array to, which has these channels, or all of them where None."""
        return self if channels is None else self._sections.setdefault(channels, Total())

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
        if self._sections:
            parts = [
                total.statistics(backend, narrowed(settings, channels), device)
                for channels, total in self._sections.items()
            ]
            return {
                name: backend.asarray(np.concatenate([backend.to_numpy(part[name]) for part in parts]), None, device)
                for name in parts[0]
            }
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
    if x.numblocks[settings.axis] > 1:
        settings = settings._replace(num_features=None)  # each block has its own number
    of_block, merge = partial(_moments_of_block, backend, settings, device), partial(_merged_blocks, backend)
    # None is the result of blocks without a value, and of a range without channels.
    found: list[Moments] = [part for part in dask.reduced(x, settings.axis, of_block, merge) if part is not None]
    if len(found) <= 1:
        return found[0] if found else None
    parts = [kernels.to_vectors(moments, settings.dtype) for moments in found]
    return kernels.from_vectors(found[0].count, tuple(map(backend.concatenated, zip(*parts, strict=True))))


def _moments_of_block(backend: Backend, settings: Settings, device: Any, block: Array) -> Moments | None:
    with limited(1):  # the scheduler has a thread for each processor that it may use
        x = received(backend, "x", block, settings.dtype, device)
        if settings.num_features is None:
            settings = settings._replace(num_features=x.shape[settings.axis])
        return _moments(backend, settings, x)


def _merged_blocks(backend: Backend, a: Moments | None, b: Moments | None) -> Moments | None:
    return a if b is None else b if a is None else _merged(backend, a, b)


def narrowed(settings: Settings, channels: range | None) -> Settings:
    """Return the settings for a piece of an array that has these channels, or all of them where None."""
    return settings if channels is None else settings._replace(num_features=len(channels))


def inputs(batches: Iterable[Any] | Pieces, *, progress: bool) -> Generator[tuple[Any, range | None]]:
    """Iterate over the inputs of batches, or the pieces of an array with their channels, and keep no reference to them.

    ``progress`` shows a bar on standard error.
    """
    if (
        batches is None
        or isinstance(batches, Mapping | str | bytes)
        or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"))
    ):
        raise TypeError(f"batches is an array, or an iterable of inputs, not {type(batches).__name__}.")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    pieces = batches if isinstance(batches, Pieces) else None
    size = (
        (MofNCompleteColumn(),) if pieces is None else (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    )
    total = length_hint(batches) if pieces is None else pieces.nbytes
    # Without redirect_stdout, the output of the caller's iterator goes to standard output as usual.
    with (
        Progress(
            *("fit", BarColumn(), *size, TimeElapsedColumn()),
            console=Console(stderr=True),
            disable=not progress,
            redirect_stdout=False,
        ) as bar,
        nullcontext() if pieces is None else closing(iter(pieces)) as read,
    ):
        task = bar.add_task("", total=total or None)
        for batch in batches if read is None else read:
            yield (_input(batch), None) if read is None else (batch.values, batch.channels)
            done = 1 if read is None else batch.nbytes
            del batch  # so that it is freed before the next one is made
            bar.advance(task, done)


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
