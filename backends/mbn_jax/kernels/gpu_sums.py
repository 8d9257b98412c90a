"""Sums over the values of each channel in the layout for GPUs: arrays are read once, and keep their axes.

One axis after another is reduced, in levels, to an extent of 1. A level cuts the axis into chunks of CHUNK values, pads
the last chunk with zeros, and reduces each chunk to its sum::

    (N, C, L), N = 70         n0 ... n30 | n31 ... n61 | n62 ... n69, 23 zeros
                                   |            |            |
    (3, C, L)                     s0           s1           s2
                                   |            |            |
    (1, C, L)                      +------------+------------+     then L in the same way, to (1, C, 1)

XLA fuses the computation of terms into a reduction only if the reduction is short; otherwise it would first write all
terms, in float64, to memory. So chunks are short, and the first axis, which is the outermost in most memory orders, is
reduced first. The additions form a tree, as on the CPU, whose order is the same at every call.
"""

import jax
import numpy as np
from jax import lax

from mbn_jax.kernels.channel_sums import careful_sums, in_pairs, is_known, of_pairs, sums

CHUNK = 31
"""Values that are reduced at a time: XLA compiles a reduction of 32 or more in another way."""


def channel_sums(*terms: jax.Array, careful: bool = False) -> list[jax.Array]:
    """Return the sums of each channel, (C,), of terms of one shape, (N, C) or (N, C, L) in float64.

    ``careful`` sums include the rounding errors of the additions.
    """
    sizes = {axis: size for axis, size in enumerate(terms[0].shape) if axis != 1}
    if not all(map(is_known, sizes.values())):
        return careful_sums(terms, tuple(sizes))
    parts = in_pairs(terms) if careful else list(terms)
    # The first level reads all terms, and should leave few sums to the next. So L is reduced first if N is less than a
    # chunk and less than L.
    for axis in sorted(sizes, reverse=sizes[0] < min(CHUNK, sizes.get(2, 0))):
        while parts[0].shape[axis] > 1:
            parts = sums([_in_chunks(part, axis) for part in parts], axis + 1, careful=careful)
    parts = [part.reshape(-1) for part in parts]
    return of_pairs(parts) if careful else parts


def _in_chunks(x: jax.Array, axis: int) -> jax.Array:
    """Return x with an axis split in two, chunks by the values of a chunk, at most CHUNK; zeros pad the last chunk."""
    chunk = min(CHUNK, x.shape[axis])
    missing = -x.shape[axis] % chunk
    if missing:
        x = lax.pad(x, np.zeros((), x.dtype), [(0, missing if i == axis else 0, 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
