"""The oracle against exact rational arithmetic, and the measure of error against NumPy's own."""

from fractions import Fraction

import numpy as np
import pytest

from mbn.conformance import oracle, ulp

X = np.random.default_rng(1).normal(1e6, 1, (7, 2, 3)).astype(np.float32)


def exact_moments(values: list[float]) -> tuple[Fraction, Fraction]:
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    return mean, sum((value - mean) ** 2 for value in exact)


def test_statistics_are_exact() -> None:
    step = oracle.train(X, np.array([0.5, 0]), np.array([1, 2.0]), momentum=0.25, eps=1e-5)
    for channel in range(2):
        mean, m2 = exact_moments(X[:, channel].ravel().tolist())
        old = Fraction([0.5, 0][channel]), Fraction([1, 2][channel])
        for result, expected in [
            (step.running_mean, old[0] * 3 / 4 + mean / 4),
            (step.running_var, old[1] * 3 / 4 + m2 / 20 / 4),
        ]:
            value = Fraction(result.hi[channel]) + Fraction(result.lo[channel])
            assert abs(value / expected - 1) < 2.0**-95


def test_outputs_are_exact() -> None:
    weight, bias = np.array([0.3, -2]), np.array([1, 0.1])
    y = oracle.train(X, np.zeros(2), np.ones(2), weight, bias, momentum=0.1, eps=0.25).y
    for index in np.ndindex(X.shape):
        channel = index[1]
        mean, m2 = exact_moments(X[:, channel].ravel().tolist())
        unit = (Fraction(float(X[index])) - mean) * Fraction(weight[channel])
        value = Fraction(y.hi[index]) + Fraction(y.lo[index]) - Fraction(bias[channel])
        # (y - bias)² (var + eps) = ((x - mean) weight)², without a root
        assert abs(value**2 * (m2 / 21 + Fraction(1, 4)) / unit**2 - 1) < 2.0**-80


def test_evaluation_and_zero_variance() -> None:
    y = oracle.evaluate(X, np.array([1e6, 0]), np.array([4, 0.0]), eps=0.0)
    np.testing.assert_array_equal(y.hi[:, 0], (X[:, 0].astype(float) - 1e6) / 2)
    np.testing.assert_array_equal(y.hi[:, 1], 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_spacing_is_numpys(dtype: str) -> None:
    values = np.array([1, 1.5, 2, 3e4, 1e-3, 1e-7, 0]).astype(dtype)
    np.testing.assert_array_equal(ulp.spacing(values.astype(float), dtype), np.spacing(values).astype(float))


def test_error_counts_units_in_the_last_place() -> None:
    exact = ulp.Exact(np.array([1.0, 2.0]), np.zeros(2), np.array([1.0, 2.0]))
    assert ulp.error(np.array([1, 2], np.float32), exact, "float32") == 0
    assert ulp.error(np.array([1 + 3 * 2.0**-23, 2], np.float32), exact, "float32") == 3
    assert ulp.error(np.array([1, np.nan], np.float32), exact, "float32") == np.inf
    assert ulp.error(np.zeros(0), ulp.Exact(*(np.zeros(0),) * 3), "float32") == 0
    assert ulp.distance(np.array([1.0]), np.array([1 + 2.0**-52]), np.array([1.0]), "float64") == 1
