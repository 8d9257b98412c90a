"""The oracle against other arithmetic: fractions, and for derivatives quotients of tiny differences.

The unit in the last place is compared with NumPy's own.
"""

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from mbn.conformance import derivatives, oracle, ulp

X = np.random.default_rng(1).normal(1e6, 1, (7, 2, 3)).astype(np.float32)


def exact_moments(values: list[float]) -> tuple[Fraction, Fraction]:
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    return mean, sum((value - mean) ** 2 for value in exact)


def test_oracle_statistics_are_exact() -> None:
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


def test_oracle_outputs_are_exact() -> None:
    weight, bias = np.array([0.3, -2]), np.array([1, 0.1])
    y = oracle.train(X, np.zeros(2), np.ones(2), weight, bias, momentum=0.1, eps=0.25).y
    for index in np.ndindex(X.shape):
        channel = index[1]
        mean, m2 = exact_moments(X[:, channel].ravel().tolist())
        unit = (Fraction(float(X[index])) - mean) * Fraction(weight[channel])
        value = Fraction(y.hi[index]) + Fraction(y.lo[index]) - Fraction(bias[channel])
        # (y - bias)² (var + eps) = ((x - mean) weight)², without a root
        assert abs(value**2 * (m2 / 21 + Fraction(1, 4)) / unit**2 - 1) < 2.0**-80


def test_oracle_evaluates_with_zero_variance_to_zero() -> None:
    y = oracle.evaluate(X, np.array([1e6, 0]), np.array([4, 0.0]), eps=0.0)
    np.testing.assert_array_equal(y.hi[:, 0], (X[:, 0].astype(float) - 1e6) / 2)
    np.testing.assert_array_equal(y.hi[:, 1], 0)


def test_oracle_weights_count_like_repeated_values() -> None:
    counts = np.random.default_rng(2).integers(0, 4, (7, 3))
    x = np.where(counts[:, None] > 0, X, np.nan)
    flat = np.moveaxis(X, 1, 2).reshape(-1, 2)
    repeated = np.repeat(flat, counts.ravel(), axis=0)
    arguments = np.array([0.5, 0]), np.array([1, 2.0]), np.array([0.3, -2]), np.array([1, 0.1])
    step = oracle.train(x, *arguments, momentum=0.25, eps=1e-5, weights=counts)
    plain = oracle.train(repeated, *arguments, momentum=0.25, eps=1e-5)
    for name in ("running_mean", "running_var"):
        for part in range(2):
            np.testing.assert_allclose(getattr(step, name)[part], getattr(plain, name)[part], rtol=1e-15, atol=1e-30)
    y = np.repeat(np.moveaxis(step.y.hi, 1, 2).reshape(-1, 2), counts.ravel(), axis=0)
    np.testing.assert_array_equal(y, plain.y.hi)
    assert not step.y.hi[np.isnan(x)].any()


def test_oracle_statistics_with_real_weights_are_exact() -> None:
    weights = np.random.default_rng(3).uniform(0.1, 3, (7, 3)).astype(np.float32)
    step = oracle.train(X, np.zeros(2), np.ones(2), momentum=1.0, eps=1e-5, weights=weights)
    exact = [Fraction(float(value)) for value in weights.ravel()]
    n = sum(exact)
    for channel in range(2):
        values = [Fraction(value) for value in X[:, channel].ravel().tolist()]
        mean = sum(w * value for w, value in zip(exact, values, strict=True)) / n
        m2 = sum(w * (value - mean) ** 2 for w, value in zip(exact, values, strict=True))
        for result, expected in [(step.running_mean, mean), (step.running_var, m2 / (n - 1))]:
            value = Fraction(result.hi[channel]) + Fraction(result.lo[channel])
            assert abs(value / expected - 1) < 2.0**-95


@pytest.mark.parametrize("unit", [2.0**-600, 2.0**600])
def test_oracle_does_not_overflow(unit: float) -> None:
    x, mean, counts = np.array([[1.0], [2], [6]]), np.array([2.0]), np.array([1, 2, 1])
    arguments = {"momentum": 0.5, "eps": 0.0, "weights": counts}
    plain = oracle.train(x, np.zeros(1), np.zeros(1), **arguments)
    scaled = oracle.train(x * unit, np.zeros(1), np.zeros(1), **arguments | {"weights": counts * unit}, correction=0)
    np.testing.assert_array_equal(scaled.y, plain.y)
    np.testing.assert_array_equal(scaled.running_mean.hi, plain.running_mean.hi * unit)
    assert scaled.running_var.hi in (0, np.inf)
    y, expected = (oracle.evaluate(x * u, mean * u, np.ones(1), np.array([1 / u]), eps=0.0) for u in (unit, 1))
    np.testing.assert_array_equal(y[:2], expected[:2])


@pytest.mark.parametrize("weights", [np.zeros(3), np.array([0, 1, 0]), np.array([0.25, 0.25, 0.5])])
def test_oracle_keeps_statistics_for_a_batch_without_a_variance(weights: np.ndarray) -> None:
    x = np.array([[1.0], [3], [7]])
    step = oracle.train(x, np.array([5.0]), np.array([2.0]), momentum=0.5, eps=0.0, weights=weights)
    assert step.running_mean.hi == 5
    assert step.running_var.hi == 2
    if weights.max() == 0.5:
        np.testing.assert_allclose(step.y.hi[:, 0] * 6.75**0.5, [-3.5, -1.5, 2.5], rtol=1e-15)
    else:
        assert not step.y.hi.any()


