"""The pullback of one call: the function from the gradient of its output to those of its inputs.

It must not depend on anything that happens after the call: it keeps the operands of the call, gives the same result
each time, and changes no state.
"""

from typing import Any

import numpy as np

from mbn import checks
from mbn.contract import Array, Backend, Batch, Params, Pullback, Replicas, Settings, Stats, dtype_name, transposed
from mbn.convert import received
from mbn.step.compose import ALL
from mbn.step.empty import stand_in


class StepPullback(Pullback):
    """The pullback of one step, which keeps what the step leaves behind."""

    def __init__(
        self,
        backend: Backend,
        x: Array,
        params: Params,
        stats: Stats | None,
        sample_weight: Array | None,
        settings: Settings,
        replicas: Replicas | None = None,
    ) -> None:
        """Keep the operands of a call; ``x`` is not copied. ``stats`` are None if the call computed nothing."""
        self._backend = backend
        self._x = x
        self._params = params
        self._stats = stats
        self._sample_weight = sample_weight
        self._settings = settings
        self._replicas = replicas

    def __call__(self, dy: Any) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients, as :class:`mbn.contract.Pullback` says."""
        if self._replicas is None:
            return self._gradients(dy)
        with self._replicas.pulling():
            return self._gradients(dy)

    def _gradients(self, dy: Any) -> tuple[Array, Array | None, Array | None]:
        backend, x, settings = self._backend, self._x, self._settings
        shape, dtype, device = tuple(x.shape), dtype_name(x.dtype), backend.device(x)
        dy = received(backend, "dy", dy, dtype, device)
        checks.gradient(backend, dy, shape, dtype)
        if self._stats is None:
            dx, dweight, dbias = dy, *(backend.asarray(np.zeros(shape[settings.axis]), settings.dtype, device),) * 2
        else:
            weight, stats, is_empty = self._params.weight, self._stats, 0 in shape
            swap = settings.has_channels_last(len(shape)) and not is_empty
            if is_empty:
                batch = stand_in(backend, x, settings)
            else:
                batch = Batch(transposed(x) if swap else x, self._sample_weight, settings.dtype)
            given = batch.x if is_empty else transposed(dy) if swap else dy
            kernels, batch = backend.kernels_for("pullback", batch, given, (weight, stats))
            dx, dweight, dbias = backend.pullback(
                kernels, given, batch, weight, stats, settings.eps, ALL, self._replicas
            )
            dx = dy if is_empty else transposed(dx) if swap else dx
        weight, bias = self._params
        # The sums may have a wider dtype than the parameters.
        return (
            dx,
            None if weight is None else backend.asarray(dweight, settings.dtype),
            None if bias is None else backend.asarray(dbias, settings.dtype),
        )
