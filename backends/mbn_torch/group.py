"""The processes of ``torch.distributed`` as a group, and an exchange through which autograd differentiates."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

from mbn.contract import LIVE, Group, Kernels, Moments, Needs, check_total
from mbn_torch.private import assumed_constant, gather_all

_GRACE, _PAUSE = 2.0, 0.02
"""Seconds in which other processes say that they have waited too, and between two looks."""

_EQUALLY_OFTEN = (
    "Each process has to call the layer and its backward pass equally often and in the same mode, with an empty batch, "
    "x[:0], where it has no data. The seconds to wait are the timeout of the process group."
)


def distributed_group(given: Any) -> "DistributedGroup":
    """Return the group of a process group of Torch, or of all processes for True.

    Raises:
        TypeError: ``given`` is no process group.
        ValueError: this process is not part of the group.
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    if given is not True and not (dist.is_available() and isinstance(given, dist.ProcessGroup)):
        if dist.is_available() and given == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not part of the group that torch.distributed.new_group made.")
        raise TypeError(
            "the group of a layer on Torch is a process group of torch.distributed, True for all processes, or an "
            f"mbn.Group; not {type(given).__module__}.{type(given).__qualname__}."
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "the layer shares statistics with other processes, and torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() before training, or set bn.group = None."
        )
    group = dist.group.WORLD if given is True else given
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not part of the group of the layer.")
    return DistributedGroup(group)


class DistributedGroup(Group):
    """The processes of a process group, which exchange tensors on its devices."""

    def __init__(self, group: Any) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return int(self._group.rank())

    @property
    def size(self) -> int:
        return int(self._group.size())

    def gather(self, vector: torch.Tensor) -> torch.Tensor:
        rows = vector.new_empty(self.size * vector.numel())
        try:
            gather_all(self._group, rows, vector)
        except RuntimeError as error:
            if "No backend type" in str(error):
                raise ValueError(
                    f"the group of the layer has no engine for tensors on {vector.device}: make it with one, "
                    "torch.distributed.init_process_group('cpu:gloo,cuda:nccl')."
                ) from error
            reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
            raise TimeoutError(f"{self._missing()}: {reason}. {_EQUALLY_OFTEN}") from error
        return rows.view(self.size, -1)

    def _missing(self) -> str:
        """Return which processes do not wait as this one does, which has waited in vain for them.

        Each process that has waited says so in the store of the group, and looks who else has.
        """
        names = {rank: f"mbn/waiting/{rank}" for rank in range(self.size)}
        try:
            store = self._group.get_group_store()
            store.set(names[self.rank], "")
            deadline = time.monotonic() + _GRACE
            while names and time.monotonic() < deadline:
                names = {rank: name for rank, name in names.items() if not store.check([name])}
                time.sleep(_PAUSE)
        except RuntimeError:  # the process that keeps the store is gone
            return "another process is gone"
        if not names:
            return "the processes missed each other"
        return f"rank{'s' * (len(names) > 1)} {', '.join(map(str, names))} did not come"


