"""JAX's export of programs for any batch size or sequence length."""

import math

import numpy as np
import pytest
from jax_samples import assert_same, jax, jnp, new_state

import mbn
from mbn.contract import Params
from mbn_jax.kernels.channel_sums import careful_sums
from mbn_jax.kernels.primitives import usual_rules

export = pytest.importorskip("jax.export")

LAYER = mbn.BatchNorm1d(4, backend="jax")


def step(params, x, masking, *, training):
    def total(params, x):
        y, state = LAYER.apply(params, new_state(4), x, training=training, **masking)
        return jnp.sum(y**3), (y, state)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(params, x)


def masking(rng, name, shape):
    n, _, *length = shape
    return {
        "none": {},
        "mask": {"mask": np.arange(n * math.prod(length)).reshape(n, *length) % 3 > 0},
        "lengths": {"lengths": 1 + rng.integers(0, sum(length) or 1, n)},
    }[name]


@pytest.mark.parametrize(
    ("sizes", "name", "training", "platforms"),
    [
        ("b, 4", "none", True, ["cpu", "cuda"]),
        ("b, 4", "mask", False, ["cpu"]),
        ("b, 4, l", "none", False, ["cpu"]),
        ("b, 4, l", "lengths", True, ["cpu", "cuda"]),
    ],
)
def test_exported_program_serves_any_batch_size_and_length(rng, sizes, name, training, platforms):
    function = jax.jit(lambda params, x, masking: step(params, x, masking, training=training))
    params = Params(jnp.asarray([1.0, 2, 3, 4]), jnp.ones(4))
    shape = export.symbolic_shape(sizes)
    given = {
        key: jax.ShapeDtypeStruct((shape[0], *shape[2:])[: value.ndim], jnp.asarray(value).dtype)
        for key, value in masking(rng, name, (2, 4, 2)[: len(shape)]).items()
    }
    program = export.export(function, platforms=platforms)(params, jax.ShapeDtypeStruct(shape, np.float32), given)
    for n, length in ((2, 5), (300, 7)):
        x = (1000 + rng.standard_normal((n, 4, length)[: len(shape)])).astype(np.float32)
        given = jax.tree.map(jnp.asarray, masking(rng, name, x.shape))
        actual, expected = (call(params, jnp.asarray(x), given) for call in (program.call, function))
        for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            assert_same(one, other, 2e-6 * max(1.0, float(np.max(np.abs(other)))))


def test_careful_sums_are_accurate_and_keep_infinity(rng):
    terms = rng.standard_normal((5000, 3)) * np.exp(5 * rng.standard_normal((5000, 3)))
    terms[-1] -= terms.sum(0)  # the sum is now that of the rounding errors alone
    with usual_rules():
        (actual,) = jax.jit(lambda terms: careful_sums([terms], (0,)))(terms)
        (infinite,) = careful_sums([jnp.asarray([[1.0], [np.inf]])], (0,))
    np.testing.assert_allclose(actual, [math.fsum(channel) for channel in terms.T], rtol=1e-12)
    assert infinite.tolist() == [np.inf]
