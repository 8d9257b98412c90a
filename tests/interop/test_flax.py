"""Layers from and to flax, nnx and linen."""

import copy
from importlib import import_module

import numpy as np
import pytest
from interop_samples import (
    ARGUMENTS,
    AXES_AND_SHAPES,
    CHANNELS,
    assert_evaluates_as,
    assert_learns_as,
    assert_same_layer,
    layer,
    sample,
    vectors,
    warns,
)

import mbn

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
jax = pytest.importorskip("jax")
enable_x64 = import_module("mbn_jax.kernels.primitives").enable_x64

BACKENDS = ["numpy", "jax"]

THEIR_ARGUMENTS = [
    {},
    {"use_bias": False},
    {"use_bias": False, "use_scale": False},
    {"momentum": 0.75, "epsilon": 1e-3},
    {"momentum": 0.0, "epsilon": 0.0},
]


def module(**arguments):
    """Return an nnx module in training mode."""
    result = nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0), **arguments)
    for name, value in zip(("scale", "bias", "mean", "var"), vectors(), strict=True):
        variable = getattr(result, name)
        if variable is not None:
            variable[...] = jax.numpy.asarray(value, variable[...].dtype)
    return result


def module_and_variables(**arguments):
    """Return a linen module in no mode, and its variables."""
    result = linen.BatchNorm(**arguments)
    weight, bias, mean, var = vectors()
    used = {"scale": result.use_scale, "bias": result.use_bias}
    params = {name: value for name, value in {"scale": weight, "bias": bias}.items() if used[name]}
    return result, {"params": params, "batch_stats": {"mean": mean, "var": var}}


def step(module):
    def train(x):
        module.train()
        module(x)
        return module.mean[...], module.var[...]

    return train


def linen_step(module, variables):
    def train(x):
        module_in_training = module.clone(use_running_average=False)
        stats = module_in_training.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
        return stats["mean"], stats["var"]

    return train


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axis", "shape"), AXES_AND_SHAPES)
@pytest.mark.parametrize("arguments", THEIR_ARGUMENTS)
def test_from_nnx_gives_the_same_output_and_statistics(arguments, axis, shape, backend):
    theirs, x = module(axis=axis, **arguments), sample(shape)
    bn = mbn.from_flax(theirs, backend=backend)
    assert bn.training
    theirs.eval()
    assert not mbn.from_flax(theirs).training
    assert_evaluates_as(bn, theirs(x), x)
    assert_learns_as(bn, step(theirs), x, bound=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axis", "shape"), AXES_AND_SHAPES)
@pytest.mark.parametrize("arguments", THEIR_ARGUMENTS)
def test_from_linen_gives_the_same_output_and_statistics(arguments, axis, shape, backend):
    theirs, variables = module_and_variables(axis=axis, **arguments)
    bn, x = mbn.from_flax(theirs, variables, backend=backend), sample(shape)
    assert not bn.training
    assert_evaluates_as(bn, theirs.apply(variables, x, use_running_average=True), x)
    assert_learns_as(bn, linen_step(theirs, variables), x, bound=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axis", "shape"), AXES_AND_SHAPES)
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"bias": False}])
def test_to_nnx_gives_the_same_output_and_statistics(arguments, axis, shape, backend):
    bn, x = layer(axis=axis, correction=0, **arguments, backend=backend), sample(shape)
    theirs = mbn.to_flax(bn)
    assert theirs.use_running_average is True
    assert mbn.to_flax(copy.deepcopy(bn).train()).use_running_average is False
    assert_evaluates_as(bn, theirs(x), x)
    assert_learns_as(bn, step(theirs), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axis", "shape"), AXES_AND_SHAPES)
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"bias": False}])
def test_to_linen_gives_the_same_output_and_statistics(arguments, axis, shape, backend):
    bn, x = layer(axis=axis, correction=0, **arguments, backend=backend), sample(shape)
    theirs, variables = mbn.to_flax(bn, linen=True)
    assert jax.tree.structure(variables) == jax.tree.structure(theirs.init(jax.random.key(0), x))
    assert_evaluates_as(bn, theirs.apply(variables, x), x)
    assert_learns_as(bn, linen_step(theirs, variables), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"bias": False}, {"axis": -1}])
