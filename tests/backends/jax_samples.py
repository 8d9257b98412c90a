"""Samples of arrays and layers for the tests of JAX, and functions that compare results."""

import numpy as np
import pytest

import mbn
from mbn.contract import Params, State

jax = pytest.importorskip("jax")
jnp = jax.numpy

backend = mbn.get_backend("jax")

OPTIONS = {"training": True, "momentum": 0.1, "eps": 1e-5, "correction": 1}
NOTHING = Params(None, None), State(None, None, None)


def new_state(num_features):
    return State(jnp.zeros(num_features), jnp.ones(num_features), jnp.asarray(0))


def new_layer(**options):
    return mbn.BatchNorm1d(3, backend="jax", **options)


def batches(rng, *shape):
    return jnp.asarray(rng.standard_normal((*shape, 8, 3)), jnp.float32)


def holds_values(tree):
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def assert_same(actual, expected, tolerance=0.0):
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def relative_error(actual, truth):
    return np.max(np.abs(np.asarray(actual, np.float64) - truth)) / np.max(np.abs(truth))


def directional(function, direction):
    return lambda x: jax.jvp(function, (x,), (direction,))[1]
