"""Populations: which can be merged, and the messages for the others."""

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
