"""The forward step of every layer and function: from its arguments to a backend, and back to its results.

It contains everything that all backends share: the checks that need x, empty batches, and channels that come last.
"""

import math
from functools import partial
from typing import Any

import numpy as np

from mbn import checks, registry
from mbn.chunked import dask
from mbn.contract import (
    Array,
    Backend,
    Batch,
    Needs,
    Operation,
    Params,
    Replicas,
    Settings,
    State,
    Stats,
    counted,
    dtype_name,
    transposed,
)
from mbn.convert import asarray, received, received_vectors
from mbn.step.empty import emptied, stand_in
from mbn.step.masks import Masking
from mbn.step.pullback import StepPullback
from mbn.threads import limited


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
    size: int | None = None,
) -> tuple[Any, State]:
    """Check ``x``, an array of ``backend``, and its mask, and normalise it, to ``out`` if given.

    All other arguments have been checked. With ``training`` the statistics of ``x`` normalise it, else the running
    ones. ``size`` is that of the whole array if ``x`` is a block.

    Returns:
        The output, or with ``vjp`` the output and its :class:`mbn.contract.Pullback`; and the new state.
    """
    if type(x) in registry.LAZY:
        checks.lazy(training=training, vjp=vjp, out=out)
        return _of_blocks(backend, x, params, state, settings, masking), state
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
        operation: Operation = "train" if training else "evaluate"
        kernels, batch = backend.kernels_for(operation, batch, target, (params, state), size)
        y, state, stats = backend.forward(kernels, batch, params, state, settings, training, target, vjp, replicas)
        y = transposed(y) if swap else y
        if vjp and not training:  # the running statistics may be written to, too
            stats = Stats(backend.copy(stats.mean), backend.copy(stats.var), None)
    y = y if out is None else out
    if not vjp:
        return y, state
    return (y, StepPullback(backend, x, held, stats, sample_weight, settings, replicas)), state


forward_vjp = partial(forward, vjp=True)


def _of_blocks(
    backend: Backend, x: Any, params: Params, state: State, settings: Settings, masking: Masking | None
) -> Any:
    """Return the lazy output of a lazy array: a task for each block, with copies of the parameters and statistics."""
    checks.batch(backend, x.shape, dtype_name(x.dtype), settings, state, training=False)
    if masking is not None:
        checks.masks(backend)
    vectors = [None if vector is None else np.array(backend.to_numpy(vector)) for vector in (*params, *state[:2])]
    device = next(backend.device(vector) for vector in state[:2])
    size = math.prod(x.shape)
    evaluated = partial(_of_block, backend, device, settings, None if math.isnan(size) else size)
    is_converted = registry.owner_of(x) is not backend
    return dask.map_blocks(evaluated, x, settings.axis, vectors, masking or (None, None, None), is_converted)


def evaluate_block(
    backend: Backend,
    device: Any,
    settings: Settings,
    size: int | None,
    block: Array,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    mean: np.ndarray,
    var: np.ndarray,
    mask: Array | None = None,
    sample_weight: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Return the output of a block of an array with ``size`` values, with the bits of the call on the whole array.

    The block may have some of the channels alone, and the vectors are theirs. The output is an array of the block's
    own library, or ``out``.
    """
    x = received(backend, "x", block, settings.dtype, device)
    settings = settings._replace(num_features=len(mean))
    vectors = Params(weight, bias), State(mean, var, None)
    params, state = received_vectors(backend, *vectors, len(mean), settings.dtype, backend.device(x))
    masking = Masking.of(mask, None, sample_weight)
    y, _ = forward(backend, x, params, state, settings, training=False, masking=masking, out=out, size=size)
    return asarray(y, backend=registry.owner_of(block))


def _of_block(*arguments: Any) -> Array:
    with limited(1):  # the scheduler has a thread for each processor that it may use
        return evaluate_block(*arguments)


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
