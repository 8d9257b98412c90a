"""Steps of a backend without a layer: choose the kernels for a call, and compose a step of them."""

from typing import Any

from mbn.contract import Array, Backend, Batch, Params, Settings, State, Stats, dtype_name


def _dtype(*vectors: Any) -> str:
    given = [dtype_name(vector.dtype) for vector in vectors if vector is not None]
    return "float64" if "float64" in given else "float32"


def step(
    backend: Backend,
    x: Array,
    params: Params,
    state: State,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    weights: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, State, Stats]:
    """Return output, new state and statistics of a training or evaluation step."""
    dtype = _dtype(*params, *state[:2], x if params.weight is None and state.running_mean is None else None)
    settings = Settings(x.shape[1], dtype, eps, momentum, 1, correction)
    operation = "train" if training else "evaluate"
    kernels, batch = backend.kernels_for(operation, Batch(x, weights, dtype), out, (params, state))
    return backend.forward(kernels, batch, params, state, settings, training, out)


def pullback(
    backend: Backend, dy: Array, x: Array, weight: Any, stats: Stats, eps: float = 1e-5, weights: Any = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, weight and bias."""
    batch = Batch(x, weights, _dtype(weight, x if weight is None else None))
    kernels, batch = backend.kernels_for("pullback", batch, dy, (weight, stats))
    return backend.pullback(kernels, dy, batch, weight, stats, eps)
