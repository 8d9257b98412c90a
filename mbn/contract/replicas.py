"""The exchange between replicas of a layer, which share the statistics of their batches.

Every sum over values on which a statistic or a derivative depends passes through :func:`merged` or :func:`summed`. Both
return it unchanged without other replicas.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from functools import reduce
from operator import add
from typing import Any, Protocol
from weakref import WeakValueDictionary

from mbn.contract.kernels import Kernels
from mbn.contract.values import Array, Moments


class Needs(IntEnum):
    """The part that a replica will take in the backward pass."""

    NOTHING = 0
    """It records no gradients, so it will not take part."""
    SUMS = 1
    """It takes part, for the others."""
    GRADIENT = 2
    """It needs a gradient of x."""


LIVE: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""The exchanges, and the memberships of layers in groups, by their keys.

Compiled code contains a key, since it cannot contain a group. Each has ``resumed(backend)``, which returns an exchange
for this moment, or None where there is one replica alone.
"""


class Group(ABC):
    """Processes, devices or threads that compute the same steps, each on a batch of its own.

    A subclass connects a library for communication, which is called an engine here: ``bn.group = MyGroup(...)``.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of this process in the group, from 0."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of processes in the group."""

    @abstractmethod
    def gather(self, vector: Array) -> Array:
        """Return the vectors of all processes, one row for each, in the order of their ranks.

        Every process calls it equally often, with vectors of the same length, which nobody uses afterwards.

        Args:
            vector: (K,) in float64: a tensor on Torch, an array of CuPy on CuPy, else a NumPy array or one of the
                library.

        Returns:
            (size, K) in float64, on the device of ``vector``, the same bits on all ranks.

        Raises:
            TimeoutError: a process is missing. This error and any other ends the step; the layer does not change.
        """


class Replicas(Protocol):
    """The replicas of a layer in one step, as the composition of kernels sees them."""

    @property
    def waits(self) -> bool:
        """Whether any replica needs the sums of a backward pass, so that all have to exchange theirs."""

    def expect(self, needs: Needs) -> None:
        """Note the part of this replica in the backward pass, before the forward exchange."""

    def without_values(self) -> None:
        """Note that the batch of this replica is empty: the statistics that it exchanges are those of a stand-in."""

    def sample_weights(
        self,
        kernels: Kernels,
        shape: tuple[int, ...],
        dtype: str,
        mask: Array | None,
        lengths: Array | None,
        sample_weight: Array | None,
    ) -> Array:
        """Return the weights of the values of this replica, as ``kernels.sample_weights``, in units of all replicas.

        Raises:
            ValueError: weights are so large or small that each replica would scale them by a factor of its own.
        """

    def pulling(self) -> AbstractContextManager[Any]:
        """Return a context for the backward pass of this replica, in which an error reaches the others."""
        ...

    def moments(self, kernels: Kernels, moments: Moments, dtype: str) -> Sequence[Moments]:
        """Return the statistics of the batches of all replicas, of a layer in this dtype, in the order of ranks."""
        ...

    def sums(self, sums: tuple[Array, ...]) -> Sequence[tuple[Array, ...]]:
        """Return the sums of all replicas, each (C,), in the order of their ranks."""
        ...


def merged(kernels: Kernels, moments: Moments, dtype: str, replicas: Replicas | None) -> Moments:
    """Return the statistics of the batches of all replicas together, the same bits on each.

    ``dtype`` is that of the layer.

    Raises:
        ValueError: these batches hold one value per channel, which has no variance. All replicas raise it.
    """
    if replicas is None:
        return moments
    every = replicas.moments(kernels, moments, dtype)
    # A replica without a value has statistics of weight 0 and a whole number of values, which is judged as such.
    present = [found for found in every if not isinstance(found.count, int) or found.count]
    total = reduce(kernels.merge, present or [every[0]._replace(count=0.0)])
    check_total(total.count)
    return total


def check_total(count: Any) -> None:
    """Refuse a batch of one value per channel over all replicas; ``count`` may be a sum of sample weights.

    Raises:
        ValueError: see above.
    """
    if isinstance(count, int) and count == 1:
        raise ValueError(
            "the batches of all replicas hold one value per channel, which has no variance to train on. Give more "
            "values, or normalise by the running statistics: eval(), freeze() or training=False."
        )


def summed(sums: tuple[Array, ...], replicas: Replicas | None) -> Any:
    """Return each sum over the values of all replicas, added up in the order of their ranks."""
    if replicas is None:
        return sums
    return tuple(reduce(add, parts) for parts in zip(*replicas.sums(sums), strict=True))
