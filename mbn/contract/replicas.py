"""The exchange between replicas of a layer, which share the statistics of their batches.

Every sum over values on which a statistic or a derivative depends passes through :func:`merged` or :func:`summed`. Both
return it unchanged without a group.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Protocol, TypeVar

from mbn.contract.kernels import Kernels
from mbn.contract.values import Array, Moments

T = TypeVar("T")


class Group(Protocol):
    """Replicas that compute the same step, each on a batch of its own."""

    @property
    def rank(self) -> Any:
        """The number of this replica, an integer from 0."""

    def gather(self, values: T) -> Sequence[T]:
        """Return the values of all replicas, in the order of their ranks. Each replica has to call it.

        ``values`` are arrays and numbers in tuples of any depth. The values of other replicas are on the device of this
        one's. Derivatives, if the framework has them, reach the replica that the values come from.
        """
        ...


def merged(kernels: Kernels, moments: Moments, group: Group | None) -> Moments:
    """Return the statistics of the batches of all replicas together, the same bits on each.

    Raises:
        ValueError: these batches hold one value per channel, which has no variance. All replicas raise it.
    """
    if group is None:
        return moments
    total = reduce(kernels.merge, group.gather(moments))
    if isinstance(total.count, int) and total.count == 1:
        raise ValueError(
            "the batches of all replicas hold one value per channel, which has no variance to train on. Give more "
            "values, or normalise by the running statistics: eval(), freeze() or training=False."
        )
    return total


def summed(sums: tuple[Array, ...], group: Group | None) -> Any:
    """Return each sum over the values of all replicas, added up in the order of their ranks."""
    if group is None:
        return sums
    return tuple(reduce(add, parts) for parts in zip(*group.gather(sums), strict=True))
