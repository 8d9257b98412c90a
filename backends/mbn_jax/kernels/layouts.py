"""The two layouts of a pass over x that sums up; the platform that it is compiled for has one of them.

::

             view of an x                 a vector of channels    sums
    CPU      (N, C), or (N * L, C)        (C,)                    ``channel_sums``: a tree over the first axis
    GPU      (N, C), or (N, C, L)         (C,), or (C, 1)         ``gpu_sums``: a tree over N, and one over L

On more devices than one, x is cut into blocks along N and along L, as many along each as divide both its extent and the
number of devices::

    x, (N, C, L), on 4 devices            +------+------+------+------+
    N = 6: gcd(6, 4) = 2 blocks     n0-n2 |  0,0 |  0,1 |  0,2 |  0,3 |   each of n = 3 samples by l = 2 positions,
    L = 8: gcd(8, 4) = 4 blocks     n3-n5 |  1,0 |  1,1 |  1,2 |  1,3 |   (2, 4, n, C, l) in all, each viewed by itself
                                          +------+------+------+------+

However the devices share out x along N and L, a block lies on one of them. Each block is summed up there, and its sums,
one number per channel, are all that leaves the device: XLA would fetch all of x, or the sums of its chunks, for a
reshape that mixes what several devices hold. The sums of the blocks are added up in pairs, whose order hardly matters.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from mbn_jax.kernels import channel_sums, gpu_sums

_DEVICES = ContextVar("devices", default=1)


@contextmanager
def over(devices: int) -> Iterator[None]:
    """Trace for so many devices, over which XLA spreads the computation."""
    token = _DEVICES.set(devices)
    try:
        yield
    finally:
        _DEVICES.reset(token)


def is_sharded() -> bool:
    """Tell whether this is traced for more devices than one."""
    return _DEVICES.get() > 1


class Layout(NamedTuple):
    """The axes under which the values of channels are summed up."""

    view: Callable[[Any], Any]
    """A function from an (N, C) or (N, C, L) to its view, with two axes of blocks in front, if any; None stays None."""
    broadcast: Callable[[jax.Array, int], jax.Array]
    """A function from a (C,) vector and the number of axes of x to an array that broadcasts against the view of x."""
    sums: Callable[..., list[jax.Array]]
    """A function from views in float64, of one shape, to their sums, (C,) each; it takes ``careful``."""


def _layout(
    view: Callable[[Any], Any], broadcast: Callable[[jax.Array, int], jax.Array], sums: Callable[..., Any]
) -> Layout:
    """Return a layout, for blocks too, from the functions for one block."""

    def view_of_blocks(x: jax.Array | None) -> jax.Array | None:
        return jax.vmap(jax.vmap(view))(_blocks(x)) if is_sharded() and x is not None else view(x)

    def sums_of_blocks(*terms: jax.Array, **options: Any) -> list[jax.Array]:
        if not is_sharded():
            return sums(*terms, **options)
        parts = jax.vmap(jax.vmap(lambda *block: sums(*block, **options)))(*terms)
        return channel_sums.careful_sums([part.reshape(-1, part.shape[-1]) for part in parts], (0,))

    return Layout(view_of_blocks, broadcast, sums_of_blocks)


def _blocks(x: jax.Array) -> jax.Array:
    """Return x, (N, C[, L]), with two more axes in front, of its blocks along N and along L: (A, B, n, C[, l]).

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
