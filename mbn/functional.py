"""Batch normalisation as a pure function: state in, state out.

Everything is checked here before a backend sees it; nothing that is passed in is written to.
"""

from typing import Any, NamedTuple

from mbn import checks, registry
from mbn.contract import Array, Backend, dtype_name, layer_dtype
from mbn.convert import received
from mbn.state import Params, Settings, State


class BatchNormResult(NamedTuple):
    """What :func:`batch_norm` returns; the statistics are None where none were given."""

    output: Any
    running_mean: Any
    running_var: Any


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,  # noqa: FBT001, FBT002 - torch's signature
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    correction: int = 1,
    backend: str | Backend | None = None,
) -> BatchNormResult:
    """Normalise each channel of ``x``: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    The arguments are those of ``torch.nn.functional.batch_norm``, in its order, but the new statistics are returned
    instead of written into the old ones.

    Args:
        x: (N, C) or (N, C, L); with ``axis=-1`` (N, C) or (N, L, C). float16, bfloat16 or float32, and float64 where
            the statistics and parameters are float64.
        running_mean, running_var: (C,), both or neither; float32 or float64, as are ``weight`` and ``bias``.
        weight, bias: (C,) or None.
        training: normalise by the mean and biased variance of ``x``, and return running statistics moved towards the
            mean and the variance of ``x``; otherwise normalise by the running statistics.
        momentum: the weight of the new value in the running statistics.
        eps: added to the variance; 0 is allowed. Where variance + eps is 0 the output is the bias.
        axis: where the channels are, 1 or -1.
        correction: 1 for the unbiased variance in ``running_var``, 0 for the biased one.
        backend: a name or a Backend; by default the one chosen by context, default or environment, else ``x``'s own.

    Returns:
        The output, with the shape, dtype, device and memory order of ``x``; the new running statistics.

    Raises:
        TypeError: a dtype that would lose precision or is not floating, or another framework's array.
        ValueError: a wrong shape; one value per channel in training; no statistics to normalise by; eps < 0.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), algorithms 1 and 2.
    """
    chosen = registry.get_backend(backend) if backend is not None else registry.chosen_backend()
    chosen = chosen or registry.owner_of(x)
    if momentum is None:
        message = "momentum=None is the cumulative average, which needs the count of batches that BatchNorm1d keeps."
        raise TypeError(message)
    axis = checks.axis(axis)
    state = State(running_mean, running_var, None)
    dtype = _statistics_dtype(running_mean, running_var, weight, bias, x)
    x = received(chosen, "x", x, dtype, None)
    checks.rank(x.shape, axis)
    params, state = received_vectors(chosen, Params(weight, bias), state, x.shape[axis], dtype, chosen.device(x))
    checks.running_statistics(state, needed=not training)
    settings = Settings(
        num_features=x.shape[axis],
        dtype=dtype,
        eps=checks.eps(eps),
        momentum=checks.momentum(momentum),
        axis=axis,
        correction=checks.correction(correction),
    )
    y, state = forward(chosen, x, params, state, settings, training=training)
    return BatchNormResult(y, state.running_mean, state.running_var)


def received_vectors(
    backend: Backend, params: Params, state: State, num_features: int, dtype: str, device: Any
) -> tuple[Params, State]:
    """Return parameters and statistics from outside as checked arrays of ``backend``."""

    def receive(name: str, value: Any) -> Array | None:
        if value is None:
            return None
        vector = received(backend, name, value, dtype, device)
        checks.vector(name, vector, num_features, dtype)
        return vector

    count = state.num_batches_tracked
    if count is not None:
        checks.count(count)
        count = backend.asarray(count, "int64", device) if registry.is_host_data(count) else count
    return (
        Params(receive("weight", params.weight), receive("bias", params.bias)),
        state._replace(
            running_mean=receive("running_mean", state.running_mean),
            running_var=receive("running_var", state.running_var),
            num_batches_tracked=count,
        ),
    )


def forward(
    backend: Backend, x: Array, params: Params, state: State, settings: Settings, *, training: bool
) -> tuple[Array, State]:
    """Check ``x``, an array of ``backend``, and normalise it. Everything else has been checked.

    ``training`` says by which statistics: those of ``x`` or the running ones.
    """
    shape = x.shape
    checks.batch(backend, x, shape, settings, training=training)
    if 0 in shape:
        # An empty batch has no statistics and no output to compute; torch counts it all the same.
        counted = training and state.num_batches_tracked is not None
        return x, state._replace(num_batches_tracked=state.num_batches_tracked + 1) if counted else state
    channels_last = settings.axis == -1 and len(shape) == 3  # noqa: PLR2004 - (N, L, C)
    y, state = backend.batch_norm(
        x.mT if channels_last else x,
        params,
        state,
        training=training,
        momentum=settings.momentum,
        eps=settings.eps,
        correction=settings.correction,
    )
    return y.mT if channels_last else y, state


def _statistics_dtype(*arrays: Any) -> str:
    """Return the dtype that parameters and statistics must share: that of the first array given, x coming last."""
    given = (dtype_name(array.dtype) for array in arrays if hasattr(array, "dtype"))
    return layer_dtype(next(given, "float32"))
