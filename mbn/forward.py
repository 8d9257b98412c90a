"""The one way from a layer or function down to a backend, and up again.

What all routes have in common has to be here: the last checks, for which x is needed, empty batches, and channels that
come last.
"""

from typing import Any

from mbn import checks
from mbn.contract import Array, Backend, Batch, Group, Stats, counted, transposed
from mbn.masking import Masking
from mbn.pullback import Pullback
from mbn.state import Params, Settings, State
from mbn.step.empty import emptied, stand_in


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
    group: Group | None = None,
) -> tuple[Array, State]:
    """Check ``x``, an array of ``backend``, and what is said of its places, and normalise it, to ``out`` if given.

    Everything else has been checked. ``training`` says by which statistics: those of ``x`` or the running ones.
    """
    try:
        shape = x.shape
    except RuntimeError as error:
        raise TypeError(checks.SHAPELESS) from error
    checks.batch(backend, x, shape, settings, state, training=training and group is None)
    if out is not None:
        checks.out(backend, out, x)
    sample_weight = None if masking is None else masking.combined(backend, x, settings)
    if 0 in shape and (group is None or not training):
        return x if out is None else out, _counted(state, training=training)
    swap = settings.has_channels_last(len(shape))
    batch = Batch(transposed(x) if swap else x, sample_weight, settings.dtype)
    target = transposed(out) if swap and out is not None else out
    y, state, _ = _step(backend, batch, params, state, settings, training, target, group, keep=False)
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
    group: Group | None = None,
) -> tuple[tuple[Array, Pullback], State]:
    """Do what :func:`forward` does, and return the pullback beside the output."""
    try:
        shape = x.shape
    except RuntimeError as error:
        raise TypeError(checks.SHAPELESS) from error
    checks.batch(backend, x, shape, settings, state, training=training and group is None)
    sample_weight = None if masking is None else masking.combined(backend, x, settings)
    held = Params(*(None if parameter is None else backend.copy(parameter) for parameter in params))
    if 0 in shape and (group is None or not training):
        return (x, Pullback(backend, x, held, None, sample_weight, settings)), _counted(state, training=training)
    swap = settings.has_channels_last(len(shape))
    batch = Batch(transposed(x) if swap else x, sample_weight, settings.dtype)
    y, state, stats = _step(backend, batch, params, state, settings, training, None, group)
    if not training:  # the running statistics may be written to before the pullback is called
        stats = Stats(backend.copy(stats.mean), backend.copy(stats.var), None)
    pullback = Pullback(backend, x, held, stats, sample_weight, settings, group if training else None)
    return (transposed(y) if swap else y, pullback), state


def _step(
    backend: Backend,
    batch: Batch,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,  # noqa: FBT001 - in every call, where keywords cost
    out: Array | None,
    group: Group | None,
    *,
    keep: bool = True,
) -> tuple[Array, State, Stats]:
    """Choose the kernels for a step, and do it."""
    x = batch.x
    is_empty = group is not None and 0 in x.shape
    if is_empty:
        batch, out = stand_in(backend, x, settings), None
    kernels, batch = backend.kernels_for("train" if training else "evaluate", batch, out, (params, state))
    y, state, stats = backend.forward(kernels, batch, params, state, settings, training, out, keep, group)
    return emptied(y, x) if is_empty else y, state, stats


def _counted(state: State, *, training: bool) -> State:
    """Return the state after an empty batch: it has no statistics; torch counts it all the same."""
    if not training or state.num_batches_tracked is None:
        return state
    return state._replace(num_batches_tracked=counted(state.num_batches_tracked))
