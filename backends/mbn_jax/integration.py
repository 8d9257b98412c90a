"""A step and its pullback as JAX compiles them: each one program, whose numbers are arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from mbn.contract import Batch, Kernels, Params, Settings, State, Stats
from mbn_jax.group import AxisGroup
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
    group: AxisGroup | None = None,
) -> tuple[jax.Array, State, Stats | None]:
    """Do what ``mbn.step.compose.forward`` does."""
    x, sample_weight, dtype = batch
    y, after, stats = compiled_step(
        *(x, sample_weight, params, state, eps_argument(settings.eps), argument(settings.momentum)),
        forward=forward,
        kernels=_of_group(kernels, group),
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
    group: AxisGroup | None = None,
) -> tuple[jax.Array, ...]:
    """Do what ``mbn.step.compose.pullback`` does."""
    x, sample_weight, dtype = batch
    stats = stats._replace(count=argument(stats.count))
    arrays = dy, x, sample_weight, weight, stats, eps_argument(eps)
    return _compiled_pullback(*arrays, pullback=pullback, kernels=_of_group(kernels, group), dtype=dtype)


def _of_group(kernels: Any, group: AxisGroup | None) -> Kernels:
    """Return kernels whose derivatives pass the seam between replicas, where there are others."""
    return kernels if group is None else kernels.of(group)


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
    """Run a step of which nothing is static but the way that it takes: no momentum has it compiled anew."""
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
    """Return x in float64 if a layer is: the results have to be as exact as its vectors are."""
    return x.astype(np.float64) if dtype == "float64" else x


def argument(value: Any) -> Any:
    """Return a Python number as an argument of compiled code, and anything else as it is."""
    return number(value) if isinstance(value, int | float) else value


def eps_argument(eps: Any) -> Square:
    """Return an eps as an argument of compiled code, in the same way."""
    return squared(eps) if isinstance(eps, int | float) else eps
