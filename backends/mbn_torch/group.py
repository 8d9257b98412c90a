"""Groups of replicas as autograd sees them."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.autograd import Function

from mbn.contract import Group
from mbn_torch.private import tree_flatten, tree_unflatten

T = TypeVar("T")


class Differentiable:
    """A group through which a gradient goes back to the replica that a value comes from: that of the sum of losses."""

    def __init__(self, group: Group) -> None:
        """Take a group that gathers values alone."""
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
    """The parts of all replicas, one after another; tensors and numbers."""

    @staticmethod
    def forward(ctx: Any, group: Group, *part: Any) -> tuple[Any, ...]:
        ctx.group = group
        values = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in part)
        # Each replica has tensors of its own, of which autograd may take others for outputs of its function.
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
        found = [sum(part[rank * count + place] for part in parts) for place in range(count)]
        result: list[torch.Tensor | None] = [None] * size
        for index, gradient in zip(is_needed, found, strict=True):
            result[index] = gradient
        return None, *result