def test_round_trips_are_exact(arguments, training, backend):
    bn = layer(correction=0, **arguments, backend=backend).train(training)
    assert_same_layer(mbn.from_flax(mbn.to_flax(bn), backend=backend), bn)
    assert_same_layer(mbn.from_flax(*mbn.to_flax(bn, linen=True), backend=backend), bn)


@pytest.mark.parametrize(("theirs", "ours"), [(0.99, 0.01), (0.9, 0.1), (0.999, 0.001), (0.0, 1.0), (1.0, 0.0)])
def test_momentum_converts_to_one_minus_it_in_decimal(theirs, ours):
    bn = mbn.from_flax(module(momentum=theirs))
    assert bn.momentum == ours
    bn = layer(momentum=ours, correction=0)
    assert mbn.to_flax(bn).momentum == theirs


def test_momentum_as_a_jax_scalar_converts_as_it_is_printed():
    assert mbn.from_flax(module(momentum=jax.numpy.float32(0.99))).momentum == 0.01


def test_from_flax_takes_an_axis_in_a_tuple():
    assert mbn.from_flax(module(axis=(-1,))).axis == -1


def test_to_flax_copies_the_arrays():
    bn = layer(correction=0, backend="jax")
    theirs, before = mbn.to_flax(bn), copy.deepcopy(bn)
    theirs.train()
    theirs(sample())
    assert_same_layer(bn, before)


def test_to_flax_makes_a_module_with_accurate_variance_for_large_means():
    theirs, x = mbn.to_flax(layer(correction=0, momentum=1.0)), sample() + 1000
    np.testing.assert_allclose(step(theirs)(x)[1], x.astype("float64").var(axis=0), rtol=1e-5)


def test_float64_stays_float64():
    x = sample(dtype="float64")
    with enable_x64(new_val=True):
        bn = layer(correction=0, dtype="float64", backend="jax")
        theirs, (other, variables) = mbn.to_flax(bn), mbn.to_flax(bn, linen=True)
        assert_evaluates_as(bn, theirs(x), x, bound=4)
        assert_evaluates_as(bn, other.apply(variables, x), x, bound=4)
        assert_same_layer(mbn.from_flax(theirs, backend="jax"), bn)
        assert_learns_as(bn, step(theirs), x, bound=8)


def test_to_flax_refuses_float64_without_the_64_bit_mode():
    with enable_x64(new_val=False), pytest.raises(ValueError, match="jax_enable_x64.*float32"):
        mbn.to_flax(layer(correction=0, dtype="float64", backend="numpy"))


def test_from_flax_widens_bfloat16_to_float32():
    theirs = module(param_dtype=jax.numpy.bfloat16)
    with warns("weight .bfloat16., bias .bfloat16.: ", "float32"):
        bn = mbn.from_flax(theirs)
    np.testing.assert_array_equal(bn.weight, theirs.scale[...].astype("float32"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"use_scale": False}, ("weight", "ones")),
        ({"dtype": jax.numpy.bfloat16}, ("dtype=bfloat16", "input")),
        ({"axis_name": "batch", "axis_index_groups": [[0, 1]]}, ("axis_index_groups", "whole axes", "bn.group")),
    ],
)
def test_from_flax_warns_of_settings_that_a_layer_lacks(arguments, words):
    with warns(*words):
        mbn.from_flax(module(**arguments))
    with warns(*words):
        mbn.from_flax(*module_and_variables(**arguments))


@pytest.mark.parametrize("axis", ["batch", ("data", "model")])
def test_axis_name_is_the_group_of_the_layer(axis):
    for given in (module(axis_name=axis),), module_and_variables(axis_name=axis):
        bn = mbn.from_flax(*given, backend="jax")
        assert bn.group == axis
        assert mbn.to_flax(bn).axis_name == axis
        assert mbn.to_flax(bn, linen=True)[0].axis_name == axis
    assert mbn.to_flax(layer(correction=0)).axis_name is None


