"""The statistics of a data set whose batches are spread over processes, for any scheduler."""

import copy
from contextlib import closing
from typing import Any, NamedTuple, Self

from mbn import checks, registry
from mbn.chunked import reading
from mbn.contract import Backend, Settings, State
from mbn.convert import device_of, received
from mbn.step.population import Total


class _Source(NamedTuple):
    """The kind of batches that a population has."""

    backend: Backend | None
    settings: Settings
    device: Any


class Population:
    """The mean and variance of a data set, from its batches in any order and any number of processes.

    Each process updates a population of its own with its batches. Populations are pickled, and merged; the same order
    gives the same bits. The result is as exact as that of :meth:`mbn.BatchNorm1d.fit` on all batches::

        bn.state = first.merge(second).statistics()

    Args:
        axis: the axis of the channels, 1 or -1.
        correction: 1 for the unbiased variance, 0 for the biased one.
        dtype: the dtype of the results: float32 (the default) or float64.
        backend: a name or a Backend; by default that of the first batch.

    Raises:
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        TypeError, ValueError: an argument has a wrong type or value.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    def __init__(
        self, *, axis: int = 1, correction: int = 1, dtype: Any = None, backend: str | Backend | None = None
    ) -> None:
        dtype, axis, correction = checks.statistics_dtype(dtype), checks.axis(axis), checks.correction(correction)
        chosen = registry.get_backend(backend) if backend is not None else registry.chosen_backend()
        self._source = _Source(chosen, Settings(None, dtype, 0.0, None, axis, correction), None)
        self._total = Total()

    def update(self, x: Any) -> Self:
        """Add a batch, (N, C) or (N, C, L), or (N, L, C) with ``axis=-1``; return the population.

        It may be an array in a file, of zarr or h5py for example, which is read by its chunks. Where these divide the
        channels, the memory is that of a row of chunks. An array of Dask is computed block by block.

        Raises:
            TypeError, ValueError: ``x`` is refused as in a call of a layer; the population is unchanged.
        """
        source = self._source
        total = copy.copy(self._total)  # a total changes its lists by replacing them
        if reading.is_array(x) and not hasattr(x, "__dlpack__") and not registry.is_lazy(x):
            with closing(iter(reading.Pieces(x, source.settings, splits_channels=False))) as pieces:
                for piece in pieces:
                    source = self._add(total, piece.values, source)
            total.num_batches = self._total.num_batches + 1
        else:
            source = self._add(total, x, source)
        self._total, self._source = total, source
        return self

    @staticmethod
    def _add(total: Total, x: Any, source: _Source) -> _Source:
        """Add an input to a total, and return the kind of batches that it then has."""
        backend, settings, device = source
        backend = backend or registry.owner_of(x)
        x = received(backend, "x", x, settings.dtype, device)
        if settings.num_features is None:
            checks.rank(x.shape, settings.axis)
            settings = settings._replace(num_features=checks.num_features(int(x.shape[settings.axis])))
        total.add(backend, x, settings, device)
        return _Source(backend, settings, device_of(backend, x) if device is None else device)

    def merge(self, other: "Population") -> Self:
        """Add the batches of another population, which is unchanged; return this one.

        Raises:
            TypeError: another class.
            ValueError: another number of channels, axis, correction, dtype or backend. The population is unchanged.
        """
        if not isinstance(other, Population):
            raise TypeError(f"merge takes an mbn.Population, not {type(other).__name__}.")
        (backend, settings, device), theirs, total = self._source, other._source, other._total  # noqa: SLF001 - of this class
        backend = backend or theirs.backend
        channels = {settings.num_features, theirs.settings.num_features} - {None}
        settings, their_settings = (given._replace(num_features=None) for given in (settings, theirs.settings))
        if len(channels) > 1 or settings != their_settings or backend is not (theirs.backend or backend):
            raise ValueError(f"these populations cannot be merged: {self!r} and {other!r}.")
        if backend is not None:
            merged = copy.copy(self._total)
            merged.merge(backend, total)
            self._total = merged
        self._source = _Source(
            backend, settings._replace(num_features=next(iter(channels), None)), device or theirs.device
        )
        return self

    def statistics(self) -> State:
        """Return mean and variance of all values, (C,) each, and the number of batches, as arrays of the backend.

        Raises:
            ValueError: there are too few values for a variance.
        """
        backend, settings, device = self._source
        backend = backend or registry.get_backend()
        found = self._total.statistics(backend, settings, device)
        return State(**found, num_batches_tracked=backend.asarray(self._total.num_batches, "int64", device))

    def __repr__(self) -> str:
        """Return the number of batches and the arguments."""
        backend, settings, _ = self._source
        return (
            f"<Population of {self._total.num_batches} batches, num_features={settings.num_features}, "
            f"axis={settings.axis}, correction={settings.correction}, dtype={settings.dtype!r}, "
            f"backend={None if backend is None else backend.name!r}>"
        )
