"""Derivatives on JAX, to the third order and in every mode."""

import numpy as np
import pytest
from jax_samples import NOTHING, OPTIONS, assert_same, backend, batches, directional, jax, jnp, relative_error
from steps import step

import mbn
from mbn.conformance import derivatives
from mbn.contract import Batch, Params, State, Stats


@pytest.mark.parametrize(("shape", "weighted"), [((3, 2, 4), False), ((6, 2), True)])
def test_derivatives_to_third_order_are_accurate_in_every_mode(rng, shape, weighted):
    x, u, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
    weight, bias = jnp.asarray([2.0, -0.5]), jnp.asarray([1.0, 0.0])
    weights = jnp.asarray(rng.integers(0, 3, (shape[0], *shape[2:])) / 2, jnp.float32) if weighted else None

    def output(x):
        return step(backend, x, Params(weight, bias), NOTHING[1], **OPTIONS, weights=weights)[0]

    def loss(x):
        return jnp.sum(dy * output(x) ** 2) / 2

    def twice(function):
        return jax.grad(lambda x: jnp.vdot(function(x), u))

    slope = jax.grad(loss)
    second = {"reverse": twice(slope), "mixed": directional(slope, u)}
    third = {
        "reverse": twice(twice(slope)),
        "mixed": directional(directional(slope, u), u),
        "reverse of mixed": twice(directional(slope, u)),
        "mixed of reverse": directional(twice(slope), u),
    }
    forwards = [output, directional(output, u)]
    forwards += [directional(forwards[-1], u)]
    forwards += [directional(forwards[-1], u)]
    host = [np.asarray(array, np.float64) for array in (x, u, dy, weight, bias)]
    truth = derivatives.along(
        *host, eps=1e-5, weights=None if weights is None else np.asarray(weights, np.float64), power=2
    )
    counted = 1 if weights is None else np.asarray(weights > 0).reshape(shape[0], 1, *shape[2:])
    actual = jax.jit(lambda x: [[f(x) for f in group] for group in (forwards, second.values(), third.values())])(x)
    for y, expected in zip(actual[0], truth, strict=True):
        assert relative_error(y, expected.y * counted) < 1e-6
    for order in (2, 3):
        for dx in actual[order - 1]:
            assert relative_error(dx, truth[order - 1].dx) < 1e-6


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-7])
def test_derivatives_of_two_values_are_accurate_in_every_mode(rng, eps):
    # Two values are combinations of a constant and xhat, so the gradient cancels but for a remainder of order eps.
    x, u, dy = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(3))
    weight, bias = jnp.asarray([2.0, -0.5, 1.0]), jnp.asarray([1.0, 0.0, 0.5])

    def output(x):
        return step(backend, x, Params(weight, bias), NOTHING[1], **{**OPTIONS, "eps": eps})[0]

    slope = jax.grad(lambda x: jnp.vdot(dy, output(x)))
    curve = jax.grad(lambda x: jnp.vdot(slope(x), u))
    forwards, backwards = [output, directional(output, u)], [slope, directional(slope, u), curve]
    actual = jax.jit(lambda x: [[f(x) for f in group] for group in (forwards, backwards)])(x)
    host = [np.asarray(array, np.float64) for array in (x, u, dy, weight, bias)]
    truth = derivatives.along(*host, eps=eps)
    for y, expected in zip(actual[0], truth, strict=False):
        assert relative_error(y, expected.y) < 1e-6
    for dx, expected in zip(actual[1], (truth[0], truth[1], truth[1]), strict=True):
        assert relative_error(dx, expected.dx) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_many_values_far_from_zero_are_accurate(rng, weighted):
    shape = 100_000, 2
    x = (1e4 + rng.standard_normal(shape)).astype(np.float32)
    dy = (100 + rng.standard_normal(shape)).astype(np.float32)
    w = (rng.integers(0, 3, (100_000, 1)) / 2 if weighted else np.ones((100_000, 1))).astype(np.float32)

    @jax.jit
    def slopes(x, weight, weights):
        def loss(x, weight):
            return jnp.sum(dy * step(backend, x, Params(weight, None), NOTHING[1], **OPTIONS, weights=weights)[0])

        return jax.grad(loss, (0, 1))(x, weight)

    weights = jnp.asarray(w[:, 0]) if weighted else None
    dx, dweight = slopes(jnp.asarray(x), jnp.ones(2), weights)
    x, n, dy = x - np.float64(1e4), np.sum(w, dtype=np.float64), np.where(w > 0, dy, np.float64(0))
    x -= (w * x).sum(axis=0) / n
    invstd = 1 / np.sqrt((w * x**2).sum(axis=0) / n + 1e-5)
    xhat = x * invstd
    truth = np.sum(dy * xhat, axis=0)
    assert relative_error(dweight, truth) < 3e-6
    assert relative_error(dx, invstd * (dy - w * np.sum(dy, axis=0) / n - w * xhat * truth / n)) < 3e-6


def test_evaluation_has_gradients_of_the_running_statistics(rng):
    x, dy = batches(rng, 2)
    mean, var, weight = (jnp.asarray(rng.uniform(0.5, 2.0, 3), jnp.float32) for _ in range(3))

    def loss(x, mean, var, weight):
        options = {**OPTIONS, "training": False}
        return jnp.sum(dy * step(backend, x, Params(weight, None), State(mean, var, None), **options)[0])

    slopes = jax.grad(loss, (0, 1, 2, 3))(x, mean, var, weight)
    x, dy, mean, var, weight = (np.asarray(array, np.float64) for array in (x, dy, mean, var, weight))
    invstd = 1 / np.sqrt(var + 1e-5)
    xhat = (x - mean) * invstd
    dx = weight * invstd * dy
    truth = dx, -dx.sum(axis=0), -(weight * dy * xhat).sum(axis=0) * invstd**2 / 2, (dy * xhat).sum(axis=0)
    for actual, expected in zip(slopes, truth, strict=True):
        assert relative_error(actual, expected) < 1e-6


def test_gradient_of_composed_kernels_is_that_of_the_step(rng):
    x, dy = batches(rng, 2)
    weights = jnp.asarray([1, 2, 0, 1, 1, 0.5, 1, 1], jnp.float32)

    def loss(x):
        kernels, batch = backend.kernels, Batch(x, weights)
        moments = kernels.moments(batch)
        stats = Stats(moments.mean, kernels.variance(moments, 0), moments.count)
        return jnp.sum(dy * kernels.normalize(batch, stats, NOTHING[0], 1e-5))

    def of_step(x):
        return jnp.sum(dy * step(backend, x, *NOTHING, **OPTIONS, weights=weights)[0])

    assert_same(jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(of_step))(x), 2e-6)


def test_pullback_has_derivatives_with_respect_to_x_and_weight(rng):
    x, dy = batches(rng, 2)
    weight = jnp.asarray([1.0, 2.0, 3.0])

    def by_hand(x, weight):
        _, pullback = mbn.functional.batch_norm_vjp(x, None, None, weight, training=True)
        return pullback(dy)[0][0]

    def by_jax(x, weight):
        return jax.vjp(lambda x: mbn.functional.batch_norm(x, None, None, weight, training=True).output, x)[1](dy)[0][0]

    assert_same(jax.jacrev(by_hand, (0, 1))(x, weight), jax.jacfwd(by_jax, (0, 1))(x, weight), 1e-6)
