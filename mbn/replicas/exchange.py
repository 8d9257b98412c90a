"""The communication of the replicas in one step: a gather in the forward pass, and one in the backward pass.

A replica must neither leave the others waiting nor compute with statistics of another step. So each vector begins with
a header that describes the step, and a replica whose input is refused sends a header that says so. Vectors of different
lengths crash some engines: before the first step of a layer, and one in another dtype, headers alone are exchanged.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias
from zlib import crc32

import numpy as np

from mbn.contract import LIVE, Array, Backend, Group, Kernels, Moments, Needs, Settings, dtype_name

Key: TypeAlias = tuple[int | None, str]
"""The number of channels and the dtype of a layer, as far as they are known."""

_numbers = count()
"""Numbers of layers in this process."""


class ReplicaError(RuntimeError):
    """Another replica of the layer failed, or the replicas do not compute the same step. Nobody's state changed."""


class Kind(IntEnum):
    """The kinds of steps."""

    REFUSED = 0
    STEP = 1
    POPULATION = 2
    TRACED = 3
    """A step whose backward pass is autograd's of all of its operations, and exchanges other vectors."""
    HANDSHAKE = 4
    """No step: the number of channels or the dtype is new to the replicas, and so is the length of the vectors."""


class Agreement:
    """The knowledge that a layer and its replicas share from step to step."""

    def __init__(self, name: str) -> None:
        """Begin without any; ``name`` is the layer's, for messages."""
        self.name = name
        self._settings: Settings | None = None
        self._identity = 2 * crc32(f"{name} ".encode())
        self.number = -1
        """The number by which all replicas know the layer, from its first step on."""
        self.steps = 0
        """The number of steps so far."""
        self.key: Key = (None, "")
        """The number of channels and the dtype that the replicas have compared last."""
        self.length = _HEADER
        """The length of the vectors for these."""

    def identity(self, settings: Settings | None) -> int:
        """Return a hash of the layer's name and settings, an even number."""
        if settings is not self._settings:
            self._settings = settings
            self._identity = 2 * crc32(f"{self.name} {_shown(settings)}".encode())
        return self._identity

    def described(self, settings: Settings | None) -> str:
        """Return the layer's name and settings as text."""
        name = f"the layer {self.name!r}" if self.name else "a layer" if self.number < 0 else f"layer {self.number}"
        return name if settings is None else f"{name} ({_shown(settings)})"


def _shown(settings: Settings | None) -> str:
    """Return the settings that all replicas have to have in common, as text."""
    if settings is None:
        return ""
    return f"eps={settings.eps}, momentum={settings.momentum}, correction={settings.correction}"


class _Header(NamedTuple):
    """The first numbers of a vector. Those before ``needs`` are equal for all replicas that compute the same step."""

    kind: float
    num_features: float
    identity: float
    """A hash of the layer's name and settings, an even number, plus 1 for a float64 layer."""
    number: float
    steps: float
    needs: float
    values: float
    """The number of values per channel; -1 if it is a sum of sample weights, which may be on a device."""


_HEADER = len(_Header._fields)
_AT_FIRST, _EQUAL = _Header._fields.index("number"), _Header._fields.index("needs")
"""The numbers of fields that have to be equal at the first step of a layer, and later."""
_LARGEST_WEIGHT, _TINY = 2.0**128, 5e-324
"""The size from which on kernels scale weights in float64 (``FAR_WEIGHT`` of ``mbn_common``), and the least number."""
_TEXT = 256
"""The number of bytes of an error's text that are sent."""
_REFUSAL = struct.pack("<q", 0x7FF8_6D62_6E00_0001)
(_NO_SUMS,) = struct.unpack("<d", _REFUSAL)
"""A NaN that no computation gives: it stands in a backward pass for sums that a replica could not compute."""


