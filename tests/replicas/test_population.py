"""Populations: which can be merged, and the messages for the others."""

import pickle
from functools import reduce

import numpy as np
import pytest

import mbn

X = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_population_rejects_another_class() -> None:
    with pytest.raises(TypeError, match="merge takes an mbn.Population, not ndarray"):
        mbn.Population().merge(X)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [{"axis": -1}, {"correction": 0}, {"dtype": "float64"}, {"backend": "numba"}],
    ids=lambda each: next(iter(each)),
)
def test_populations_of_different_kinds_are_not_merged(arguments: dict[str, object]) -> None:
    if "backend" in arguments:
        pytest.importorskip("numba")
    first, second = mbn.Population().update(X), mbn.Population(**arguments).update(X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be merged: <Population of 1 batches"):
        first.merge(second)
    assert int(first.statistics().num_batches_tracked) == 1


def test_populations_without_batches_merge_to_the_other() -> None:
    empty = mbn.Population()
    assert empty.merge(mbn.Population()) is empty
    with pytest.raises(ValueError, match="hold 0 values"):
        empty.statistics()
    expected = mbn.Population().update(X).statistics()
    for total in (empty.merge(mbn.Population().update(X)), mbn.Population().update(X).merge(mbn.Population())):
        for found, value in zip(total.statistics(), expected, strict=True):
            np.testing.assert_array_equal(found, value)


def batches(number: int) -> list[np.ndarray]:
    generator = np.random.default_rng(number)
    return [1e4 + generator.standard_normal((size, 3)).astype(np.float32) for size in generator.integers(0, 9, number)]


def assert_bits_of_fit(total: mbn.Population, data: list[np.ndarray]) -> None:
    fitted = mbn.BatchNorm1d(3).fit(data, progress=False)
    for found, value in zip(total.statistics(), fitted.state, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("number", [2, 3, 5, 7, 8, 11, 100, 1000])
def test_populations_of_one_batch_merged_in_order_have_the_bits_of_fit(number: int) -> None:
    data = batches(number)
    parts = [pickle.loads(pickle.dumps(mbn.Population().update(batch))) for batch in data]
    assert_bits_of_fit(reduce(mbn.Population.merge, parts, mbn.Population()), data)


def test_population_of_selected_values_has_the_statistics_of_a_mask() -> None:
    generator = np.random.default_rng(0)
    x, mask = generator.standard_normal((20, 3, 5)).astype(np.float32), generator.random((20, 5)) < 0.5
    bn = mbn.BatchNorm1d(3, momentum=1)
    bn(x, mask=mask)
    for found, value in zip(mbn.Population().update(x.swapaxes(1, 2)[mask]).statistics(), bn.state, strict=True):
        np.testing.assert_allclose(found, value, rtol=3e-7, atol=1e-7)
