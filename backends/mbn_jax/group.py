"""The replicas of a layer along a named axis of ``vmap``, ``pmap`` or ``shard_map``."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax

from mbn.contract import Kernels, Moments, Needs

T = TypeVar("T")


@jax.tree_util.register_static
@dataclass(frozen=True)
class AxisGroup:
    """The replicas along a named axis."""

    name: Any
    """The name of the axis, or a tuple of names of axes."""

    waits = True
    """All replicas execute the same program, and exchange the sums of each backward pass in it."""

    @property
    def names(self) -> tuple[Any, ...]:
        """The names of all axes of the group."""
        return self.name if isinstance(self.name, tuple) else (self.name,)

    def expect(self, needs: Needs) -> None:
        """Do nothing, since all replicas need the same."""

    def without_values(self) -> None:
        """Do nothing, since all shards of an array are of one size."""

    def pulling(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: an error ends the trace, which is the same for all replicas."""
        return nullcontext()

    def moments(self, kernels: Kernels, moments: Moments, dtype: str) -> Sequence[Moments]:
        """Return the statistics of the batches of all replicas."""
        return self._gather(moments)

    def sums(self, sums: tuple[jax.Array, ...]) -> Sequence[tuple[jax.Array, ...]]:
        """Return the sums of all replicas."""
        return self._gather(sums)

    def _gather(self, values: T) -> Sequence[T]:
        """Return the values of all replicas. Python numbers are equal on all, since the arrays have the same shapes."""
        stacks = jax.tree.map(partial(_stacked, name=self.name), values)
        return [
            jax.tree.map(lambda stack, i=i: stack[i] if isinstance(stack, jax.Array) else stack, stacks)
            for i in range(lax.psum(1, self.name))
        ]


def _stacked(value: Any, name: Any) -> Any:
    return lax.all_gather(value, name) if isinstance(value, jax.Array) else value
