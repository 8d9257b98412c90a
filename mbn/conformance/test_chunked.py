"""Lazy arrays: ``fit`` and evaluation of Dask's arrays do not depend on their blocks, nor on the scheduler."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance import oracle
from mbn.conformance.target import Target, assert_same, configured

dask = pytest.importorskip("dask", reason="dask is not installed")
array = pytest.importorskip("dask.array", reason="dask is not installed")

CUTS = [
    pytest.param((60, 6), (7, 6), 1, id="rows"),
    pytest.param((60, 6), (60, 4), 1, id="channels"),
    pytest.param((60, 6), ((0, 1, 59, 0), (1, 5)), 1, id="empty blocks and one value"),
    pytest.param((20, 6, 5), (6, 4, 2), 1, id="rows, channels and positions"),
    pytest.param((20, 5, 6), (6, 2, 4), -1, id="channels last"),
]
"""Shapes, their chunks and the axis of the channels."""


def sample(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(21).normal(50, 3, shape).astype(np.float32).astype(dtype)


def lazy(x: np.ndarray, chunks: Any) -> Any:
    return array.from_array(x, chunks=chunks)


def evaluating(target: Target, num_features: int, **arguments: Any) -> mbn.BatchNorm1d:
    bn = configured(target.layer(num_features, **arguments), seed=4)
    bn.running_mean = np.linspace(45, 55, num_features)
    return bn.eval()


def assert_bits(y: Any, whole: np.ndarray) -> None:
    """Check a lazy output against that of the whole array: what it says of itself, then its values."""
    assert (y.dtype, y.shape, type(y._meta)) == (whole.dtype, whole.shape, np.ndarray)  # noqa: SLF001
    computed = y.compute(scheduler="synchronous")
    np.testing.assert_array_equal(computed, whole, strict=True)


@pytest.mark.parametrize(("shape", "chunks", "axis"), CUTS)
def test_fit_of_lazy_array_does_not_depend_on_blocks(
    target: Target, shape: tuple[int, ...], chunks: Any, axis: int
) -> None:
    x = sample(shape)
    bn = configured(target.layer(6, axis=axis), seed=1)
    assert bn.fit(lazy(x, chunks), progress=False) is bn
    channels_first = x.swapaxes(1, 2) if axis == -1 else x
    truth = oracle.train(channels_first, np.zeros(6), np.ones(6), momentum=1.0, eps=1.0)
    target.assert_statistic(bn.running_mean, truth.running_mean, "float32")
    target.assert_statistic(bn.running_var, truth.running_var, "float32")
    assert int(bn.num_batches_tracked) == 1


def test_fit_of_lazy_array_has_the_same_bits_on_every_scheduler(target: Target) -> None:
    blocks = lazy(sample((300, 6)), (7, 4))
    layers = []
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            layers.append(target.layer(6).fit(blocks, progress=False))
    assert_same(*map(target.snapshot, layers))


def test_fit_of_lazy_array_is_accurate_over_a_thousand_blocks(target: Target) -> None:
    x = (1e6 + np.random.default_rng(16).standard_normal((3000, 3))).astype(np.float32)
    bn = target.layer(3).fit(lazy(x, (3, 3)), progress=False)
    truth = oracle.train(x, np.zeros(3), np.ones(3), momentum=1.0, eps=1.0)
    assert np.abs(target.numpy(bn.running_mean) / truth.running_mean.hi - 1).max() <= 2.4e-7
    assert np.abs(target.numpy(bn.running_var) / truth.running_var.hi - 1).max() <= 2.4e-7


def test_fit_of_large_float64_blocks_is_exact(target: Target) -> None:
    target.require_dtype("float64")
    target.require("any_size")
    x = sample((40, 4), "float64") * [1e-200, 1, 1e3, 1e170]
    bn = target.layer(4, dtype="float64").fit(lazy(x, (9, 1)), progress=False)
    truth = oracle.train(x, np.zeros(4), np.ones(4), momentum=1.0, eps=1.0)
    target.assert_statistic(bn.running_mean, truth.running_mean, "float64")
    target.assert_statistic(bn.running_var, truth.running_var, "float64")


def test_fit_takes_blocks_of_unknown_sizes(target: Target) -> None:
    x = sample((60, 6))
    blocks = lazy(x, (7, 4))
    bn = target.layer(None).fit(blocks[array.from_array(x[:, 0] > 0, 7)], progress=False)
    assert_same(target.snapshot(bn), target.snapshot(target.layer(6).fit(blocks, progress=False)))


def test_blocks_may_be_arrays_of_the_backend(target: Target) -> None:
    x = sample((60, 6))
    try:
        blocks = lazy(x, (25, 6)).map_blocks(target.array, dtype=x.dtype, meta=target.array(x[:0]))
    except (TypeError, AttributeError) as error:
        pytest.skip(f"{target.backend.name} declares no arrays that Dask can hold: {type(error).__name__}")
    bn = mbn.BatchNorm1d(6, device=target.device).fit(blocks, progress=False)
    assert bn.backend == mbn.registry.owner_of(target.array(x)).name
    assert_same(target.snapshot(bn), target.snapshot(target.layer(6).fit(lazy(x, (25, 6)), progress=False)))
    bn.eval()
    parts = dask.compute(*bn(blocks).to_delayed().ravel(), scheduler="synchronous")
    np.testing.assert_array_equal(np.concatenate([*map(target.numpy, parts)]), target.numpy(bn(target.array(x))))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "chunks", "axis"), CUTS)
def test_lazy_output_has_the_bits_of_the_whole_call(
    target: Target, shape: tuple[int, ...], chunks: Any, axis: int, dtype: str
) -> None:
    target.require_dtype(dtype)
    x = sample(shape, dtype)
    bn = evaluating(target, 6, axis=axis, dtype="float64" if dtype == "float64" else "float32")
    blocks = lazy(x, chunks)
    y = bn(blocks)
    assert y.chunks == blocks.chunks
    assert_bits(y, target.numpy(bn(x)))


@pytest.mark.parametrize("large", [(4096, 96), (64, 96, 40)], ids=str)
def test_large_lazy_output_has_the_bits_of_the_whole_call(target: Target, large: tuple[int, ...]) -> None:
    x, bn = sample(large), evaluating(target, 96)
    assert_bits(bn(lazy(x, (large[0] // 3, 41, *large[2:]))), target.numpy(bn(x)))


@pytest.mark.parametrize("is_lazy", [True, False])
@pytest.mark.parametrize(("shape", "chunks", "axis"), CUTS)
def test_lazy_output_takes_masks(
    target: Target, shape: tuple[int, ...], chunks: Any, axis: int, *, is_lazy: bool
) -> None:
    target.require("masks")
    generator = np.random.default_rng(5)
    x, samples = sample(shape), shape[:1] + (shape[2:] if axis == 1 else shape[1:-1])
    arguments = {"mask": generator.random(samples) > 0.3, "sample_weight": generator.integers(0, 3, shape[0])}
    if len(shape) == 3:
        arguments["lengths"] = generator.integers(0, samples[1] + 1, shape[0])
    given = {name: lazy(values, 4) for name, values in arguments.items()} if is_lazy else arguments
    bn = evaluating(target, 6, axis=axis)
    assert_bits(bn(lazy(x, chunks), **given), target.numpy(bn(x, **arguments)))


def test_lazy_output_with_a_length_beyond_the_sequence_is_an_error(target: Target) -> None:
    target.require("masks")
    y = evaluating(target, 6)(lazy(sample((8, 6, 5)), (3, 6, 2)), lengths=lazy(np.array([5, 0, 6, 1, 2, 3, 4, 5]), 3))
    with pytest.raises(ValueError, match="lengths has a value of 6"):
        y.compute(scheduler="synchronous")


def test_lazy_output_does_not_change_with_the_layer(target: Target) -> None:
    x, bn = sample((60, 6)), evaluating(target, 6)
    whole, y = target.numpy(bn(x)), bn(lazy(x, (7, 4)))
    if target.capabilities.mutable and isinstance(bn.running_mean, np.ndarray):
        bn.running_mean[...] = 0
    bn.running_mean, bn.weight, bn.eps = 0.0, 9.0, 1.0
    bn.train()(target.array(x))
    assert_bits(y, whole)


@pytest.mark.parametrize(
    "call",
    [
        lambda bn, x: bn.train()(x),
        lambda bn, x: bn.vjp(x),
        lambda bn, x: mbn.functional.batch_norm(x, training=True, backend=bn.backend),
        lambda bn, x: bn.apply(bn.params, bn.state, x, training=True),
    ],
    ids=["train", "vjp", "function", "apply"],
)
def test_training_on_lazy_array_is_an_error(target: Target, call: Callable[[mbn.BatchNorm1d, Any], Any]) -> None:
    bn = evaluating(target, 6)
    before = target.snapshot(bn)
    with pytest.raises(TypeError, match="x is a Dask array, which is lazy"):
        call(bn, lazy(sample((60, 6)), 7))
    assert_same(before, target.snapshot(bn))


def test_functions_take_lazy_arrays(target: Target) -> None:
    x, bn = sample((60, 6)), evaluating(target, 6)
    arguments = {"running_mean": bn.running_mean, "running_var": bn.running_var, "backend": target.backend}
    result = mbn.functional.batch_norm(lazy(x, (7, 4)), **arguments)
    assert_bits(result.output, target.numpy(mbn.functional.batch_norm(target.array(x), **arguments).output))
    weight, bias = sample((6, 9)), sample((6,))
    folded = mbn.fold_linear(lazy(weight, (4, 2)), lazy(bias, 4), bn)
    for given, whole in zip(folded, mbn.fold_linear(weight, bias, bn), strict=True):
        assert_bits(given, target.numpy(whole))
