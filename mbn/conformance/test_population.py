"""Population: the statistics of ``fit`` are those of all batches together, for every division into batches."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbn
from mbn.conformance import oracle, strategies
from mbn.conformance.target import Target, assert_same, configured
from mbn.contract import Batch, layer_dtype

X = np.random.default_rng(15).normal(2, 3, (9, 4)).astype(np.float32)
SIZES = [0, 1, 2, 7]
"""Sizes of batches."""
ROWS = [(3,), (3, 2)]
"""Shapes of a row."""


def cut(x: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Return the rows of ``x`` as batches of these sizes."""
    return np.split(x, np.cumsum(sizes)[:-1])


def exact(x: np.ndarray, correction: int = 1) -> oracle.Step:
    """Return the exact statistics of ``x``: those after a training step with a momentum of 1."""
    vectors = np.zeros(x.shape[1]), np.ones(x.shape[1])
    return oracle.train(x, *vectors, momentum=1.0, eps=1.0, correction=correction)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((100, 8), 1), ((100, 8, 8), 1), ((100, 8, 8), -1), ((0, 8), 1)])
def test_fit_takes_an_array_as_one_data_set(target: Target, shape: tuple[int, ...], axis: int, *, host: bool) -> None:
    means = np.arange(8, dtype=np.float32)
    x = np.random.default_rng(16).standard_normal(shape).astype(np.float32)
    x += means[:, None] if len(shape) == 3 and axis == 1 else means
    bn = configured(target.layer(8, axis=axis), seed=1)
    before = target.snapshot(bn)
    given = x if host else target.array(x)
    if not x.size:
        with pytest.raises(ValueError, match="0 values per channel"):
            bn.fit(given, progress=False)
        assert_same(before, target.snapshot(bn))
        return
    bn.fit(given, progress=False)
    truth = exact(x.swapaxes(1, 2) if axis == -1 and x.ndim == 3 else x)
    target.assert_statistic(bn.running_mean, truth.running_mean, "float32")
    target.assert_statistic(bn.running_var, truth.running_var, "float32")
    assert int(bn.num_batches_tracked) == 1


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 8, 8)])
def test_fit_rejects_an_array_of_another_rank(target: Target, shape: tuple[int, ...]) -> None:
    bn = configured(target.layer(8), seed=1)
    before = target.snapshot(bn)
    for x in (np.ones(shape, np.float32), target.array(np.ones(shape, np.float32))):
        with pytest.raises(ValueError, match="x has shape"):
            bn.fit(x, progress=False)
    assert_same(before, target.snapshot(bn))


def test_fit_matches_the_three_values_example(target: Target) -> None:
    batches = [np.zeros((2, 1), np.float32), np.full((1, 1), 6, np.float32)]
    bn = target.layer(1).fit(map(target.array, batches), progress=False)
    assert target.numpy(bn.running_mean).tolist() == [2]
    assert target.numpy(bn.running_var).tolist() == [12]  # (4 + 4 + 16) / 2
    assert int(bn.num_batches_tracked) == 2


@given(data=st.data())
def test_fit_does_not_depend_on_the_cut_into_batches(target: Target, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from(SIZES), max_size=20).map(lambda sizes: [*sizes, 2]))
    batch = data.draw(strategies.batches(target.capabilities.dtypes, (sum(sizes), *data.draw(st.sampled_from(ROWS)))))
    correction, axis = data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([1, -1]))
    bn = configured(target.layer(3, axis=axis, correction=correction, dtype=batch.layer_dtype), seed=len(sizes))
    before = target.snapshot(bn)
    laid_out = batch.x.swapaxes(1, 2) if axis == -1 and batch.x.ndim == 3 else batch.x
    assert bn.fit(map(target.array, cut(laid_out, sizes)), progress=False) is bn
    truth, after = exact(batch.x, correction), target.snapshot(bn)
    target.assert_statistic(bn.running_mean, truth.running_mean, batch.layer_dtype)
    target.assert_statistic(bn.running_var, truth.running_var, batch.layer_dtype)
    assert int(after["num_batches_tracked"]) == len(sizes)
    for key in ("weight", "bias"):
        np.testing.assert_array_equal(after[key], before[key])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_fit_is_accurate_over_a_thousand_unequal_batches(target: Target, offset: float) -> None:
    generator = np.random.default_rng(16)
    sizes = generator.choice([1, 2, 3, 50], 1000).tolist()
    x = (offset + generator.standard_normal((sum(sizes), 3))).astype(np.float32)
    bn = target.layer(3).fit(map(target.array, cut(x, sizes)), progress=False)
    truth = exact(x)
    assert np.abs(target.numpy(bn.running_mean) / truth.running_mean.hi - 1).max() <= 2.4e-7
    assert np.abs(target.numpy(bn.running_var) / truth.running_var.hi - 1).max() <= 2.4e-7


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [[1] * 300, [1, 299], [100, 0, 100, 100]], ids=["ones", "one first", "hundreds"])
@pytest.mark.parametrize("kind", ["large mean", "first value far from the rest"])
def test_fit_is_accurate_on_hard_values(target: Target, kind: str, sizes: list[int], dtype: str) -> None:
    target.require_dtype(dtype)
    x = np.random.default_rng(17).standard_normal((300, 3))
    x[... if kind == "large mean" else 0] += [1e6, -1e6, 1e3]
    x = x.astype(dtype)
    bn = target.layer(3, dtype=dtype).fit(map(target.array, cut(x, sizes)), progress=False)
    truth = exact(x)
    target.assert_statistic(bn.running_mean, truth.running_mean, dtype)
    target.assert_statistic(bn.running_var, truth.running_var, dtype)