def test_from_flax_warns_where_the_backend_has_no_named_axes():
    with warns("group='batch'", "on numpy", "statistics of its own batch"):
        bn = mbn.from_flax(module(axis_name="batch"), backend="numpy")
    assert bn.group is None


def test_layer_with_an_axis_name_trains_along_it_as_flax_does():
    theirs, x = module(axis_name="batch", use_fast_variance=False), sample((8, CHANNELS)).reshape(2, 4, CHANNELS)
    bn = mbn.from_flax(theirs, backend="jax")
    train = jax.vmap(lambda x: bn.apply(bn.params, bn.state, x, training=True), out_axes=(0, None), axis_name="batch")
    y, state = train(x)
    expected = nnx.vmap(lambda module, x: module(x), in_axes=(nnx.StateAxes({...: None}), 0), axis_name="batch")(
        theirs, x
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.running_mean, theirs.mean[...], rtol=1e-6)
    np.testing.assert_allclose(state.running_var, theirs.var[...], rtol=1e-6)


def test_from_flax_adds_a_weight_of_ones_to_a_bias_alone():
    theirs = module(use_scale=False)
    with warns("weight", "ones"):
        bn = mbn.from_flax(theirs)
    theirs.eval()
    assert_evaluates_as(bn, theirs(sample()), sample())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"correction": 1}, ("running_var", "correction=1", "biased")),
        ({"momentum": None}, ("momentum=None", "0.99")),
        ({"momentum": 1e-20}, ("momentum=1e-20", "old value", "1.0")),
        ({"group": True}, ("group=True", "named axis")),
    ],
)
@pytest.mark.parametrize("is_linen", [False, True])
def test_to_flax_warns_of_settings_that_flax_lacks(arguments, words, is_linen):
    bn = layer(**{"correction": 0, **arguments})
    with warns(*words):
        theirs = mbn.to_flax(bn, linen=is_linen)
    y = theirs[0].apply(theirs[1], sample()) if is_linen else theirs(sample())
    assert_evaluates_as(bn, y, sample())


def test_to_flax_makes_an_evaluation_module_of_a_frozen_layer():
    with warns("freeze", "evaluation"):
        theirs = mbn.to_flax(layer(correction=0).train().freeze())
    assert theirs.use_running_average is True


def test_to_flax_refuses_a_layer_without_statistics():
    for is_linen in (False, True):
        with pytest.raises(ValueError, match="flax.*track_running_stats=False"):
            mbn.to_flax(layer(track_running_stats=False), linen=is_linen)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: (nnx.LayerNorm(3, rngs=nnx.Rngs(0)),), "flax.nnx.BatchNorm or flax.linen.BatchNorm, not LayerNorm"),
        (lambda: (linen.LayerNorm(), {}), "not LayerNorm"),
        (lambda: (linen.BatchNorm(),), "linen module has no arrays.*variables"),
        (lambda: (module(), {}), "leave the variables out"),
        (lambda: (_Other(3, rngs=nnx.Rngs(0)),), "_Other has a __call__ of its own"),
        (lambda: (nnx.eval_shape(module),), "weight has no values.*ShapeDtypeStruct"),
    ],
)
def test_from_flax_refuses_other_modules(made, words):
    with pytest.raises(TypeError, match=words):
        mbn.from_flax(*made())


class _Other(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(x) + 1


@pytest.mark.parametrize("axis", [0, 2, (1, 2), (-1, -2)])
def test_from_flax_refuses_axes_other_than_1_and_the_last(axis):
    with pytest.raises(ValueError, match="axis is .*1 or -1: transpose or reshape"):
        mbn.from_flax(module(axis=axis))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"params": {"bn": {"scale": np.ones(3), "bias": np.ones(3)}}, "batch_stats": {"bn": {}}},
        {"batch_stats": {"mean": np.ones(3), "var": np.ones(3)}},
    ],
)
def test_from_flax_refuses_variables_of_another_module(variables):
    with pytest.raises(
        ValueError, match="variables are .*batch_stats/mean, batch_stats/var, params/bias, params/scale"
    ):
        mbn.from_flax(linen.BatchNorm(), variables)