class Exchange:
    """The replicas of a layer in one step, in other processes or threads."""

    def __init__(
        self, agreement: Agreement, group: Group, backend: Backend, settings: Settings | None, device: Any, kind: Kind
    ) -> None:
        """Prepare an exchange; without ``settings`` the number of channels and the dtype are not known yet."""
        self._agreement, self._group, self._backend, self._device = agreement, group, backend, device
        self._own_group = group
        self._kind, self._settings = kind, settings
        self._key: Key = (None, "") if settings is None else (settings.num_features, settings.dtype)
        self._needs = Needs.NOTHING
        self._all_needs: list[float] = []
        self._is_empty = self._is_done = self._is_pulling = False

    @property
    def group(self) -> Group:
        """The group that exchanges vectors."""
        return self._group

    def through(self, group: Group, backend: Backend) -> None:
        """Exchange from now on the arrays of another backend, by a group that takes them."""
        self._group, self._backend, self._device = group, backend, None

    @property
    def key(self) -> str:
        """The key of this exchange in ``LIVE``."""
        LIVE.setdefault(key := f"exchange {id(self)}", self)
        return key

    def resumed(self, backend: Backend) -> Self:
        """Return this exchange, which an operator of autograd has found by its key, for arrays of the backend again."""
        if self._backend is not backend:
            self.through(self._own_group, backend)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An interrupted process does not wait for the others, which may be long in coming.
        if isinstance(error, Exception) and not self._is_done:
            self._refuse(error)

    @property
    def waits(self) -> bool:
        """Whether any replica needs the sums of the backward pass."""
        return Needs.GRADIENT in self._all_needs

    def expect(self, needs: Needs) -> None:
        """Note the part of this replica in the backward pass, before the forward gather."""
        self._needs = max(self._needs, needs)

    @property
    def needs(self) -> Needs:
        """The part of this replica in the backward pass."""
        return self._needs

    @property
    def all_needs(self) -> list[float]:
        """The parts of all replicas, after the forward gather."""
        return self._all_needs

    def trace(self) -> None:
        """Note that autograd differentiates the operations of this step."""
        self._kind = Kind.TRACED

    def without_values(self) -> None:
        """Note that this replica has an empty batch, and the statistics of a stand-in."""
        self._is_empty = True

    def sample_weights(
        self,
        kernels: Kernels,
        shape: tuple[int, ...],
        dtype: str,
        mask: Array | None,
        lengths: Array | None,
        sample_weight: Array | None,
    ) -> Array:
        """Return the weights of the values of this replica, as ``kernels.sample_weights``.

        Raises:
            ValueError: float64 weights are so large or small that kernels scale them, each replica's by its own factor.
        """
        if sample_weight is not None and dtype == "float64":
            within = self._backend.within
            is_large = within(sample_weight, 0, _LARGEST_WEIGHT) is False
            is_small = within(sample_weight, 0, 1 / _LARGEST_WEIGHT) and not within(sample_weight, 0, _TINY)
            if is_large or is_small:
                raise ValueError(
                    "the largest sample weight of a layer with a group is between 2**-128 and 2**128, since replicas "
                    "compare their weights: multiply all of them by one factor."
                )
        return kernels.sample_weights(shape, dtype, mask, lengths, sample_weight)

    def moments(self, kernels: Kernels, moments: Moments, dtype: str) -> Sequence[Moments]:
        """Return the statistics of the batches of all replicas, the same on each, in the order of their ranks.

        Raises:
            ReplicaError: another replica failed, or computes another step.
            TimeoutError: a replica is missing.
        """
        vectors = kernels.to_vectors(moments, dtype)
        counts, rows = self.gather(moments.count, vectors, dtype)
        return self.unpacked(kernels, counts, rows, len(vectors))

    def unpacked(self, kernels: Kernels, counts: Sequence[int | None], rows: Array, fields: int) -> list[Moments]:
        """Return the statistics in gathered rows, each the count and ``fields`` vectors."""
        return [
            kernels.from_vectors(rows[i, 0] if count is None else count, parts)
            for i, (count, parts) in enumerate(zip(counts, _split(rows, fields, 1), strict=True))
        ]

    def gather(self, values: Any, vectors: Sequence[Array], dtype: str) -> tuple[list[int | None], Array]:
        """Return the counts that are whole numbers, and the rows of all replicas, checked.

        Args:
            values: the number of values per channel of this replica, or the sum of their weights.
            vectors: K vectors of (C,).
            dtype: that of the layer.

        Returns:
            The counts, None for sums of weights; and (size, 1 + K C): counts and vectors.
        """
        agreement, self._key = self._agreement, (vectors[0].shape[0], dtype)
        values = 0 if self._is_empty else values
        known = values if isinstance(values, int) else -1
        if self._key != agreement.key:
            if not 0 <= self._group.rank < self._group.size:
                raise ValueError(f"{self._group!r} has rank {self._group.rank} of {self._group.size} processes.")
            headers = self._headers(self._signal(self._padded(self._header(known, Kind.HANDSHAKE))))
            self._check(headers, _AT_FIRST)
            agreement.number = int(headers[0].number)
            # The length of a vector depends on the number of channels and the dtype alone.
            agreement.key, agreement.length = self._key, _HEADER + 1 + len(vectors) * vectors[0].shape[0]
        header = self._header(known)
        # A sum of sample weights may be an array on a device.
        rows = self._send(
            [(*header, values), *vectors] if isinstance(values, int | float) else [header, values, *vectors]
        )
        headers = self._headers(rows)
        self._check(headers, _EQUAL)
        self._all_needs = [header.needs for header in headers]
        agreement.steps += 1
        self._is_done = True
        return [None if header.values < 0 else int(header.values) for header in headers], rows[:, _HEADER:]

    def numbers(self, number: int) -> list[int]:
        """Return the numbers of all replicas, after a gather."""
        rows = np.asarray(self._backend.to_numpy(self._signal([number])))
        return [int(value) for value in rows[:, 0]]

    def sums(self, sums: tuple[Array, ...]) -> Sequence[tuple[Array, ...]]:
        """Return the sums of a backward pass of all replicas, in the order of their ranks.

        Raises:
            ReplicaError: another replica failed, or takes no part in the backward pass.
            TimeoutError: a replica is missing.
        """
        every = _split(self.gathered_sums(sums), len(sums))
        dtype = sums[0].dtype  # that of the sums without replicas
        if every[0][0].dtype == dtype:
            return every
        return [tuple(self._backend.asarray(part, dtype_name(dtype)) for part in parts) for parts in every]

    def gathered_sums(self, sums: tuple[Array, ...]) -> Array:
        """Return a row for the sums of each replica, checked."""
        if Needs.NOTHING in self._all_needs:
            raise ReplicaError(
                f"{self._label} has no backward pass: {self._ranks(np.equal(self._all_needs, Needs.NOTHING))} computed "
                "the step without gradients, as under no_grad or by a plain call, and would not take part. All "
                "replicas have to compute the same."
            )
        self._is_done = True
        rows = self._send(sums)
        # Autograd's gradients are never refused, so there the host does not wait for a GPU's numbers.
        if self._is_pulling or isinstance(rows, np.ndarray) or str(self._backend.device(rows)) == "cpu":
            firsts = self._backend.to_numpy(rows[:, 0]).tolist()
            if any(first != first for first in firsts):  # noqa: PLR0124 - NaN
                self._raise_if_refused([struct.pack("<d", first) == _REFUSAL for first in firsts])
        return rows

    def exchanged(self, vector: Array, needs: Sequence[float] | None = None) -> Array:
        """Return the vectors of all replicas in a derivative; ``needs`` are those of the forward pass, if compared."""
        before, self._all_needs = self._all_needs, [] if needs is None else [float(need) for need in needs]
        try:
            return self.gathered_sums((vector,))
        finally:
            self._all_needs = before

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Return a context in which an error, before the sums are exchanged, reaches all replicas."""
        self._is_done, self._is_pulling = False, True
        try:
            yield
        except Exception as error:
            if not self._is_done and self.waits and Needs.NOTHING not in self._all_needs:
                self._tell(error, [_NO_SUMS] * (2 * (self._key[0] or 0)))
            raise

    # Headers.

    def _header(self, values: int = -1, kind: Kind | None = None) -> _Header:
        agreement, (num_features, dtype) = self._agreement, self._key
        return _Header(
            self._kind if kind is None else kind,
            num_features or 0,
            agreement.identity(self._settings) + (dtype == "float64"),
            next(_numbers) if agreement.number < 0 else agreement.number,
            agreement.steps,
            self._needs,
            values,
        )

    def _padded(self, header: _Header) -> list[float]:
        """Return a header with zeros, of the length that others expect, since engines fail where lengths differ."""
        return [*header, *[0.0] * (self._agreement.length - _HEADER)]

    def _headers(self, rows: Array) -> list[_Header]:
        return [_Header(*row) for row in self._backend.to_numpy(rows[:, :_HEADER]).tolist()]

    def _check(self, headers: list[_Header], compared: int) -> None:
        """Check that all replicas compute the same step, by the first fields of their headers; all find the same.

        Raises:
            ReplicaError: they do not.
        """
        if len({header[:compared] for header in headers}) == 1 and headers[0].kind != Kind.REFUSED:
            return
        self._raise_if_refused([header.kind == Kind.REFUSED for header in headers])
        self._is_done = True
        own = self._agreement.described(self._settings)
        raise ReplicaError(
            "the replicas do not compute the same step: "
            + "; ".join(
                f"rank {rank} is at {_described(header)} of {text}"
                for rank, (header, text) in enumerate(zip(headers, self._texts(own), strict=True))
            )
            + ". All have to call the same layers in the same order, with a batch of x[:0] where there is no data, "
            "and with the same dtype and settings. After an interrupt set bn.group on all of them again."
        )

    # Messages.

    @property
    def _label(self) -> str:
        agreement, (num_features, _) = self._agreement, self._key
        task = "fit" if self._kind == Kind.POPULATION else f"step {agreement.steps}"
        task += ", backward pass" * bool(self._all_needs)
        return f"{agreement.described(None)} ({num_features} channels, {task})"

    def _ranks(self, mask: Any) -> str:
        ranks = [str(rank) for rank in np.flatnonzero(mask)]
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"

    def _refuse(self, error: Exception) -> None:
        """Take part in the gather for which the others wait, and tell them of the error."""
        self._tell(error, self._padded(self._header(kind=Kind.REFUSED)))

    def _tell(self, error: Exception, refusal: Sequence[float]) -> None:
        self._is_done = True
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:  # noqa: BLE001 - an error may be unable to describe itself
            text = type(error).__name__
        try:
            self._signal(refusal)
            self._texts(text)
        except Exception as failure:  # noqa: BLE001 - the user has to see the error itself
            error.add_note(f"The other replicas could not be told: {type(failure).__name__}: {failure}")

    def _raise_if_refused(self, refused: Sequence[bool]) -> None:
        if any(refused):
            self._is_done = True
            texts = self._texts("")
            raise ReplicaError(
                f"{self._label} failed elsewhere, and changed nothing: "
                + "; ".join(f"rank {rank}: {texts[rank]}" for rank in np.flatnonzero(refused))
            )

    def _texts(self, own: str) -> list[str]:
        """Return the texts of all replicas, one of which has just refused the step."""
        data = own.encode(errors="replace")[:_TEXT].ljust(_TEXT, b"\0")
        rows = self._backend.to_numpy(self._signal(list(data)))
        return [bytes(row.astype(np.uint8)).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows)]

    # The engine.

    def _signal(self, numbers: Sequence[float]) -> Array:
        """Return the numbers of all replicas, one row for each, given this one's."""
        return self._send([numbers, self._backend.asarray(np.zeros(0), "float32", self._device)])

    def _send(self, parts: Sequence[Any]) -> Array:
        """Return the vectors of all replicas, given the parts of this one's, among them an array."""
        group, vector = self._group, self._backend.concatenated(parts)
        try:
            rows = group.gather(vector)
        except TimeoutError as error:
            self._is_done = True
            raise TimeoutError(f"{self._label}, rank {self._group.rank}: {error}") from error
        except BaseException:
            self._is_done = True
            raise
        found = getattr(rows, "shape", None), getattr(rows, "dtype", None)
        if found != (needed := ((group.size, vector.shape[0]), vector.dtype)):
            self._is_done = True
            raise TypeError(
                f"{type(self._own_group).__name__}.gather has to return an array of shape {needed[0]} and dtype "
                f"{needed[1]}, and returned {type(rows).__name__} of {found[0]} and {found[1]}."
            )
        return rows


def _split(rows: Array, parts: int, start: int = 0) -> list[tuple[Array, ...]]:
    """Return the parts of each row from ``start`` on, all of the same length."""
    size = (rows.shape[1] - start) // parts
    pieces = [slice(start + i * size, start + (i + 1) * size) for i in range(parts)]
    return [tuple([rows[i, piece] for piece in pieces]) for i in range(rows.shape[0])]


def _described(header: _Header) -> str:
    dtype = "float64" if header.identity % 2 else "float32"
    task = "fit" if header.kind == Kind.POPULATION else f"step {int(header.steps)}"
    task += " (compiled or transformed)" * (header.kind == Kind.TRACED)
    return f"{task}, {int(header.num_features)} channels in {dtype},"