@pytest.mark.parametrize("sizes", [[1] * 8, [1, 7], [4, 4]], ids=["ones", "one first", "halves"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [*((d, s) for d, sizes in strategies.EXTREMES.items() for s in sizes), ("float64", 1.5e154)],  # only m2 overflows
)
def test_fit_is_accurate_for_values_of_any_size(target: Target, dtype: str, size: float, sizes: list[int]) -> None:
    target.require_dtype(dtype)
    target.require("any_size")
    target.require_numbers_of(size, dtype)
    x = strategies.of_any_size((8, 3), dtype, size)
    bn = target.layer(3, dtype=layer_dtype(dtype)).fit(map(target.array, cut(x, sizes)), progress=False)
    truth = exact(x)
    target.assert_statistic(bn.running_mean, truth.running_mean, layer_dtype(dtype))
    target.assert_statistic(bn.running_var, truth.running_var, layer_dtype(dtype))


@pytest.mark.parametrize("outliers", [np.s_[:1], np.s_[::7]], ids=["first", "several"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fit_of_narrow_batches_in_a_float64_layer_is_accurate(target: Target, dtype: str, outliers: slice) -> None:
    target.require_dtype("float64")
    target.require_dtype(dtype)
    x = np.random.default_rng(18).standard_normal((200, 3)).astype(dtype)
    x[outliers] = 6e4
    bn = target.layer(3, dtype="float64").fit([target.array(x)], progress=False)
    truth = exact(x)
    target.assert_statistic(bn.running_mean, truth.running_mean, "float64")
    target.assert_statistic(bn.running_var, truth.running_var, "float64")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sizes", [[1] * 300, [1, 299], [9000, 1, 500]], ids=["ones", "one first", "thousands"])
def test_fit_is_accurate_where_one_value_dwarfs_all_others(target: Target, sizes: list[int], *, first: bool) -> None:
    target.require_dtype("float64")
    target.require("any_size")
    x = np.ones((sum(sizes), 3))
    x[0 if first else len(x) // 3] = [3.22e6, 12147.75, 1e10]
    bn = target.layer(3, dtype="float64").fit(map(target.array, cut(x, sizes)), progress=False)
    truth = exact(x)
    target.assert_statistic(bn.running_mean, truth.running_mean, "float64")
    target.assert_statistic(bn.running_var, truth.running_var, "float64")


def test_fit_is_exact_for_constant_channels(target: Target) -> None:
    x = np.broadcast_to(np.array([0.1, -1e10, 0], np.float32), (10, 3))
    bn = target.layer(3).fit(map(target.array, cut(x, [1, 2, 7])), progress=False)
    np.testing.assert_array_equal(target.numpy(bn.running_mean), x[0])
    np.testing.assert_array_equal(target.numpy(bn.running_var), np.zeros(3))


def test_fit_discards_the_former_statistics(target: Target) -> None:
    bn, other = target.layer(4), target.layer(4)
    other.running_mean, other.running_var, other.num_batches_tracked = np.nan, np.inf, 99
    for layer in (bn, other):
        layer.fit([target.array(X[:2]), target.array(X[2:])], progress=False)
    assert_same(target.snapshot(bn), target.snapshot(other))


def test_fit_keeps_nan_and_infinity_in_their_channel(target: Target) -> None:
    x = X.copy()
    x[5, 1], x[0, 2] = np.nan, np.inf
    bn = target.layer(4).fit(map(target.array, cut(x, [2, 7])), progress=False)
    finite = target.layer(4).fit(map(target.array, cut(X, [2, 7])), progress=False)
    assert np.isfinite(target.numpy(bn.running_var)).tolist() == [True, False, False, True]
    for key in ("running_mean", "running_var"):
        found, expected = target.snapshot(bn)[key], target.snapshot(finite)[key]
        np.testing.assert_array_equal(found[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_fit_neither_depends_on_modes_nor_changes_them(target: Target, mode: str) -> None:
    bn, trained = target.layer(4), target.layer(4)
    getattr(bn, mode)()
    before = repr(bn), bn.training
    bn.fit([target.array(X)], progress=False)
    trained.fit([target.array(X)], progress=False)
    assert_same(target.snapshot(trained), target.snapshot(bn))
    assert (repr(bn), bn.training) == before
    bn(target.array(X))
    assert int(bn.num_batches_tracked) == 1 + (mode == "train")


def test_fit_accepts_host_data_and_tuples(target: Target) -> None:
    expected = target.snapshot(target.layer(4).fit([target.array(X[:2]), target.array(X[2:])], progress=False))
    labels = np.arange(9)
    for batches in ([X[:2], X[2:]], [X[:2].tolist(), X[2:].tolist()], [(X[:2], labels[:2]), [X[2:], labels[2:]]]):
        assert_same(expected, target.snapshot(target.layer(4).fit(batches, progress=False)))


def test_fit_takes_num_features_from_the_first_batch(target: Target) -> None:
    bn = target.layer(None).fit([target.array(X[:2]), target.array(X[2:])], progress=False)
    assert bn.num_features == 4
    assert_same(target.snapshot(target.layer(4).fit([X[:2], X[2:]], progress=False)), target.snapshot(bn))


def test_fit_does_not_write_to_its_batches(target: Target) -> None:
    batches = [target.array(X[:2]), target.array(X[2:])]
    target.layer(4).fit(batches, progress=False)
    np.testing.assert_array_equal(np.concatenate([target.numpy(batch) for batch in batches]), X)


def interrupted(error: type[BaseException]) -> Iterator[np.ndarray]:
    """Yield two batches, then raise an error."""
    yield X
    yield X
    raise error("that was all")


REFUSED: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "no batch": (list, ValueError, "hold 0 values.*correction=1 takes at least 2"),
    "nothing but empty ones": (lambda: [X[:0]] * 3, ValueError, "hold 0 values"),
    "one value": (lambda: [X[:0], X[:1]], ValueError, "hold 1 values.*at least 2"),
    "a third of other channels": (lambda: [X, X, X[:, :3]], ValueError, "3 channels.*num_features is 4"),
    "a third that is empty and wrong": (lambda: [X, X, X[:0, :3]], ValueError, "3 channels.*num_features is 4"),
    "a third of integers": (lambda: [X, X, X.astype(int)], TypeError, "int64"),
    "a third of one axis": (lambda: [X, X, X[0]], ValueError, r"shape \(4,\)"),
    "an error after two": (lambda: interrupted(OSError), OSError, "that was all"),
    "an interrupt after two": (lambda: interrupted(KeyboardInterrupt), KeyboardInterrupt, "that was all"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("num_features", [4, None])
def test_failed_fit_leaves_the_layer_unchanged(target: Target, name: str, num_features: int | None) -> None:
    make, error, words = REFUSED[name]
    bn = target.layer(num_features)
    before = None if num_features is None else target.snapshot(configured(bn, seed=3))
    with pytest.raises(error, match=words):
        bn.fit(make(), progress=False)
    assert bn.num_features == num_features
    if before is not None:
        assert_same(before, target.snapshot(bn))


def test_fit_rejects_a_layer_without_running_statistics(target: Target) -> None:
    bn = target.layer(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"no running statistics for fit\(\)"):
        bn.fit([X], progress=False)


def test_fit_of_one_value_gives_biased_variance_0(target: Target) -> None:
    bn = target.layer(4, correction=0).fit([X[:1]], progress=False)
    np.testing.assert_array_equal(target.numpy(bn.running_mean), X[0])
    np.testing.assert_array_equal(target.numpy(bn.running_var), np.zeros(4))


def test_merge_of_weighted_batches_is_accurate(target: Target) -> None:
    target.require("masks")
    weights = np.array([0, 0, 0, 2, 1, 3, 0, 1, 1], np.float32)
    chosen = (
        target.backend.kernels_for("moments", Batch(target.array(X[rows]), target.array(weights[rows])))
        for rows in np.split(np.arange(9), [3, 5])
    )
    nothing, few, many = (kernels.moments(batch) for kernels, batch in chosen)
    kernels = target.backend.kernels
    truth = oracle.train(X, np.zeros(4), np.ones(4), momentum=1.0, eps=1.0, weights=weights)
    rounded = partial(kernels.lerp, target.array(np.zeros(4, np.float32)), step=1.0)
    for pair in [(many, few), (few, many), (kernels.merge(nothing, many), kernels.merge(few, nothing))]:
        merged = kernels.merge(*pair)
        target.assert_statistic(rounded(merged.mean), truth.running_mean, "float32")
        target.assert_statistic(rounded(kernels.variance(merged, 1)), truth.running_var, "float32")
    merged = kernels.merge(nothing, nothing)
    assert np.isfinite(target.numpy(rounded(merged.mean))).all()
    assert target.numpy(rounded(kernels.variance(merged, 1))).tolist() == [0] * 4


def test_fit_gives_the_same_bits_on_every_call(target: Target) -> None:
    def fitted() -> mbn.BatchNorm1d:
        return target.layer(4).fit(map(target.array, cut(X, [2, 7])), progress=False)

    expected = target.snapshot(fitted())
    for _ in range(3):
        assert_same(expected, target.snapshot(fitted()))
