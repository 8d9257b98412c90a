"""Shared by the tests of all packages: layers with known values, and the checks that two layers are the same."""

import numpy as np
import pytest

import mbn
from mbn.conformance import oracle, ulp

CHANNELS = 5

SHAPES = {1: [(16, CHANNELS), (8, CHANNELS, 7)], -1: [(16, CHANNELS), (8, 7, CHANNELS)]}
"""By axis: shapes with the channels on it."""

AXES_AND_SHAPES = [(axis, shape) for axis, shapes in SHAPES.items() for shape in shapes]

ARGUMENTS = [{}, {"affine": False}, {"eps": 1e-3, "momentum": 0.25}, {"eps": 0.0, "momentum": 1.0}]


def sample(shape=(16, CHANNELS), *, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(dtype)


def vectors(*, seed=0, dtype="float32"):
    """Return weight, bias, running mean and running variance, with random values."""
    draw = np.random.default_rng(seed)
    values = draw.normal(1, 1, CHANNELS), draw.normal(0, 1, CHANNELS), draw.normal(1, 1, CHANNELS)
    return [value.astype(dtype) for value in (*values, draw.uniform(0.5, 4, CHANNELS))]


def layer(**arguments):
    """Return a layer in evaluation mode; as many of the vectors as it has entries for are its values."""
    bn = mbn.BatchNorm1d(CHANNELS, **arguments)
    dtype = arguments.get("dtype", "float32")
    for name, value in zip(("weight", "bias", "running_mean", "running_var"), vectors(dtype=dtype), strict=True):
        if getattr(bn, name) is not None:
            setattr(bn, name, value)
    return bn.eval()


def assert_evaluates_as(bn, y, x, *, bound=2.0):
    """Check the output y of another package, with the values of a layer, against the layer's own output, in ulp.

    The ulp is that of the largest term of the sum: a term of the layer, or the scaled mean, which others compute alone.
    """
    ours, y, axis = mbn.to_numpy(bn.eval()(x)), np.asarray(y), bn.axis
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    weight, bias, mean, var = _entries(bn)
    exact = oracle.evaluate(np.moveaxis(x, axis, 1), mean, var, weight, bias, eps=bn.eps)
    scaled_mean = abs(mean / np.sqrt(var + bn.eps) * (1 if weight is None else weight))
    magnitude = exact.magnitude + scaled_mean.reshape(-1, *[1] * (x.ndim - 2))
    a, b = np.moveaxis(ours, axis, 1), np.moveaxis(y, axis, 1)
    assert ulp.distance(a, b, magnitude, x.dtype.name) <= bound


def assert_learns_as(bn, step, x, *, bound=4.0):
    """Check a layer's statistics after a training step against those of another package, ``step(x)``, in ulp."""
    _, _, mean, var = _entries(bn)
    momentum = 1 / (int(bn.num_batches_tracked) + 1) if bn.momentum is None else bn.momentum
    truth = oracle.train(np.moveaxis(x, bn.axis, 1), mean, var, momentum=momentum, eps=bn.eps, correction=bn.correction)
    bn.train()(x)
    for theirs, name in zip(step(x), ("running_mean", "running_var"), strict=True):
        old = {"running_mean": mean, "running_var": var}[name]
        ours, exact = mbn.to_numpy(getattr(bn, name)), getattr(truth, name)
        assert not np.array_equal(ours, old)
        assert ulp.distance(ours, np.asarray(theirs), exact.magnitude, ours.dtype.name) <= bound


def assert_same_layer(a, b):
    """Check that two layers are the same in all but backend and device."""
    (a_arguments, a_entries, *a_modes), (b_arguments, b_entries, *b_modes) = a._snapshot(), b._snapshot()
    assert a_arguments == b_arguments
    assert a_modes == b_modes
    assert list(a_entries) == list(b_entries)
    for key, value in a_entries.items():
        assert value.dtype == b_entries[key].dtype
        np.testing.assert_array_equal(value, b_entries[key])


def warns(*words):
    """Expect a warning about a conversion that has each of these words."""
    return pytest.warns(mbn.ConversionWarning, match="".join(f"(?=.*{word})" for word in words))


def _entries(bn):
    entries = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return [None if entry is None else mbn.to_numpy(entry) for entry in entries]
