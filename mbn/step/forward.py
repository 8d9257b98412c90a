"""The forward step of every layer and function: from its arguments to a backend, and back to its results.

It contains everything that all backends share: the checks that need x, empty batches, and channels that come last.
"""

from functools import partial
from typing import Any

from mbn import checks
from mbn.contract import (
    Array,
    Backend,
    Batch,
    Needs,
    Params,
    Replicas,
    Settings,
    State,
    Stats,
    counted,
    dtype_name,
    transposed,
)
from mbn.step.empty import emptied, stand_in
from mbn.step.masks import Masking
from mbn.step.pullback import StepPullback


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
    replicas: Replicas | None = None,
    vjp: bool = False,
) -> tuple[Any, State]:
    """Check ``x``, an array of ``backend``, and its mask, and normalise it, to ``out`` if given.

    All other arguments have been checked. With ``training`` the statistics of ``x`` normalise it, else the running
    ones.

    Returns:
        The output, or with ``vjp`` the output and its :class:`mbn.contract.Pullback`; and the new state.
    """
    try:
        shape = x.shape
    except RuntimeError as error:
        raise TypeError(checks.SHAPELESS) from error
    replicas = replicas if training else None  # evaluation is local
    checks.batch(backend, shape, dtype_name(x.dtype), settings, state, training=training and replicas is None)
    if out is not None:
        checks.out(backend, out, x)
    sample_weight = None if masking is None else masking.combined(backend, x, settings, replicas)
    if vjp and replicas is not None:
        replicas.expect(Needs.GRADIENT)
    if vjp:  # the parameters may be written to before the pullback is called
        held = Params(*(None if parameter is None else backend.copy(parameter) for parameter in params))
    if 0 in shape:
        y, state, stats = _without_values(backend, x, params, state, settings, training, replicas)
    else:
        swap = settings.has_channels_last(len(shape))
        batch = Batch(transposed(x) if swap else x, sample_weight, settings.dtype)
        target = transposed(out) if swap and out is not None else out
        kernels, batch = backend.kernels_for("train" if training else "evaluate", batch, target, (params, state))
        y, state, stats = backend.forward(kernels, batch, params, state, settings, training, target, vjp, replicas)
        y = transposed(y) if swap else y
        if vjp and not training:  # the running statistics may be written to, too
            stats = Stats(backend.copy(stats.mean), backend.copy(stats.var), None)
    y = y if out is None else out
    if not vjp:
        return y, state
    return (y, StepPullback(backend, x, held, stats, sample_weight, settings, replicas)), state


forward_vjp = partial(forward, vjp=True)


def _without_values(
    backend: Backend,
    x: Array,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,
    replicas: Replicas | None,
) -> tuple[Array, State, Stats | None]:
    """Return output, state and statistics of an empty batch: those of the other replicas, or None."""
    if not training:
        return x, state, None
    if replicas is None:  # as in torch, an empty batch counts
        count = state.num_batches_tracked
        return x, state if count is None else state._replace(num_batches_tracked=counted(count)), None
    replicas.without_values()
    batch = stand_in(backend, x, settings)
    kernels, batch = backend.kernels_for("train", batch, None, (params, state))
    y, state, stats = backend.forward(kernels, batch, params, state, settings, training, None, True, replicas)
    return emptied(y, x, settings), state, stats
