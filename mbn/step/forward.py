"""The one way from a layer or function down to a backend, and up again.

What all routes have in common has to be here: the last checks, for which x is needed, empty batches, and channels that
come last.
"""

from typing import Any

from mbn import checks
from mbn.contract import Array, Backend, Batch, Group, Params, Settings, State, Stats, counted, transposed
from mbn.step.empty import emptied, stand_in
from mbn.step.masks import Masking
from mbn.step.pullback import Pullback


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
    if 0 in shape:
        y, state, _ = _without_values(backend, x, params, state, settings, training, group)
        return y if out is None else out, state
    swap = settings.has_channels_last(len(shape))
    batch = Batch(transposed(x) if swap else x, sample_weight, settings.dtype)
    target = transposed(out) if swap and out is not None else out
    kernels, batch = backend.kernels_for("train" if training else "evaluate", batch, target, (params, state))
    y, state, _ = backend.forward(kernels, batch, params, state, settings, training, target, False, group)  # noqa: FBT003
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
    if 0 in shape:
        y, state, stats = _without_values(backend, x, params, state, settings, training, group)
    else:
        swap = settings.has_channels_last(len(shape))
        batch = Batch(transposed(x) if swap else x, sample_weight, settings.dtype)
        kernels, batch = backend.kernels_for("train" if training else "evaluate", batch, None, (params, state))
        y, state, stats = backend.forward(kernels, batch, params, state, settings, training, None, True, group)  # noqa: FBT003
        y = transposed(y) if swap else y
        if not training:  # the running statistics may be written to before the pullback is called
            stats = Stats(backend.copy(stats.mean), backend.copy(stats.var), None)
    return (y, Pullback(backend, x, held, stats, sample_weight, settings, group if training else None)), state


def _without_values(
    backend: Backend,
    x: Array,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,  # noqa: FBT001 - as above
    group: Group | None,
) -> tuple[Array, State, Stats | None]:
    """Return output, state and statistics of an empty batch: it has none, but for those of other replicas."""
    if not training:
        return x, state, None
    if group is None:  # torch counts it all the same
        count = state.num_batches_tracked
        return x, state if count is None else state._replace(num_batches_tracked=counted(count)), None
    batch = stand_in(backend, x, settings)
    kernels, batch = backend.kernels_for("train", batch, None, (params, state))
    y, state, stats = backend.forward(kernels, batch, params, state, settings, training, None, True, group)  # noqa: FBT003
    return emptied(y, x, settings), state, stats