class Differentiable:
    """Replicas in other processes, with derivatives of every order through their exchange, compiled or not.

    The gradient of a value goes back to the replica that sent it, and is that of the sum of all replicas' losses. The
    exchange is an operator of Torch, which finds the group at run time by a key.
    """

    def __init__(self, key: str, size: int, exchange: Any = None) -> None:
        """Note the key in ``LIVE`` and the number of replicas; ``exchange`` is None where a compiler traces."""
        self._key, self._size, self._exchange = key, size, exchange
        self._needs = Needs.NOTHING if exchange is None else exchange.needs
        self._anchor: torch.Tensor | None = None
        self._all_needs: torch.Tensor | None = None
        self._is_empty = False

    @classmethod
    def of(cls, replicas: Any) -> "Differentiable | None":
        """Return replicas, or an exchange that autograd cannot see, with derivatives."""
        if replicas is None or isinstance(replicas, cls):
            return replicas
        return cls(replicas.key, replicas.group.size, replicas)

    @property
    def waits(self) -> bool:
        """Whether any replica needs the sums of the backward pass; the operator finds that out in compiled code."""
        return self._exchange is None or bool(self._exchange.waits)

    def expect(self, needs: Needs, anchor: torch.Tensor | None = None) -> None:
        """Note the part of this replica in the backward pass, and a tensor whose gradient leads there."""
        self._needs, self._anchor = max(self._needs, needs), anchor

    def without_values(self) -> None:
        """Note that this replica has an empty batch."""
        self._is_empty = True

    def sample_weights(self, kernels: Kernels, *arguments: Any) -> torch.Tensor:
        """Return the weights of the values of this replica; a traced weight has no size to check."""
        weights: torch.Tensor = kernels.sample_weights(*arguments)
        return weights

    def pulling(self) -> AbstractContextManager[Any]:
        """Return a context in which an error reaches all replicas, except in compiled code."""
        context: AbstractContextManager[Any] = nullcontext() if self._exchange is None else self._exchange.pulling()
        return context

    def moments(self, kernels: Kernels, moments: Moments, dtype: str) -> Sequence[Moments]:
        """Return the statistics of the batches of all replicas, differentiable by the inputs of each."""
        count, vectors = moments.count, kernels.to_vectors(moments, dtype)
        weight = count if isinstance(count, torch.Tensor) and not self._is_empty else None
        known = 0 if self._is_empty else -1 if weight is not None else count
        rows = _chosen(gather_moments, _GatherMoments)(
            torch.cat(vectors), self._anchor, weight, known, len(vectors), dtype, self._needs, self._key, self._size
        )
        self._all_needs = rows[:, 0].detach()
        return [kernels.from_vectors(row[1].detach(), row[2:].chunk(len(vectors))) for row in rows.unbind()]

    def sums(self, sums: tuple[torch.Tensor, ...]) -> Sequence[tuple[torch.Tensor, ...]]:
        """Return the sums of all replicas, differentiable by those of each."""
        rows = _chosen(spread, _Spread)(torch.cat(sums), self._all_needs, self._key, self._size)
        return [row.chunk(len(sums)) for row in rows.unbind()]


# The operators. Their derivatives consist of themselves: a derivative of ``gather_moments`` and ``spread`` is
# ``collect``, and one of ``collect`` is ``spread``.


@torch.library.custom_op("mbn::gather_moments", mutates_args=())
def gather_moments(
    vector: torch.Tensor,
    anchor: torch.Tensor | None,
    weight: torch.Tensor | None,
    values: int,
    fields: int,
    dtype: str,
    needs: int,
    key: str,
    size: int,
) -> torch.Tensor:
    """Return a row for each replica: its needs, its number of values or their weight, and its vector, (size, 2 + K)."""
    exchange = _resumed(key)
    if exchange is None:
        own = [
            vector.new_tensor([needs, values]) if weight is None else torch.stack([vector.new_tensor(needs), weight])
        ]
        return torch.cat([*own, vector])[None]
    exchange.trace()
    exchange.expect(Needs(needs))
    counts, rows = exchange.gather(values if weight is None else weight, vector.chunk(fields), dtype)
    if None not in counts:
        check_total(sum(counts))
    result = torch.cat([rows.new_tensor(exchange.all_needs)[:, None], rows], 1)
    if 0 in counts and any(counts):  # a mean of 0 would cost the others' mean its low part
        channels = len(vector) // fields
        present = next(i for i, count in enumerate(counts) if count != 0)
        for i, count in enumerate(counts):
            if count == 0:
                result[i, 2:] = rows[present, 1:]
                result[i, 2 + 2 * channels : 2 + 3 * channels] = 0  # m2
    return result


