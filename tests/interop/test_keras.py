"""Layers from and to Keras."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
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

keras = pytest.importorskip("keras")

BACKENDS = ["numpy", "jax"]

as_keras_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""Keras's get_weights() and files read variables in a way that NumPy 2 has deprecated."""

THEIR_ARGUMENTS = [
    {},
    {"center": False},
    {"center": False, "scale": False},
    {"momentum": 0.75, "epsilon": 1e-5},
    {"momentum": 0.0, "epsilon": 0.0},
]


def theirs_of(shape=(16, CHANNELS), **arguments):
    """Return a built layer of Keras."""
    result = keras.layers.BatchNormalization(**arguments)
    result.build(shape)
    for name, value in zip(("gamma", "beta", "moving_mean", "moving_variance"), vectors(), strict=True):
        if getattr(result, name) is not None:
            getattr(result, name).assign(value)
    return result


def output(theirs, x):
    return keras.ops.convert_to_numpy(theirs(x))


def step(theirs):
    def train(x):
        theirs(x, training=True)
        return [keras.ops.convert_to_numpy(each.value) for each in (theirs.moving_mean, theirs.moving_variance)]

    return train


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axis", "shape"), AXES_AND_SHAPES)
@pytest.mark.parametrize("arguments", THEIR_ARGUMENTS)
def test_from_keras_gives_the_same_output_and_statistics(arguments, axis, shape, backend):
    theirs, x = theirs_of(shape, axis=axis, **arguments), sample(shape)
    bn = mbn.from_keras(theirs, backend=backend)
    assert not bn.training
    assert_evaluates_as(bn, output(theirs, x), x)
    assert_learns_as(bn, step(theirs), x)


@pytest.mark.parametrize(
    ("axis", "shape", "ours"),
    [
        (3, (2, 5, 7, CHANNELS), -1),
        (-1, (2, 5, 7, CHANNELS), -1),
        (4, (2, 5, 7, 3, CHANNELS), -1),
        (2, (2, 5, CHANNELS), -1),
        (1, (2, CHANNELS, 5, 7), 1),
        (-3, (2, CHANNELS, 5, 7), 1),
        (-2, (2, CHANNELS, 5), 1),
        (1, (2, CHANNELS), 1),
    ],
)
def test_from_keras_takes_channels_on_axis_1_or_the_last_of_any_number(axis, shape, ours):
    theirs, x = theirs_of(shape, axis=axis), sample(shape)
    bn = mbn.from_keras(theirs)
    assert bn.axis == ours
    y = output(theirs, x)
    if len(shape) > 3:  # positions in several axes are one axis to us
        flat = (2, CHANNELS, -1) if ours == 1 else (2, -1, CHANNELS)
        x, y = x.reshape(flat), y.reshape(flat)
    assert_evaluates_as(bn, y, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axis", "shape"), AXES_AND_SHAPES)
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"bias": False}])
def test_to_keras_gives_the_same_output_and_statistics(arguments, axis, shape, backend):
    bn, x = layer(axis=axis, correction=0, **arguments, backend=backend), sample(shape)
    theirs = mbn.to_keras(bn, ndim=len(shape))
    assert_evaluates_as(bn, output(theirs, x), x)
    assert_learns_as(bn, step(theirs), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"bias": False}, {"axis": -1}])
def test_round_trips_are_exact(arguments, backend):
    bn = layer(correction=0, **arguments, backend=backend)
    assert_same_layer(mbn.from_keras(mbn.to_keras(bn), backend=backend), bn)


@as_keras_warns
@pytest.mark.parametrize("arguments", [{}, {"center": False, "scale": False}])
def test_from_keras_takes_weights_with_default_arguments(arguments):
    theirs = theirs_of(**arguments)
    assert_same_layer(mbn.from_keras(theirs.get_weights()), mbn.from_keras(theirs))
    assert mbn.from_keras(theirs.get_weights()).eps == 1e-3


