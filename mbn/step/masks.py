"""The conversion of masks, lengths and sample weights to one sample weight for each sample and position.

Backends get this weight alone. Wrong arguments are refused here, before anything is computed.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, Backend, Replicas, Settings
from mbn.convert import from_python, is_own


class Masking(NamedTuple):
    """The mask, lengths and sample weights of a call, each (N,) or (N, L)."""

    mask: Any
    """True where there is a value: bool, (N,) or (N, L); or None."""
    lengths: Any
    """How many values each sequence has, from its start: integers from 0 to L, (N,); or None."""
    sample_weight: Any
    """How often a value counts: real numbers of at least 0, (N,) or (N, L); or None."""

    @classmethod
    def of(cls, mask: Any, lengths: Any, sample_weight: Any) -> Self | None:
        """Return the arguments of a call, or None where it has none of them."""
        if mask is None and lengths is None and sample_weight is None:
            return None
        return cls(mask, lengths, sample_weight)

    def combined(self, backend: Backend, x: Array, settings: Settings, replicas: Replicas | None = None) -> Array:
        """Return the weights of the values of ``x``, an array of ``backend``: (N,) or (N, L) in the layer's dtype.

        Raises:
            TypeError: a wrong dtype, another framework's array, or a backend that takes no sample weights.
            ValueError: a wrong shape or device; a length beyond the sequence; a weight that is negative or not finite.
        """
        checks.masks(backend)
        shape = tuple(x.shape)
        shape_of_mask = shape[:-1] if settings.axis == -1 else shape[:1] + shape[2:]
        device = backend.device(x)

        def receive(name: str, values: Any, dtype: str | None, limit: float) -> Array | None:
            if values is None:
                return None
            if isinstance(values, str | bytes | Mapping):
                raise TypeError(checks.wrong_mask_dtype(name, type(values).__name__))
            if isinstance(values, registry.PYTHON_DATA):
                values = from_python(
                    name, values, f"from 0 to {limit - 1}, the length of x" if dtype == "int64" else ""
                )
            own = is_own(backend, name, values, device)
            owner = backend if own else registry.owner_of(values)
            checks.readable(owner, name, values)
            checks.mask_values(name, values, shape_of_mask)
            # Lengths are checked as given, since an integer beyond int64 wraps in it; weights in the new dtype, in
            # which they may be infinite.
            given = values
            if isinstance(values, np.ndarray) and dtype == "float32":
                with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite, and is refused below
                    values = owner.asarray(values, dtype)
            elif dtype is not None or type(values) in registry.LAZY:
                # Lazy masks are computed here. Without errstate, which torch.compile cannot trace.
                values = owner.asarray(values, dtype)
            seen = given if name == "lengths" else values
            # Host data is checked on the host, without waiting for a device.
            if name != "mask" and owner.within(seen, 0, limit) is False:
                checks.out_of_range(name, owner.to_numpy(given), owner.to_numpy(seen), limit)
            return values if own else backend.asarray(values, device=device)

        kernels = backend.kernels
        combine = kernels.sample_weights if replicas is None else partial(replicas.sample_weights, kernels)
        return combine(
            shape_of_mask,
            settings.dtype,
            receive("mask", self.mask, None, math.inf),
            receive("lengths", self.lengths, "int64", shape_of_mask[-1] + 1),
            receive("sample_weight", self.sample_weight, settings.dtype, math.inf),
        )
