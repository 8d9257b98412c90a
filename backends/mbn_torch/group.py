"""The processes of ``torch.distributed`` as a group, and an exchange through which autograd differentiates."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

from mbn.contract import Group, Kernels, Moments, Needs

_GRACE, _PAUSE = 2.0, 0.02
"""Seconds in which other processes say that they have waited too, and between two looks."""

Gather = Callable[[torch.Tensor], torch.Tensor]


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
        return dist.get_rank(self._group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group)

    def gather(self, vector: torch.Tensor) -> torch.Tensor:
        rows = vector.new_empty(self.size * vector.numel())
        try:
            dist.all_gather_into_tensor(rows, vector, group=self._group)
        except RuntimeError as error:
            raise TimeoutError(f"{self._missing()}: {str(error).splitlines()[0]}") from error
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
    """Replicas in other processes, with derivatives through their exchange.

    The gradient of a value goes back to the replica that sent it, and is that of the sum of all replicas' losses.
    """

    def __init__(self, exchange: Any) -> None:
        """Wrap an exchange that autograd cannot see."""
        self._exchange = exchange

    @property
    def waits(self) -> bool:
        """Whether any replica needs the sums of the backward pass."""
        return bool(self._exchange.waits)

    def expect(self, needs: Needs) -> None:
        """Note the part of this replica in the backward pass."""
        self._exchange.expect(needs)

    def without_values(self) -> None:
        """Note that this replica has an empty batch."""
        self._exchange.without_values()

    def pulling(self) -> AbstractContextManager[Any]:
        """Return a context in which an error reaches all replicas."""
        context: AbstractContextManager[Any] = self._exchange.pulling()
        return context

    def moments(self, kernels: Kernels, moments: Moments, dtype: str) -> Sequence[Moments]:
        """Return the statistics of the batches of all replicas, differentiable by the inputs of each."""
        count, vectors = moments.count, kernels.to_vectors(moments, dtype)
        counts: list[Any] = []

        def gather(vector: torch.Tensor) -> torch.Tensor:
            found, rows = self._exchange.gather(count, vector.chunk(len(vectors)), dtype)
            counts.extend(rows[i, 0] if known is None else known for i, known in enumerate(found))
            values: torch.Tensor = rows[:, 1:]
            return values

        rows = _Gather.apply(torch.cat(vectors), gather, self._exchange.group)
        return [kernels.from_vectors(n, row.chunk(len(vectors))) for n, row in zip(counts, rows, strict=True)]

    def sums(self, sums: tuple[torch.Tensor, ...]) -> Sequence[tuple[torch.Tensor, ...]]:
        """Return the sums of all replicas, differentiable by those of each."""
        rows = _Gather.apply(
            torch.cat(sums), lambda vector: self._exchange.gathered_sums((vector,)), self._exchange.group
        )
        return [row.chunk(len(sums)) for row in rows]


class _Gather(Function):
    """The vectors of all replicas, in rows."""

    @staticmethod
    def forward(ctx: Any, vector: torch.Tensor, gather: Gather, group: Group) -> torch.Tensor:
        ctx.group = group
        return gather(vector.detach()).clone()  # rows may be views, which autograd would not take for outputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The gradient of this replica's vector is the sum of those that all replicas have for it.
        group = ctx.group
        rows = _Gather.apply(gradient.reshape(-1), group.gather, group)
        return rows.view(group.size, *gradient.shape)[:, group.rank].sum(0), None, None
