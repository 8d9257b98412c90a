"""Batches without a value.

Kernels never see one. Without a group there is nothing to do for it; with one, a batch of the same channels whose only
value does not count takes part in its place, so that no other replica waits.
"""

import numpy as np

from mbn.contract import Array, Backend, Batch, dtype_name
from mbn.state import Settings


def stand_in(backend: Backend, x: Array, settings: Settings) -> Batch:
    """Return a batch of one value of weight 0 in each channel, for an empty x, (N, C) or (N, C, L)."""
    device = backend.device(x)
    shape = 1, x.shape[1], *[1] * (x.ndim - 2)
    values = backend.asarray(np.zeros(shape), dtype_name(x.dtype), device)
    weight = backend.asarray(np.zeros(shape[:1] + shape[2:]), settings.dtype, device)
    return Batch(values, weight, settings.dtype)


def emptied(y: Array, x: Array) -> Array:
    """Return an empty array in the shape of x that differentiation leads from to y, in the shape of a stand-in."""
    return x + (y[..., :0] if x.shape[-1] == 0 else y[:0, ...])