@pytest.mark.parametrize(("theirs", "ours"), [(0.99, 0.01), (0.9, 0.1), (0.999, 0.001), (0.0, 1.0), (1.0, 0.0)])
def test_momentum_converts_to_one_minus_it_in_decimal(theirs, ours):
    assert mbn.from_keras(theirs_of(momentum=theirs)).momentum == ours
    assert mbn.to_keras(layer(momentum=ours, correction=0)).momentum == theirs


def test_to_keras_copies_the_arrays():
    bn = layer(correction=0, backend="numpy")
    theirs, before = mbn.to_keras(bn), copy.deepcopy(bn)
    theirs(sample(), training=True)
    assert_same_layer(bn, before)


@as_keras_warns
def test_converted_layer_can_be_saved_and_loaded_in_a_model(tmp_path):
    bn, x = layer(correction=0), sample()
    model = keras.Sequential([keras.Input((CHANNELS,)), mbn.to_keras(bn)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_evaluates_as(bn, output(loaded, x), x)
    assert_same_layer(mbn.from_keras(loaded.layers[-1], backend="numpy"), bn)


def test_layer_that_is_not_trainable_converts_to_a_frozen_one_and_back():
    theirs = theirs_of(trainable=False)
    with warns("trainable=False", "weight and bias"):
        bn = mbn.from_keras(theirs).train()
    assert_evaluates_as(copy.deepcopy(bn), output(theirs, sample()), sample())
    np.testing.assert_array_equal(bn(sample()), bn.eval()(sample()))
    with warns("freeze", "trainable=False", "gamma and beta"):
        assert not mbn.to_keras(bn).trainable


def test_frozen_layer_without_parameters_converts_without_a_warning():
    assert not mbn.to_keras(layer(correction=0, affine=False).freeze()).trainable
    assert mbn.from_keras(theirs_of(center=False, scale=False, trainable=False))._frozen


def test_from_keras_widens_bfloat16_to_float32():
    theirs = theirs_of(dtype="bfloat16")
    with pytest.warns(mbn.ConversionWarning) as caught:
        bn = mbn.from_keras(theirs)
    said = sorted(str(warning.message) for warning in caught)
    assert [text.partition(":")[0] for text in said] == [
        "dtype policy bfloat16",
        "weight (bfloat16), bias (bfloat16), running_mean (bfloat16), running_var (bfloat16)",
    ]
    np.testing.assert_array_equal(bn.weight, keras.ops.convert_to_numpy(theirs.gamma.value).astype("float32"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": False}, ("weight", "ones")),
        ({"dtype": "mixed_float16"}, ("mixed_float16", "float16", "input")),
        ({"renorm": True}, ("renorm",)),
        ({"gamma_regularizer": "l2"}, ("gamma_regularizer",)),
        ({"beta_constraint": "non_neg"}, ("beta_constraint",)),
    ],
)
def test_from_keras_warns_of_settings_that_a_layer_lacks(arguments, words):
    theirs, x = theirs_of(**arguments), sample()
    with warns(*words):
        bn = mbn.from_keras(theirs)
    if "dtype" not in arguments:
        assert_evaluates_as(bn, output(theirs, x), x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"correction": 1}, ("running_var", "correction=1", "biased")), ({"momentum": None}, ("momentum=None", "0.99"))],
)
def test_to_keras_warns_of_settings_that_keras_lacks(arguments, words):
    bn = layer(**{"correction": 0, **arguments})
    with warns(*words):
        theirs = mbn.to_keras(bn)
    assert_evaluates_as(bn, output(theirs, sample()), sample())


def test_to_keras_refuses_a_layer_without_statistics():
    with pytest.raises(ValueError, match="Keras.*track_running_stats=False"):
        mbn.to_keras(layer(track_running_stats=False))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the others have it")
