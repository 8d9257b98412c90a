"""The two layouts of a sum over x, of which a pass uses the one of the platform that it is compiled for.

::

             view of x                    a vector of channels    sums
    CPU      (N, C), or (N * L, C)        (C,)                    ``channel_sums``: a tree over the first axis
    GPU      (N, C), or (N, C, L)         (C,), or (C, 1)         ``gpu_sums``: a tree over N, and one over L

On several devices, x is cut into blocks along N and along L; the number of blocks along each axis is the greatest
common divisor of its extent and the number of devices::

    x, (N, C, L), on 4 devices            +------+------+------+------+
    N = 6: gcd(6, 4) = 2 blocks     n0-n2 |  0,0 |  0,1 |  0,2 |  0,3 |   each of n = 3 samples by l = 2 positions,
    L = 8: gcd(8, 4) = 4 blocks     n3-n5 |  1,0 |  1,1 |  1,2 |  1,3 |   (2, 4, n, C, l) in all, each viewed by itself
                                          +------+------+------+------+

In every sharding of x along N and L, each block lies on one device. That device sums up the block and sends only the
sums, one number per channel: a reshape across devices would make XLA fetch all of x, or the sums of its chunks. The
sums of the blocks are added in pairs, whose order hardly matters.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from mbn_jax.kernels import channel_sums, gpu_sums

_DEVICES = ContextVar("devices", default=1)


@contextmanager
def over(devices: int) -> Iterator[None]:
    """Trace the body for a number of devices, over which XLA distributes the computation."""
    token = _DEVICES.set(devices)
    try:
        yield
    finally:
        _DEVICES.reset(token)


def is_sharded() -> bool:
    """Tell whether the current trace is for several devices."""
    return _DEVICES.get() > 1


@jax.tree_util.register_static
@dataclass(frozen=True)
class Order:
    """The order in which the memory of an (N, C, L) has its axes, an argument that compiled functions are made for.

    XLA chooses it for its own operations, but code that it calls has to be told.
    """

    has_channels_last: bool
    """Whether the axes are (N, L, C) in memory; else they are as given."""


class Layout(NamedTuple):
    """The view of x under which the values of channels are summed, and its functions."""

    view: Callable[[Any], Any]
    """A function from an (N, C) or (N, C, L) array, or None, to its view, whose first two axes are blocks, if any."""
    broadcast: Callable[[jax.Array, int], jax.Array]
    """A function from a (C,) vector and the number of axes of x to an array that broadcasts against the view of x."""
    sums: Callable[..., list[jax.Array]]
    """A function from views in float64, of one shape, to their sums, (C,) each; its option is ``careful``."""


def _layout(
    view: Callable[[Any], Any], broadcast: Callable[[jax.Array, int], jax.Array], sums: Callable[..., Any]
) -> Layout:
    """Return a layout from the functions for one block; its own functions also work on several blocks."""

    def view_of_blocks(x: jax.Array | None) -> jax.Array | None:
        return jax.vmap(jax.vmap(view))(_blocks(x)) if is_sharded() and x is not None else view(x)

    def sums_of_blocks(*terms: jax.Array, **options: Any) -> list[jax.Array]:
        if not is_sharded():
            return sums(*terms, **options)
        parts = jax.vmap(jax.vmap(lambda *block: sums(*block, **options)))(*terms)
        return channel_sums.careful_sums([part.reshape(-1, part.shape[-1]) for part in parts], (0,))

    return Layout(view_of_blocks, broadcast, sums_of_blocks)


def _blocks(x: jax.Array) -> jax.Array:
    """Return x, (N, C[, L]), as A blocks along N by B blocks along L: (A, B, n, C[, l]).

    An axis of unknown size is one block.
    """
    n, c, *length = x.shape
    count, *along = (math.gcd(size, _DEVICES.get()) if channel_sums.is_known(size) else 1 for size in (n, *length))
    if not length:
        return x.reshape(count, 1, n // count, c)
    x = x.reshape(count, n // count, c, along[0], length[0] // along[0])
    return x.transpose(0, 3, 1, 2, 4)


CPU = _layout(channel_sums.rows, lambda vector, ndim: vector, channel_sums.channel_sums)
GPU = _layout(lambda x: x, channel_sums.column, gpu_sums.channel_sums)
