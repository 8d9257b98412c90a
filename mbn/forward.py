"""The one way from a layer or function down to a backend, and up again.

What all routes have in common has to be here: the last checks, for which x is needed, empty batches, and channels that
come last.
"""

from typing import Any

from mbn import checks
from mbn.contract import Array, Backend, Residuals, counted, transposed
from mbn.masking import Masking
from mbn.pullback import Pullback
from mbn.state import Params, Settings, State


def forward(
    backend: Backend,
    x: Array,
    params: Params,
    state: State,
    settings: Settings,
    *,
    training: bool,
    masking: Masking | None = None,
    out: Any = None,
) -> tuple[Array, State]:
    """Check ``x``, an array of ``backend``, and what is said of its places, and normalise it, to ``out`` if given.

    Everything else has been checked. ``training`` says by which statistics: those of ``x`` or the running ones.
    """
    try:
        shape = x.shape
    except RuntimeError as error:
        raise TypeError(checks.SHAPELESS) from error
    checks.batch(backend, x, shape, settings, state, training=training)
    if out is not None:
        checks.out(backend, out, x)
    weights = None if masking is None else masking.weights(backend, x, settings)
    if 0 in shape:
        return x if out is None else out, _counted(state, training=training)
    swap = settings.has_channels_last(len(shape))
    options = _options(settings, training, weights)
    if out is not None:
        options["out"] = transposed(out) if swap else out
    y, state = backend.batch_norm(transposed(x) if swap else x, params, state, **options)
    return (transposed(y) if swap else y) if out is None else out, state


def forward_vjp(
    backend: Backend,
    x: Array,
    params: Params,
    state: State,
    settings: Settings,
    *,
    training: bool,
    masking: Masking | None = None,
) -> tuple[tuple[Array, Pullback], State]:
    """Do what :func:`forward` does, and return the pullback beside the output."""
    try:
        shape = x.shape
    except RuntimeError as error:
        raise TypeError(checks.SHAPELESS) from error
    checks.batch(backend, x, shape, settings, state, training=training)
    weights = None if masking is None else masking.weights(backend, x, settings)
    held = Params(*(None if parameter is None else backend.copy(parameter) for parameter in params))
    if 0 in shape:
        return (x, Pullback(backend, x, held, None, weights, settings)), _counted(state, training=training)
    swap = settings.has_channels_last(len(shape))
    y, state, residuals = backend.batch_norm_residuals(
        transposed(x) if swap else x, params, state, **_options(settings, training, weights)
    )
    if not training:  # the running statistics may be written to before the pullback is called
        residuals = Residuals(backend.copy(residuals.mean), backend.copy(residuals.var), None)
    return (transposed(y) if swap else y, Pullback(backend, x, held, residuals, weights, settings)), state


def _options(settings: Settings, training: bool, weights: Array | None) -> dict[str, Any]:  # noqa: FBT001 - as they come
    return {
        "training": training,
        "momentum": settings.momentum,
        "eps": settings.eps,
        "correction": settings.correction,
        "weights": weights,
    }


def _counted(state: State, *, training: bool) -> State:
    """Return the state after an empty batch: it has no statistics; torch counts it all the same."""
    if not training or state.num_batches_tracked is None:
        return state
    return state._replace(num_batches_tracked=counted(state.num_batches_tracked))