def test_to_keras_refuses_float64_where_its_backend_has_none():
    pytest.importorskip("jax", reason="the switch is JAX's")
    enable_x64 = import_module("mbn_jax.kernels.primitives").enable_x64
    bn = layer(correction=0, dtype="float64", backend="numpy")
    with enable_x64(new_val=False), pytest.raises(ValueError, match="float64.*jax_enable_x64.*float32"):
        mbn.to_keras(bn)


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda: keras.layers.Dense(3), TypeError, "keras.layers.BatchNormalization or its get_weights.., not Dense"),
        (lambda: _Other(axis=1), TypeError, "_Other has a call of its own.*get_weights"),
        (keras.layers.BatchNormalization, ValueError, "no weights yet.*layer.build"),
        (lambda: vectors()[:3], ValueError, "there are 3 weights"),
        (lambda: theirs_of(momentum=float("nan")), ValueError, "momentum .* is finite, not nan"),
        (lambda: theirs_of((CHANNELS, 3), axis=0), ValueError, "axis is 0 of 2.*axis 1 or the last"),
        (lambda: theirs_of((2, 3, CHANNELS, 3), axis=2), ValueError, "axis is 2 of 4.*axis 1 or the last"),
        (lambda: theirs_of((2, 3, CHANNELS, 3), axis=-2), ValueError, "axis is -2 of 4.*axis 1 or the last"),
        (lambda: theirs_of((CHANNELS, 2, 3), axis=-3), ValueError, "axis is -3 of 3.*axis 1 or the last"),
    ],
)
def test_from_keras_refuses_other_layers(made, error, words):
    with pytest.raises(error, match=words):
        mbn.from_keras(made())


class _Other(keras.layers.BatchNormalization):
    def call(self, x):
        return super().call(x) + 1


@pytest.mark.parametrize("ndim", [1, 4])
def test_to_keras_refuses_ndim_other_than_2_or_3(ndim):
    with pytest.raises(ValueError, match="ndim is 2 .* or 3"):
        mbn.to_keras(layer(correction=0), ndim=ndim)


def test_conversion_works_on_the_torch_backend_of_keras():
    """Keras cannot change its backend in a process, so this test starts another."""
    pytest.importorskip("torch")
    script = """
import keras, mbn, numpy as np
assert keras.backend.backend() == "torch"
x = np.random.default_rng(0).normal(1, 2, (16, 5)).astype(np.float32)
for dtype in ("float32", "float64"):
    bn = mbn.BatchNorm1d(5, dtype=dtype, correction=0, momentum=0.25, backend="numpy")
    bn(x)
    theirs = mbn.to_keras(bn)
    back = mbn.from_keras(theirs, backend="numpy")
    for layer in (bn.eval(), back):
        np.testing.assert_allclose(layer(x), theirs(x).detach().cpu().numpy(), rtol=0, atol=1e-6)
    theirs(x + 1, training=True)
    bn.train()(x + 1)
    for ours, name in ((bn.running_mean, "moving_mean"), (bn.running_var, "moving_variance")):
        np.testing.assert_allclose(ours, getattr(theirs, name).value.detach().cpu().numpy(), rtol=1e-6)
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Pair(mbn.Group):
    rank, size = 0, 2

    def gather(self, vector):
        raise NotImplementedError


def test_synchronized_layer_has_the_group_of_all_processes():
    theirs = theirs_of()
    assert mbn.from_keras(theirs).group is None
    theirs.synchronized = True  # Keras takes the argument on TensorFlow alone
    converted = mbn.from_keras(theirs)
    assert converted.group is True
    x = sample()
    np.testing.assert_array_equal(converted(x), mbn.from_keras(theirs_of())(x))  # evaluation is local


@pytest.mark.parametrize("group", [True, Pair()], ids=["all processes", "a group"])
def test_group_is_synchronized_on_tensorflow_alone(group, monkeypatch):
    converted = layer(group=group, correction=0)
    if keras.backend.backend() != "tensorflow":
        with warns("on TensorFlow alone"):
            assert not mbn.to_keras(converted).synchronized
        monkeypatch.setattr(keras.src.layers.normalization.batch_normalization.backend, "backend", lambda: "tensorflow")
        monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with nullcontext() if group is True else warns("Keras synchronizes all replicas"):
        assert mbn.to_keras(converted).synchronized
