"""Accuracy: outputs and statistics are within the bounds, on values where a bad algorithm loses digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbn.conformance import oracle, strategies, ulp
from mbn.conformance.target import Target, configured
from mbn.contract import layer_dtype


@given(data=st.data())
def test_training_step_is_accurate(target: Target, data: st.DataObject) -> None:
    batch = data.draw(strategies.batches(target.capabilities.dtypes))
    eps = data.draw(st.sampled_from(strategies.EPS))
    momentum = data.draw(st.sampled_from(strategies.MOMENTA))
    correction = data.draw(st.sampled_from([0, 1]))
    bn = target.layer(batch.x.shape[1], eps=eps, momentum=momentum, correction=correction, dtype=batch.layer_dtype)
    held = target.snapshot(configured(bn, seed=data.draw(st.integers(0, 99))))
    del held["num_batches_tracked"]
    exact = oracle.train(batch.x, **held, momentum=momentum, eps=eps, correction=correction)
    target.assert_output(bn(target.array(batch.x)), exact.y, batch.dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, batch.layer_dtype)
    target.assert_statistic(bn.running_var, exact.running_var, batch.layer_dtype)


@given(data=st.data())
def test_evaluation_is_accurate(target: Target, data: st.DataObject) -> None:
    batch = data.draw(strategies.batches(target.capabilities.dtypes))
    eps = data.draw(st.sampled_from(strategies.EPS))
    affine = data.draw(st.booleans())
    bn = target.layer(batch.x.shape[1], eps=eps, affine=affine, dtype=batch.layer_dtype).eval()
    configured(bn, seed=data.draw(st.integers(0, 99)))
    bn.running_mean = target.numpy(bn.running_mean) + batch.x.astype(np.float64).mean()
    held = target.snapshot(bn)
    del held["num_batches_tracked"]
    exact = oracle.evaluate(batch.x, **held, eps=eps)
    target.assert_output(bn(target.array(batch.x)), exact, batch.dtype)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(4096, 64), (64, 16, 257), (2, 8)])
def test_float32_is_accurate_with_a_large_mean(target: Target, shape: tuple[int, ...], offset: float) -> None:
    x = (offset + np.random.default_rng(11).standard_normal(shape)).astype(np.float32)
    bn = target.layer(shape[1], momentum=1.0)
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    exact = oracle.train(x, zeros, ones, momentum=1.0, eps=1e-5)
    y = target.numpy(bn(target.array(x)))
    assert np.abs(y - exact.y.hi).max() <= 1e-6
    assert np.abs(target.numpy(bn.running_mean) / exact.running_mean.hi - 1).max() <= 2.4e-7
    assert np.abs(target.numpy(bn.running_var) / exact.running_var.hi - 1).max() <= 2.4e-7


@pytest.mark.parametrize(
    ("dtype", "constant"),
    [
        ("float16", 0.1),
        ("float16", 6e4),
        ("bfloat16", -1e10),
        ("float32", 0.1),
        ("float32", -1e10),
        ("float64", 0.1),
        ("float64", 1e10 / 3),
    ],
)
def test_constant_channel_gives_exactly_the_bias(target: Target, dtype: str, constant: float) -> None:
    target.require_dtype(dtype)
    bn = target.layer(3, momentum=1.0, dtype=layer_dtype(dtype))
    bn.bias = np.array([0.0, 0.5, -2.0])
    x = np.full((101, 3, 7), constant).astype(dtype)
    y = target.numpy(bn(target.array(x))).astype(np.float64)
    np.testing.assert_array_equal(y, np.broadcast_to(np.array([0.0, 0.5, -2.0])[:, None], x.shape))
    np.testing.assert_array_equal(target.numpy(bn.running_mean), x[0, :, 0].astype(layer_dtype(dtype)))
    np.testing.assert_array_equal(target.numpy(bn.running_var), np.zeros(3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_computed_in_float32(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = (100 + np.random.default_rng(4).standard_normal((512, 3))).astype(dtype)
    bn = target.layer(3, momentum=1.0)
    exact = oracle.train(x, np.zeros(3), np.ones(3), momentum=1.0, eps=1e-5)
    target.assert_output(bn(target.array(x)), exact.y, dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, "float32")
    target.assert_statistic(bn.running_var, exact.running_var, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_channels_are_accurate(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = (1e3 + np.random.default_rng(5).standard_normal((300_000, 2))).astype(dtype)
    bn = target.layer(2, momentum=1.0, dtype=dtype)
    exact = oracle.train(x, np.zeros(2), np.ones(2), momentum=1.0, eps=1e-5)
    target.assert_output(bn(target.array(x)), exact.y, dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, dtype)
    target.assert_statistic(bn.running_var, exact.running_var, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_are_accurate_where_the_first_value_is_an_outlier(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = np.random.default_rng(6).standard_normal((4096, 3)).astype(dtype)
    x[0] = [1e6, -1e6, 1e3]
    bn = target.layer(3, momentum=1.0, dtype=dtype)
    exact = oracle.train(x, np.zeros(3), np.ones(3), momentum=1.0, eps=0.0)
    bn.eps = 0.0
    target.assert_output(bn(target.array(x)), exact.y, dtype)
    target.assert_statistic(bn.running_var, exact.running_var, dtype)
    assert ulp.error(target.numpy(bn.running_mean), exact.running_mean, dtype) <= ulp.STATISTICS_BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 3), 1), ((145, 69, 18), 1), ((40, 3, 600), 1), ((40, 3, 600), -1)],
    ids=["64", "145x18", "40x600", "40x600 in rows"],
)
@pytest.mark.parametrize("kind", [None, "real weights"], ids=["alone", "real weights"])
def test_statistics_are_accurate_where_one_value_dwarfs_the_others(
    target: Target, kind: str | None, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    target.require_dtype("float64")
    target.require("any_size")
    arguments, weights = {}, np.ones((shape[0], *shape[2:]))
    if kind is not None:
        target.require("masks")
        masking = strategies.maskings(weights.shape)[kind]
        arguments, weights = target.arrays(masking.arguments), masking.weights
    x = np.ones(shape)
    n, *position = np.argwhere(weights)[0]
    x[n, :, *position] = np.resize([3.22e6, 12147.75, 1e10, 188.2, 4.2e8, 1129002.5, 1e6], shape[1])
    x = x.astype(dtype)
    bn = target.layer(shape[1], dtype="float64", momentum=1.0, axis=axis)
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    exact = oracle.train(x, zeros, ones, momentum=1.0, eps=1e-5, weights=weights)
    bn(target.array(x.swapaxes(1, 2) if axis == -1 else x), **arguments)
    target.assert_statistic(bn.running_mean, exact.running_mean, "float64")
    target.assert_statistic(bn.running_var, exact.running_var, "float64")


SIZES = [(dtype, size) for dtype, sizes in strategies.EXTREMES.items() for size in sizes]
SIZES_OF_SHAPES = [
    *((shape, *case) for shape in [(5, 3), (4, 3, 7)] for case in SIZES),
    *((shape, dtype, size) for shape in [(9000, 3), (40, 3, 200)] for dtype, size in SIZES if dtype != "float16"),
    *(((190_000, 3), dtype, size) for dtype, size in [("float32", 1e-40), ("float32", 3e38), ("float64", 1e-200)]),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    SIZES_OF_SHAPES,
    ids=[f"{'x'.join(map(str, shape))}-{dtype}-{size:g}" for shape, dtype, size in SIZES_OF_SHAPES],
)
@pytest.mark.parametrize("masked", [False, True])
def test_training_is_accurate_on_values_of_any_size(
    target: Target, shape: tuple[int, ...], dtype: str, size: float, *, masked: bool
) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    target.require_numbers_of(size, dtype)
    x = strategies.of_any_size(shape, dtype, size)
    bn = target.layer(3, eps=0.0, momentum=1.0, dtype=layer_dtype(dtype))
    bn.bias = np.array([0.0, -0.5, 0.25])
    arguments, weights = {}, None
    if masked:
        target.require("masks")
        masking = strategies.maskings((shape[0], *shape[2:]))["mask"]
        x, arguments, weights = masking.poisoned(x), target.arrays(masking.arguments), masking.weights
    bias = target.numpy(bn.bias)
    exact = oracle.train(x, np.zeros(3), np.ones(3), None, bias, momentum=1.0, eps=0.0, weights=weights)
    target.assert_output(bn(target.array(x), **arguments), exact.y, dtype)
    target.assert_statistic(bn.running_mean, exact.running_mean, layer_dtype(dtype))
    target.assert_statistic(bn.running_var, exact.running_var, layer_dtype(dtype))


@pytest.mark.parametrize("eps", [1e-300, 1e-40, 1e-5, 1e30])
@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_output_is_accurate_for_any_eps_and_weight(target: Target, dtype: str, size: float, eps: float) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    target.require_numbers_of(size, dtype)
    x = strategies.of_any_size((40, 3), dtype, size)
    bn = target.layer(3, eps=eps, dtype=layer_dtype(dtype))
    for weight in (1e-30, 1e30):
        bn.weight, bn.bias = weight, 0.0
        exact = oracle.train(x, np.zeros(3), np.ones(3), target.numpy(bn.weight), momentum=1.0, eps=eps)
        target.assert_output(bn(target.array(x)), exact.y, dtype)


STATISTICS = {
    "float32": [(0, 1e-38), (1e-30, 1e-36), (3e38, 3e38), (-3e38, 1e30), (1e30, 1e-20)],
    "float64": [(0, 1e-300), (1e-200, 5e-324), (1.5e308, 1.7e308), (-1e308, 1e200), (1e30, 1e-100)],
}
"""Running means and variances, by the dtype of the layer."""


@pytest.mark.parametrize("shape", [(5, 5), (9000, 5), (40, 5, 200)], ids=["5x5", "9000x5", "40x5x200"])
@pytest.mark.parametrize(
    ("dtype", "wide"), [*((dtype, layer_dtype(dtype)) for dtype in strategies.EXTREMES), ("float32", "float64")]
)
def test_evaluation_is_accurate_with_statistics_of_any_size(
    target: Target, shape: tuple[int, ...], dtype: str, wide: str
) -> None:
    target.require("any_size")
    target.require_dtype(dtype)
    target.require_dtype(wide)
    means, variances = (np.array(vector) for vector in zip(*STATISTICS[wide], strict=True))
    bn = target.layer(5, eps=0.0, dtype=wide).eval()
    bn.running_mean, bn.running_var = means, variances
    values = np.random.default_rng(12).uniform(-1, 1, shape)
    column = (-1,) + (1,) * (len(shape) - 2)
    largest = float(np.finfo(dtype if dtype != "bfloat16" else "float32").max) / 2
    near = np.clip(means, -largest, largest).reshape(column)
    for weight in (1.0, 1e-20, 1e20):
        bn.weight = weight
        spread = (np.sqrt(variances) / weight).clip(max=largest / 4).reshape(column)
        x = (near + values * spread).astype(dtype)
        held = {key: value for key, value in target.snapshot(bn).items() if key != "num_batches_tracked"}
        target.assert_output(bn(target.array(x)), oracle.evaluate(x, **held, eps=0.0), dtype)


@pytest.mark.parametrize("sizes", [[1.2e38] * 3, [1e-38] * 3, [1e38, 1e-38, 1.0], [1e-40, 1e-39, 2e-40]])
def test_training_is_accurate_with_sample_weights_of_any_size(target: Target, sizes: list[float]) -> None:
    target.require("masks")
    x, weights = np.array([[0.5, 1e3], [1.7, 1e-3], [-3, 2e3]], np.float32), np.array(sizes, np.float32)
    bn = target.layer(2, momentum=0.5)
    exact = oracle.train(x, np.zeros(2), np.ones(2), momentum=0.5, eps=1e-5, weights=weights)
    target.assert_output(bn(target.array(x), sample_weight=target.array(weights)), exact.y, "float32")
    target.assert_statistic(bn.running_mean, exact.running_mean, "float32")
    target.assert_statistic(bn.running_var, exact.running_var, "float32")


@pytest.mark.parametrize("sizes", [[1e308] * 3, [1e-308] * 3, [1e308, 1e-308, 1.0], [5e-324, 1e-320, 2e-323]])
def test_training_is_accurate_with_sample_weights_of_any_size_in_float64(target: Target, sizes: list[float]) -> None:
    target.require("any_size")
    target.require("masks")
    target.require_dtype("float64")
    x, weights = np.array([[0.5, 1e3], [1.7, 1e-3], [-3, 2e3]]), np.array(sizes)
    bn = target.layer(2, momentum=0.5, dtype="float64")
    exact = oracle.train(x, np.zeros(2), np.ones(2), momentum=0.5, eps=1e-5, weights=weights)
    target.assert_output(bn(target.array(x), sample_weight=target.array(weights)), exact.y, "float64")
    target.assert_statistic(bn.running_mean, exact.running_mean, "float64")
    target.assert_statistic(bn.running_var, exact.running_var, "float64")


def test_training_gives_the_same_bits_on_every_call(target: Target) -> None:
    x = np.random.default_rng(8).normal(10, 3, (1000, 33)).astype(np.float32)
    first = target.layer(33)
    expected = target.numpy(first(target.array(x)))
    for _ in range(3):
        bn = target.layer(33)
        np.testing.assert_array_equal(target.numpy(bn(target.array(x))), expected)
        np.testing.assert_array_equal(target.numpy(bn.running_var), target.numpy(first.running_var))
