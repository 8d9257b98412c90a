"""NumPy's backend: nothing but NumPy computes."""

from typing import ClassVar

import numpy as np

from mbn.contract import Residuals
from mbn.state import Params, State
from mbn_cpu import blocked, small
from mbn_cpu.backend import HostBackend


class NumpyBackend(HostBackend):
    """The backend of NumPy arrays."""

    name: ClassVar[str] = "numpy"
    version = np.__version__
    kernels = blocked

    def batch_norm_residuals(
        self,
        x: np.ndarray,
        params: Params,
        state: State,
        *,
        training: bool,
        momentum: float | None,
        eps: float,
        correction: int,
        weights: np.ndarray | None = None,
        **out: np.ndarray,
    ) -> tuple[np.ndarray, State, Residuals]:
        if not small.is_small(x, weights):
            return super().batch_norm_residuals(
                x,
                params,
                state,
                training=training,
                momentum=momentum,
                eps=eps,
                correction=correction,
                weights=weights,
                **out,
            )
        if training:
            return small.train(x, params, state, momentum, eps, correction, **out)
        y = small.evaluate(x, params, state, eps, **out)
        return y, state, Residuals(state.running_mean, state.running_var, None)

    def pullback(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        weight: np.ndarray | None,
        residuals: Residuals,
        eps: float,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if small.is_small(x, weights):
            return small.pullback(dy, x, weight, residuals, eps)
        return super().pullback(dy, x, weight, residuals, eps, weights)
