"""The two forms of a pass over x that sums: which one is for a platform to say, where it is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mbn_jax import channels, runs


class Form(NamedTuple):
    """How values of channels are summed."""

    view: Callable[[Any], Any]
    """From an (N, C) or (N, C, L), or None, to what is summed."""
    place: Callable[[jax.Array, int], jax.Array]
    """From a (C,) vector to what broadcasts against a view of an x of so many axes."""
    sums: Callable[..., list[jax.Array]]
    """From views, float64, to their sums, (C,) each."""


HOST = Form(channels.rows, lambda vector, ndim: vector, channels.channel_sums)  # noqa: ARG005
GPU = Form(lambda x: x, channels.column, runs.channel_sums)