def one_channel(weights: list[int] | None) -> Callable[[list[Decimal]], list[Decimal]]:
    """Return batch norm of one channel by its definition, with eps 1/8, weight 1.5 and bias 0.25."""

    def batch_norm(x: list[Decimal]) -> list[Decimal]:
        w = weights or [1] * len(x)
        mean = sum(map(Decimal.__mul__, map(Decimal, w), x)) / sum(w)
        var = sum(c * (value - mean) ** 2 for c, value in zip(w, x, strict=True)) / sum(w)
        root = (var + Decimal("0.125")).sqrt()
        y = [(value - mean) / root * Decimal("1.5") + Decimal("0.25") for value in x]
        return [value if c else Decimal(0) for c, value in zip(w, y, strict=True)]

    return batch_norm


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("weights", [None, [1, 0, 2, 1, 3]], ids=["plain", "weighted"])
def test_oracle_derivatives_agree_with_difference_quotients(weights: list[int] | None, power: int) -> None:
    x, v, dy = np.random.default_rng(4).normal(size=(3, 5))
    h = Decimal("1e-30")
    function = one_channel(weights)

    def shifted(values: list[Decimal], t: Decimal, direction: np.ndarray) -> list[Decimal]:
        return [value + t * Decimal(slope) for value, slope in zip(values, direction.tolist(), strict=True)]

    def difference(f: Callable[[Decimal], np.ndarray], k: int) -> np.ndarray:
        if k == 0:
            return f(Decimal(0))
        return difference(lambda t: (f(t + h) - f(t - h)) / (2 * h), k - 1)

    def loss(values: list[Decimal]) -> Decimal:
        y = function(values)
        return sum(Decimal(a) * b**power for a, b in zip(dy.tolist(), y, strict=True)) / power

    def gradient(values: list[Decimal]) -> np.ndarray:
        steps = [(loss(shifted(values, h, row)) - loss(shifted(values, -h, row))) / (2 * h) for row in np.eye(5)]
        return np.array(steps)

    columns = [array[:, None] for array in (x, v, dy)]
    arguments = {"eps": 0.125, "weights": None if weights is None else np.array(weights), "power": power}
    exact = derivatives.along(*columns, np.array([1.5]), np.array([0.25]), **arguments)
    with localcontext(prec=200):
        start = [Decimal(value) for value in x.tolist()]
        for k, derivative in enumerate(exact):
            y = difference(lambda t: np.array(function(shifted(start, t, v))), k)
            np.testing.assert_allclose(derivative.y[:, 0], y.astype(float), rtol=1e-14, atol=1e-14)
            dx = difference(lambda t: gradient(shifted(start, t, v)), k)
            np.testing.assert_allclose(derivative.dx[:, 0], dx.astype(float), rtol=1e-14, atol=1e-14)


def test_oracle_parameter_gradients_do_not_depend_on_the_parameters() -> None:
    x, v, dy = np.random.default_rng(5).normal(size=(3, 4, 2, 3))
    plain = derivatives.along(x, v, dy, eps=1e-3)
    scaled = derivatives.along(x, v, dy, np.array([2.0, 3.0]), np.ones(2), eps=1e-3)
    for before, after in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(after.dweight, (dy * before.y).sum((0, 2)), rtol=1e-12)
        np.testing.assert_array_equal(after.dweight, before.dweight)
        np.testing.assert_array_equal(after.dbias, before.dbias)
    np.testing.assert_allclose(plain[0].dbias, dy.sum((0, 2)), rtol=1e-12)
    assert not plain[1].dbias.any()


def test_oracle_gradients_equal_the_first_derivatives() -> None:
    x, dy = np.random.default_rng(6).normal(size=(2, 4, 2))
    statistics = np.array([0.5, 1]), np.array([4, 0.0])
    for arguments in ({}, {"weights": np.array([1, 0, 2, 1])}, {"statistics": statistics}):
        first = derivatives.along(x, dy, dy, np.array([2.0, 3.0]), eps=0.0, order=0, **arguments)[0]
        exact = derivatives.gradients(x, dy, np.array([2.0, 3.0]), eps=0.0, **arguments)
        for name, size in zip(("dx", "dweight", "dbias"), exact.sizes, strict=True):
            np.testing.assert_array_equal(getattr(exact, name), getattr(first, name))
            assert (abs(getattr(exact, name)) <= size * (1 + 1e-15)).all()
    np.testing.assert_array_equal(exact.dx, dy * [1, 0])  # constant variances of 4 and 0: factors 2 / 2 and 3 * 0


def test_oracle_gradients_of_a_constant_channel_are_zero() -> None:
    dy = np.random.default_rng(7).normal(size=(5, 1))
    exact = derivatives.gradients(np.full((5, 1), 0.1), dy, eps=0.0)
    assert not exact.dx.any()
    assert not exact.dweight.any()
    assert not derivatives.gradients(np.full((5, 1), np.nan), dy, eps=0.0, weights=np.zeros(5)).dx.any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_spacing_agrees_with_numpy(dtype: str) -> None:
    values = np.array([1, 1.5, 2, 3e4, 1e-3, 1e-7, 0]).astype(dtype)
    np.testing.assert_array_equal(ulp.spacing(values.astype(float), dtype), np.spacing(values).astype(float))


def test_error_counts_units_in_the_last_place() -> None:
    exact = ulp.Exact(np.array([1.0, 2.0]), np.zeros(2), np.array([1.0, 2.0]))
    assert ulp.error(np.array([1, 2], np.float32), exact, "float32") == 0
    assert ulp.error(np.array([1 + 3 * 2.0**-23, 2], np.float32), exact, "float32") == 3
    assert ulp.error(np.array([1, np.nan], np.float32), exact, "float32") == np.inf
    assert ulp.error(np.zeros(0), ulp.Exact(*(np.zeros(0),) * 3), "float32") == 0
    assert ulp.distance(np.array([1.0]), np.array([1 + 2.0**-52]), np.array([1.0]), "float64") == 1
