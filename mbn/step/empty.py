"""Batches without a value.

Kernels never see one. Where replicas share their statistics, a batch with one value of weight 0 in each channel takes
part instead, so that no other replica waits.
"""

from mbn.contract import Array, Backend, Batch, Settings, dtype_name, transposed


def stand_in(backend: Backend, x: Array, settings: Settings) -> Batch:
    """Return a batch of one value of weight 0 in each channel, for an empty x."""
    device = backend.device(x)
    value = 0.0 if x.ndim == 2 else [0.0]  # lists, since torch.compile cannot follow NumPy's arrays
    values = backend.asarray([[value] * (settings.num_features or 0)], dtype_name(x.dtype), device)
    return Batch(values, backend.asarray([value], settings.dtype, device), settings.dtype)


def emptied(y: Array, x: Array, settings: Settings) -> Array:
    """Return an empty array in the shape of x, connected to y, the output of a stand-in, for differentiation."""
    y = transposed(y) if settings.has_channels_last(x.ndim) else y
    return x + (y[:0, ...] if x.shape[0] == 0 else y[..., :0] if settings.axis == 1 else y[:, :0, ...])
