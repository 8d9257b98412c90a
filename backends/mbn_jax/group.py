"""The replicas of a layer along a named axis of ``vmap``, ``pmap`` or ``shard_map``."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mbn.contract import Kernels, Moments, Needs
from mbn_jax.kernels.pairs import as_pair


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

    def sample_weights(
        self,
        kernels: Kernels,
        shape: tuple[int, ...],
        dtype: str,
        mask: jax.Array | None,
        lengths: jax.Array | None,
        sample_weight: jax.Array | None,
    ) -> jax.Array:
        """Return the weights of the values of this replica, scaled by the largest weight of all replicas."""
        self._size()  # it raises if the axis is not bound
        own: Any = kernels
        weights: jax.Array = own.of(self).sample_weights(shape, dtype, mask, lengths, sample_weight)
        return weights

    def pulling(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: an error ends the trace, which is the same for all replicas."""
        return nullcontext()

    def moments(self, kernels: Kernels, moments: Moments, dtype: str) -> Sequence[Moments]:
        """Return the statistics of the batches of all replicas, already merged, in the order of the replicas.

        They are merged in a loop of the compiled program: XLA takes half a second for each merge that it compiles.

        Raises:
            ValueError: the axis is not bound.
        """
        count = moments.count
        if is_known := isinstance(count, int):  # it is the same on all replicas, as the shapes are
            moments = moments._replace(count=as_pair(float(count), moments.mean.unit.dtype))
        leaves, tree = jax.tree.flatten(moments)
        parts = jax.tree.unflatten(tree, self._gathered(leaves))
        first, others = (jax.tree.map(lambda rows, part=part: rows[part], parts) for part in (0, slice(1, None)))
        total, _ = lax.scan(lambda total, other: (kernels.merge(total, other), None), first, others)
        return [total._replace(count=count * self._size()) if is_known else total]

    def sums(self, sums: tuple[jax.Array, ...]) -> Sequence[tuple[jax.Array, ...]]:
        """Return the sums over all replicas."""
        return [tuple(rows.sum(0) for rows in self._gathered(sums))]

    def _gathered(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the values of all replicas, each in the rows of one array, by one exchange."""
        vector = jnp.concatenate([value.reshape(-1) for value in values])
        # A sum of rows that are 0 except for a replica's own is a gather. JAX knows of a sum, unlike an all_gather,
        # that it is the same on all devices of a shard_map, so it accepts the new state as replicated.
        rows = jnp.zeros((self._size(), *vector.shape), vector.dtype)
        rows = lax.psum(lax.dynamic_update_index_in_dim(rows, vector, lax.axis_index(self.name), 0), self.name)
        parts, start = [], 0
        for value in values:
            parts.append(rows[:, start : start + value.size].reshape(-1, *value.shape))
            start += value.size
        return parts

    def _size(self) -> int:
        """Return the number of replicas."""
        for name in self.names:
            try:
                lax.psum(1, name)
            except NameError as error:
                raise ValueError(
                    f"the replicas of the layer are along the axis {name!r}, and this call is outside of it: train "
                    f"within jax.shard_map, jax.pmap or jax.vmap(axis_name={name!r}), or set bn.group = None. Under "
                    "jit alone the statistics of a sharded batch are global without a group."
                ) from error
        return lax.psum(1, self.name)
