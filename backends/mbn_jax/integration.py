"""A step and its pullback, each compiled by JAX as one program, which takes eps and momentum as arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from mbn.contract import Batch, Kernels, Params, Settings, State, Stats
from mbn_jax.group import AxisGroup
from mbn_jax.kernels.layouts import Order
from mbn_jax.kernels.pairs import Square, number, squared, widest_dtype


def step(
    forward: Callable[..., Any],
    kernels: Kernels,
    batch: Batch,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,
    out: None = None,
    keep: bool = True,
    replicas: AxisGroup | None = None,
) -> tuple[jax.Array, State, Stats | None]:
    """Compute ``mbn.step.compose.forward`` as one compiled program."""
    x, sample_weight, dtype = batch
    order = Order(settings.has_channels_last(x.ndim) and isinstance(x, jax.core.Tracer))
    y, after, stats = compiled_step(
        *(x, sample_weight, params, state, eps_argument(settings.eps), argument(settings.momentum)),
        forward=forward,
        kernels=_made_for(kernels, replicas, order),
        dtype=dtype,
        correction=settings.correction,
        training=training,
        keep=keep,
    )
    return y, after if training else state, stats


def differentiate(
    pullback: Callable[..., Any],
    kernels: Kernels,
    dy: jax.Array,
    batch: Batch,
    weight: jax.Array | None,
    stats: Stats,
    eps: float,
    needs: object = None,
    replicas: AxisGroup | None = None,
) -> tuple[jax.Array, ...]:
    """Compute ``mbn.step.compose.pullback`` as one compiled program."""
    x, sample_weight, dtype = batch
    stats = stats._replace(count=argument(stats.count))
    arrays = dy, x, sample_weight, weight, stats, eps_argument(eps)
    order = None if isinstance(x, jax.core.Tracer) else Order(has_channels_last=False)
    return _compiled_pullback(*arrays, pullback=pullback, kernels=_made_for(kernels, replicas, order), dtype=dtype)


def _made_for(kernels: Any, replicas: AxisGroup | None, order: Order | None) -> Kernels:
    """Return kernels for an order of x, whose derivatives are summed over the replicas of the group, if there is one.

    A frontend that has channels last swaps the axes before it calls a step, and arrays that are not traced are then in
    the new order.
    """
    made: Kernels = kernels.of(replicas, order)
    return made


@partial(jax.jit, static_argnames=("forward", "kernels", "dtype", "correction", "training", "keep"))
def compiled_step(
    x: jax.Array,
    sample_weight: jax.Array | None,
    params: Params,
    state: State,
    eps: Square,
    momentum: jax.Array | None,
    *,
    forward: Callable[..., Any],
    kernels: Any,
    dtype: str,
    correction: int,
    training: bool,
    keep: bool,
) -> tuple[jax.Array, State, Stats | None]:
    """Compute a step. Only options that change the program are static: a new eps or momentum compiles nothing anew."""
    batch = Batch(widened(x, dtype), sample_weight, dtype)
    settings = Settings(None, dtype, eps, momentum, 1, correction)  # type: ignore[arg-type]  # traced
    y, state, stats = forward(kernels, batch, params, state, settings, training, None, keep, kernels.group)
    return y.astype(x.dtype), state, stats


@partial(jax.jit, static_argnames=("pullback", "kernels", "dtype"))
def _compiled_pullback(
    dy: jax.Array,
    x: jax.Array,
    sample_weight: jax.Array | None,
    weight: jax.Array | None,
    stats: Stats,
    eps: Square,
    *,
    pullback: Callable[..., Any],
    kernels: Kernels,
    dtype: str,
) -> tuple[jax.Array, ...]:
    batch = Batch(widened(x, dtype), sample_weight, dtype)
    dx, *gradients = pullback(kernels, widened(dy, dtype), batch, weight, stats, eps)
    return dx.astype(x.dtype), *(gradient.astype(widest_dtype()) for gradient in gradients)


def widened(x: jax.Array, dtype: str) -> jax.Array:
    """Return x, or x in float64 if the layer is: results must be as exact as its statistics."""
    return x.astype(np.float64) if dtype == "float64" else x


def argument(value: Any) -> Any:
    """Return a Python number as a pair of arrays, an argument of compiled code; return any other value as it is."""
    return number(value) if isinstance(value, int | float) else value


def eps_argument(eps: Any) -> Square:
    """Return an eps that is a Python number as a ``Square``, an argument of compiled code; else as it is."""
    return squared(eps) if isinstance(eps, int | float) else eps
