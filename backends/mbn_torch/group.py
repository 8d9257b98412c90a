"""A group of replicas through which autograd differentiates."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.autograd import Function

from mbn.contract import Group
from mbn_torch.private import tree_flatten, tree_unflatten

T = TypeVar("T")


class Differentiable:
    """A group whose gather is differentiable.

    The gradient of a value goes back to the replica that sent it, and is that of the sum of all replicas' losses.
    """

    def __init__(self, group: Group) -> None:
        """Wrap a group whose ``gather`` autograd cannot see."""
        self._group, self.rank = group, group.rank

    def gather(self, values: T) -> Sequence[T]:
        """Return the values of all replicas, differentiable by the inputs of each."""
        leaves, tree = tree_flatten(values)
        gathered = _Gather.apply(self._group, *leaves)
        return [
            tree_unflatten(gathered[start : start + len(leaves)], tree)
            for start in range(0, len(gathered), len(leaves))
        ]


class _Gather(Function):
    """Gather the leaves, tensors and numbers, of all replicas, in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, group: Group, *part: Any) -> tuple[Any, ...]:
        ctx.group = group
        values = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in part)
        # Clone, since autograd marks the tensors returned here as outputs, and the group may have given them to others.
        return tuple(
            value.clone() if isinstance(value, torch.Tensor) else value for value in chain(*group.gather(values))
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # The gradient of this replica's part is the sum of those that all replicas have for it.
        size = len(ctx.needs_input_grad) - 1
        is_needed = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        own = [gradients[start + index] for start in range(0, len(gradients), size) for index in is_needed]
        rank = ctx.group.rank
        parts = Differentiable(ctx.group).gather(tuple(own))
        count = len(is_needed)
        found = [sum(part[rank * count + i] for part in parts) for i in range(count)]
        result: list[torch.Tensor | None] = [None] * size
        for index, gradient in zip(is_needed, found, strict=True):
            result[index] = gradient
        return None, *result
