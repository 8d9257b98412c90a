"""Masks and sample weights on JAX: traced, and in derivatives."""

import numpy as np
import pytest
from jax_samples import OPTIONS, assert_same, backend, batches, directional, jax, jnp, new_layer, new_state
from steps import step

from mbn.contract import Params, State


def test_traced_masks_give_the_same_results_and_compile_once(rng):
    bn, x = new_layer(), jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float32)
    given = {
        "mask": jnp.asarray(rng.random((4, 5)) < 0.7),
        "lengths": jnp.asarray([5, 3, 0, 4]),
        "sample_weight": jnp.asarray([0.5, 2.0, 1.0, 3.0]),
    }
    step = jax.jit(lambda x, given: bn.apply(bn.params, bn.state, x, training=True, **given))
    assert_same(step(x, given), bn.apply(bn.params, bn.state, x, training=True, **given), 1e-6)
    step(x, {**given, "lengths": jnp.asarray([1, 1, 1, 1])})
    assert step._cache_size() == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_values_affect_no_result_and_no_derivative(rng, training, poison):
    x, u, dy = batches(rng, 3)
    weights = jnp.asarray([1, 0, 1, 1, 0, 1, 1, 1], jnp.float32)
    masked = weights[:, None] == 0

    @jax.jit
    def everything(x, u, dy):
        def output(x):
            options = {**OPTIONS, "training": training}
            return step(backend, x, Params(jnp.ones(3), None), new_state(3), **options, weights=weights)

        def slope(x):
            return jax.vjp(lambda x: output(x)[0] ** 2, x)[1](dy)[0]

        def clean(x):  # a layer after this one has the same mask
            return jnp.where(masked, 0, x)

        bent = jax.grad(lambda x: jnp.sum(clean(slope(x) ** 2)))
        return output(x), directional(lambda x: output(x)[0], u)(x), slope(x), directional(slope, u)(x), bent(x)

    leaky = (jnp.where(masked, poison, array) for array in (x, u, dy))
    assert_same(everything(*leaky), everything(*(jnp.where(masked, 0, array) for array in (x, u, dy))))


def test_fully_masked_batch_gives_zeros_and_keeps_the_statistics():
    state = State(jnp.full(3, 2.0), jnp.full(3, 3.0), jnp.asarray(1))

    @jax.jit
    def train(x, weights):
        def loss(x):
            y, after, _ = step(backend, x, Params(jnp.ones(3), jnp.ones(3)), state, **OPTIONS, weights=weights)
            return jnp.sum(y**2), (y, after)

        return jax.value_and_grad(loss, has_aux=True)(x)

    (_, (y, after)), dx = train(jnp.full((8, 3), jnp.nan), jnp.zeros(8))
    assert not np.any(y)
    assert not np.any(dx)
    assert_same(after, state._replace(num_batches_tracked=2))


def test_invalid_traced_weights_give_nan():
    weights = jax.jit(lambda lengths, weight: backend.kernels.sample_weights((2, 3), "float32", None, lengths, weight))
    actual = weights(jnp.asarray([2, 4]), jnp.asarray([[0.5, -1.0, 2.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(actual, [[0.5, np.nan, 0.0], [np.nan] * 3])


def test_within_checks_concrete_values_and_skips_traced_ones():
    lengths, seen = jnp.asarray([0, 3]), []

    @jax.jit
    def trace(x):
        seen.extend((backend.within(x, 0, 4), backend.within(lengths, 0, 4)))
        return x

    trace(lengths)
    assert seen == [None, True]
    assert backend.within(lengths, 0, 3) is False
    assert backend.within(jnp.asarray([np.nan]), 0.0, np.inf) is False