@torch.library.custom_op("mbn::collect", mutates_args=())
def collect(
    gradients: torch.Tensor, needs: torch.Tensor | None, anchor: torch.Tensor | None, key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the rows for this replica of all replicas' (size, K), (K,); and zeros like the anchor."""
    zeros = gradients.new_zeros(0) if anchor is None else torch.zeros_like(anchor)
    exchange = _resumed(key)
    if exchange is None:
        return gradients[0].clone(), zeros
    if needs is not None and bool((needs == Needs.SUMS).all()):  # nobody needs a gradient of x
        return torch.zeros_like(gradients[0]), zeros
    rows = exchange.exchanged(gradients.reshape(-1), needs)
    return rows.view(len(rows), *gradients.shape)[:, exchange.group.rank].sum(0), zeros


@torch.library.custom_op("mbn::spread", mutates_args=())
def spread(vector: torch.Tensor, needs: torch.Tensor | None, key: str, size: int) -> torch.Tensor:
    """Return a row for the vector of each replica, (size, K)."""
    exchange = _resumed(key)
    return vector[None].clone() if exchange is None else exchange.exchanged(vector, needs).clone()


def _resumed(key: str) -> Any:
    return LIVE[key].resumed(_backends[0])


_backends: list[Any] = []


def operate_by(backend: Any) -> None:
    """Let the operators use this backend."""
    _backends[:] = [backend]


@assumed_constant
def number_of_replicas(key: str) -> int:
    """Return the number of replicas of a layer, by the key of its membership."""
    exchange = _resumed(key)
    return 1 if exchange is None else exchange.group.size


@gather_moments.register_fake
def _(
    vector: torch.Tensor,
    anchor: Any,
    weight: Any,
    values: int,
    fields: int,
    dtype: str,
    needs: int,
    key: str,
    size: int,
) -> torch.Tensor:
    return vector.new_empty(size, 2 + vector.shape[0])


@collect.register_fake
def _(gradients: torch.Tensor, needs: Any, anchor: torch.Tensor | None, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    return gradients.new_empty(gradients.shape[1]), gradients.new_empty(0) if anchor is None else torch.empty_like(
        anchor
    )


@spread.register_fake
def _(vector: torch.Tensor, needs: Any, key: str, size: int) -> torch.Tensor:
    return vector.new_empty(size, vector.shape[0])


# Derivatives: for compilers those of the operators; else those of functions, which torch.func transforms too.


def _chosen(operator: Any, function: type[Function]) -> Any:
    return operator if torch.compiler.is_compiling() else function.apply


class _GatherMoments(Function):
    """The operator ``gather_moments``."""

    forward = staticmethod(gather_moments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *_, ctx.key, ctx.size = inputs
        ctx.live = LIVE.get(ctx.key)  # an exchange lives as long as this graph
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[Any, ...]:
        rows, anchor = ctx.saved_tensors
        own, zeros = _chosen(collect, _Collect)(gradients[:, 2:], rows[:, 0], anchor, ctx.key)
        return own, None if anchor is None else zeros, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        rows = _Spread.apply(tangent, None, ctx.key, ctx.size)
        return torch.cat([torch.zeros_like(rows[:, :1]).expand(-1, 2), rows], 1)


class _Collect(Function):
    """The operator ``collect``."""

    forward = staticmethod(collect)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gradients, _, _, ctx.key = inputs
        ctx.size, ctx.live = gradients.shape[0], LIVE.get(ctx.key)

    @staticmethod
    def backward(ctx: Any, own: torch.Tensor, _: Any) -> tuple[Any, ...]:
        return _chosen(spread, _Spread)(own, None, ctx.key, ctx.size), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        own, zeros = _Collect.apply(tangent, None, None, ctx.key)
        return own, zeros


class _Spread(Function):
    """The operator ``spread``."""

    forward = staticmethod(spread)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *_, ctx.key, ctx.size = inputs
        ctx.live = LIVE.get(ctx.key)

    @staticmethod
    def backward(ctx: Any, rows: torch.Tensor) -> tuple[Any, ...]:
        return _chosen(collect, _Collect)(rows, None, None, ctx.key)[0], None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        rows: torch.Tensor = _Spread.apply(tangent, None, ctx.key, ctx.size)
        return rows


for _operator, _function in ((gather_moments, _GatherMoments), (collect, _Collect), (spread, _Spread)):
    _operator.register_autograd(_function.backward, setup_context=_function.setup_context)
