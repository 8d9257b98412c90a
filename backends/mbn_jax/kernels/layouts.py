"""The two forms of a pass over x that sums: which one is for a platform to say, where it is compiled.

Over more devices than one, x is in blocks along N and along L, at least one for each device that may hold a part. Each
is summed where it lies, and only their sums, of one number per channel, are to leave their device: XLA would fetch all
of x, or of the sums of its runs, for a reshape that does not keep what a device holds together.
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
    """Trace for so many devices, over which XLA spreads what is computed."""
    token = _DEVICES.set(devices)
    try:
        yield
    finally:
        _DEVICES.reset(token)


def is_sharded() -> bool:
    """Tell whether this is traced for more devices than one."""
    return _DEVICES.get() > 1


class Layout(NamedTuple):
    """How values of channels are summed."""

    view: Callable[[Any], Any]
    """From an (N, C) or (N, C, L), or None, to what is summed."""
    broadcast: Callable[[jax.Array, int], jax.Array]
    """From a (C,) vector to what broadcasts against a view of an x of so many axes."""
    sums: Callable[..., list[jax.Array]]
    """From views, float64, to their sums, (C,) each."""


def _layout(
    view: Callable[[Any], Any],
    broadcast: Callable[[jax.Array, int], jax.Array],
    sums: Callable[..., Any],
) -> Layout:
    """Return a layout from how it is with one block."""

    def view_of_blocks(x: jax.Array | None) -> jax.Array | None:
        return jax.vmap(jax.vmap(view))(_blocks(x)) if is_sharded() and x is not None else view(x)

    def sums_of_blocks(*terms: jax.Array, **options: Any) -> list[jax.Array]:
        if not is_sharded():
            return sums(*terms, **options)
        parts = jax.vmap(jax.vmap(lambda *block: sums(*block, **options)))(*terms)
        return channel_sums.careful_sums([part.reshape(-1, part.shape[-1]) for part in parts], (0,))

    return Layout(view_of_blocks, broadcast, sums_of_blocks)


def _blocks(x: jax.Array) -> jax.Array:
    """Return x with two axes more in front, of its blocks along N and along L: no device has a part of two of them."""
    n, c, *length = x.shape
    count, *along = (math.gcd(size, _DEVICES.get()) if channel_sums.is_known(size) else 1 for size in (n, *length))
    if not length:
        return x.reshape(count, 1, n // count, c)
    x = x.reshape(count, n // count, c, along[0], length[0] // along[0])
    return x.transpose(0, 3, 1, 2, 4)


CPU = _layout(channel_sums.rows, lambda vector, ndim: vector, channel_sums.channel_sums)
GPU = _layout(lambda x: x, channel_sums.column, gpu_sums.channel_sums)
