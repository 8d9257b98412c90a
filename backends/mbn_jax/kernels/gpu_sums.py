"""Sums per channel in the layout for GPUs: arrays are read once, where they lie.

XLA computes there what a reduction reads as part of it only if few values are reduced at a time; of float64 it else
writes it all to memory first. So there are chunks of few values, along the first axis, which comes first in memory
whatever the order of the others. As on the CPU the order of additions is that of a tree, the same on every run.
"""

import jax
import numpy as np
from jax import lax

from mbn_jax.kernels.channel_sums import careful_sums, in_pairs, is_known, of_pairs, sums

CHUNK = 31
"""Values that are reduced at a time: from 32 on XLA has another way."""


def channel_sums(*terms: jax.Array, careful: bool = False) -> list[jax.Array]:
    """Return the sums over all axes but the channels' of terms of one shape, float64 and (N, C) or (N, C, L)."""
    sizes = {axis: size for axis, size in enumerate(terms[0].shape) if axis != 1}
    if not all(map(is_known, sizes.values())):
        return careful_sums(terms, tuple(sizes))
    parts = in_pairs(terms) if careful else list(terms)
    # Where the first axis has no whole chunk the other one comes first, to leave less for the next level.
    for axis in sorted(sizes, reverse=sizes[0] < min(CHUNK, sizes.get(2, 0))):
        while parts[0].shape[axis] > 1:
            parts = sums([_in_chunks(part, axis) for part in parts], axis + 1, careful=careful)
    parts = [part.reshape(-1) for part in parts]
    return of_pairs(parts) if careful else parts


def _in_chunks(x: jax.Array, axis: int) -> jax.Array:
    """Return x with an axis as two, of chunks and of their values; zeros fill up the last chunk."""
    chunk = min(CHUNK, x.shape[axis])
    missing = -x.shape[axis] % chunk
    if missing:
        x = lax.pad(x, np.zeros((), x.dtype), [(0, missing if i == axis else 0, 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
