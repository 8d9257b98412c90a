"""A group of replicas along a named axis of ``vmap``, ``pmap`` or ``shard_map``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


@jax.tree_util.register_static
@dataclass(frozen=True)
class AxisGroup:
    """The replicas along a named axis."""

    name: Any
    """The name of the axis, or a tuple of names of axes."""

    @property
    def names(self) -> tuple[Any, ...]:
        """The names of all axes of the group."""
        return self.name if isinstance(self.name, tuple) else (self.name,)

    @property
    def rank(self) -> jax.Array:
        """The index of this replica."""
        return lax.axis_index(self.name)

    def gather(self, values: T) -> Sequence[T]:
        """Return the values of all replicas. Python numbers are equal on all, since the arrays have the same shapes."""
        stacks = jax.tree.map(partial(_stacked, name=self.name), values)
        return [
            jax.tree.map(lambda stack, i=i: stack[i] if isinstance(stack, jax.Array) else stack, stacks)
            for i in range(lax.psum(1, self.name))
        ]


def _stacked(value: Any, name: Any) -> Any:
    return lax.all_gather(value, name) if isinstance(value, jax.Array) else value
