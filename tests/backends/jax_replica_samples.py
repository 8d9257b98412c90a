"""Batches that two replicas of a JAX layer divide, a step of training, and the comparison with the undivided batch."""

from typing import Any, NamedTuple

import numpy as np
from jax_samples import jax, jnp, relative_error

import mbn
from mbn.contract import Params, State

C, N, L = 3, 8, 5
AXIS = "replicas"


class Sample(NamedTuple):
    """A batch with a gradient of its output and a direction, and what a call takes beside it."""

    x: Any
    dy: Any
    v: Any
    masking: dict[str, Any]


_ROWS = np.arange(N)
_MASKINGS: dict[str, dict[str, Any]] = {
    "mask": {"mask": np.random.default_rng(7).random((N, L)) < 0.7},
    "a masked shard": {"mask": np.broadcast_to(_ROWS[:, None] < N // 2, (N, L))},
    "all masked": {"mask": np.zeros((N, L), bool)},
    "lengths": {"lengths": _ROWS % (L + 1)},
    "sample weights": {"sample_weight": (_ROWS / 2).astype(np.float32)},
    "large weights": {"sample_weight": np.where(_ROWS < N // 2, 1e20, 1e21).astype(np.float32)},
}
KINDS = ("rows", "sequences", *_MASKINGS, "offset", "float16", "bfloat16", "float64")


def sample(kind: str) -> Sample:
    """Return a batch, whose mean moves from row to row, so that each replica has another one."""
    shape = (N, C) if kind == "rows" else (N, C, L)
    x, dy, v = np.random.default_rng(1).standard_normal((3, *shape))
    x += _ROWS.reshape(-1, *[1] * (x.ndim - 1)) + (1e6 if kind == "offset" else 0)
    dtype = kind if "float" in kind else "float32"
    masking = _MASKINGS.get(kind, {})
    if masking:
        x = np.where(_weights(masking) == 0, np.nan, x)  # nothing may depend on a masked value
    return Sample(*(jnp.asarray(array, dtype) for array in (x, dy, v)), jax.tree.map(jnp.asarray, masking))


def _weights(masking: dict[str, Any]) -> np.ndarray:
    weights = masking.get("mask", np.ones((N, L))) * masking.get("sample_weight", np.ones(N))[:, None]
    return (weights * (np.arange(L) < masking.get("lengths", np.full(N, L))[:, None]))[:, None]


def halves(tree: Any) -> Any:
    """Return arrays with the two halves of each, stacked."""
    return jax.tree.map(lambda array: array.reshape(2, -1, *array.shape[1:]), tree)


def layer(group: Any, dtype: str = "float32", backend: str = "jax") -> mbn.BatchNorm1d:
    bn = mbn.BatchNorm1d(C, backend=backend, dtype="float64" if dtype == "float64" else "float32", group=group)
    bn.weight, bn.bias = [2.0, -0.5, 1.0], [1.0, 0.0, 0.5]
    return bn


def undivided(batch: Sample) -> tuple[Any, Any, State]:
    """Return the results of :func:`step` for the undivided batch, computed in float64 by NumPy."""
    bn = layer(None, "float64", "numpy")
    masking = jax.tree.map(np.asarray, batch.masking)
    x, dy = (np.asarray(array, np.float64) for array in (batch.x, batch.dy))
    y, pullback = bn.vjp(x, **masking)
    dx, *dparams = pullback(dy)
    return (y, dx), Params(*dparams), bn.state


def step(bn: mbn.BatchNorm1d, params: Params, batch: Sample) -> tuple[Any, Any, State]:
    """Return output and gradient of x; the gradients of the parameters, of the loss of this replica; the new state."""
    x, dy, _, masking = batch

    def loss(x: Any, params: Params) -> Any:
        y, state = bn.apply(params, bn.state, x, training=True, **masking)
        return (y * dy).astype(params.weight.dtype).sum(), (y, state)

    (dx, dparams), (y, state) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return (y, dx), dparams, state


def derivatives(bn: mbn.BatchNorm1d, params: Params, batch: Sample) -> tuple[Any, ...]:
    """Return derivatives of a loss of all replicas by x: jvp of grad, grad of grad and a third one."""
    x, dy, v, masking = batch

    def loss(x: Any) -> Any:
        y, _ = bn.apply(params, bn.state, x, training=True, **masking)
        return (y * dy).sum() + (y**3).sum() / 3

    def slope(x: Any) -> Any:
        return jax.grad(loss)(x)

    def bend(x: Any) -> Any:
        return jax.grad(lambda x: (slope(x) * v).sum())(x)

    return slope(x), jax.jvp(slope, (x,), (v,))[1], bend(x), jax.grad(lambda x: (bend(x) * v).sum())(x)


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """Compare trees of arrays, each relatively to the largest number in it."""
    leaves = [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (actual, expected)]
    for one, truth in zip(*leaves, strict=True):
        assert one.shape == truth.shape
        if np.any(truth):
            assert relative_error(one, truth) <= bound
        else:
            assert not np.any(one)


def bound(kind: str) -> float:
    """Return the largest relative error beside the undivided batch: a few units in the last place."""
    return {"float16": 2e-3, "bfloat16": 1.6e-2, "float64": 2e-15}.get(kind, 1e-6)
