"""The exact gradients and higher derivatives, independent of every backend, as the oracle is.

Along a line ``x + t * direction`` all results are power series in t. So batch normalisation and its gradient are
written down once, by their definition, for derivatives of every order. Coefficients are decimals with more digits than
any comparison needs.
"""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np

_DIGITS = 60

_Rows: TypeAlias = Any
"""An array of decimals, (C, cells) or (C, 1), for which NumPy has no better type."""

_ZERO, _ONE, _INFINITY = (Decimal(text) for text in ("0", "1", "Infinity"))


class Derivatives(NamedTuple):
    """The derivatives of one order along a line: of the output, and of the gradients of a loss."""

    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray


class Gradients(NamedTuple):
    """The gradients, and for each the size of the terms of its sum."""

    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    sizes: tuple[np.ndarray, np.ndarray, np.ndarray]


class _Series:
    """A power series in t up to some order, given by its coefficients."""

    def __init__(self, terms: list[_Rows]) -> None:
        self.terms = terms

    def each(self, function: Callable[[_Rows], _Rows]) -> "_Series":
        """Apply a linear function to every coefficient."""
        return _Series([function(term) for term in self.terms])

    def __add__(self, constant: _Rows) -> "_Series":
        return _Series([self.terms[0] + constant, *self.terms[1:]])

    def around(self, constant: _Rows) -> "_Series":
        """Return self - constant; the difference is rounded, the constant is not."""
        return _Series([self.terms[0] - constant, *self.terms[1:]])

    def __sub__(self, other: "_Series") -> "_Series":
        return _Series([a - b for a, b in zip(self.terms, other.terms, strict=True)])

    def __mul__(self, other: "_Series") -> "_Series":
        products = ((self.terms[i] * other.terms[k - i] for i in range(k + 1)) for k in range(len(self.terms)))
        return _Series([sum(terms) for terms in products])

    def inverse_root(self) -> "_Series":
        """Return self^(-1/2), and 0 where its constant term is 0.

        Source: the recurrence for powers of series, Knuth, The Art of Computer Programming 2, 4.7, (9).
        """
        constant = self.terms[0]
        inverse = 1 / (constant + np.where(constant == 0, _INFINITY, _ZERO))  # type: ignore[call-overload]
        terms = [np.sqrt(inverse)]
        for k in range(1, len(self.terms)):
            parts = [(Decimal(i) / 2 - k) * self.terms[i] * terms[k - i] for i in range(1, k + 1)]
            terms.append(sum(parts) * inverse / k)
        return _Series(terms)


def gradients(
    x: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    eps: float,
    weights: np.ndarray | None = None,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Gradients:
    """Return the gradients of x, weight and bias, given that of the output; the arguments are those of :func:`along`.

    The size of terms takes a normalised value below 1 as 1, as the size of an output's terms does.
    """
    with localcontext(prec=_DIGITS):
        line = _Line(x, weight, None, eps=eps, direction=None, order=0, weights=weights, statistics=statistics)
        gradient = line.rows(dy)
        dx, dweight, dbias = (series.terms[0] for series in line.pullback(gradient))
        size, xhat = abs(gradient.terms[0]), abs(line.xhat.terms[0]).clip(min=_ONE)
        sizes = _vector(_sum(size * xhat)), _vector(_sum(size))
        if statistics is None:
            size = size + line.w / line.n * (abs(dbias) + xhat * abs(dweight))
        size = abs(line.scale) * line.invstd.terms[0] * size
        return Gradients(line.scattered(dx), _vector(dweight), _vector(dbias), (line.scattered(size), *sizes))


def along(
    x: np.ndarray,
    direction: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float,
    weights: np.ndarray | None = None,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
    order: int = 3,
    power: int = 1,
) -> list[Derivatives]:
    """Return the derivatives along ``x + t * direction``, from order 0, the value itself, to ``order``.

    The gradients are those of the loss ``sum(dy * y**power) / power``.

    Args:
        x, direction, dy: (N, C) or (N, C, L), finite in every cell whose weight is not 0.
        weight, bias: (C,) or None.
        eps: the number added to the variance.
        weights: the sample weight of each cell, (N,) or (N, L).
        statistics: mean and variance, (C,) each, if they are constants; by default those of x.
        order: the order of the last derivative.
        power: the power of y in the loss, at least 1.
    """
    with localcontext(prec=_DIGITS):
        line = _Line(x, weight, bias, eps=eps, direction=direction, order=order, weights=weights, statistics=statistics)
        gradient = line.rows(dy)
        for _ in range(power - 1):
            gradient = gradient * line.y
        series = (line.y, *line.pullback(gradient))
        derivatives = []
        for k in range(order + 1):
            y, dx, dweight, dbias = (math.factorial(k) * each.terms[k] for each in series)
            derivatives.append(Derivatives(line.scattered(y), line.scattered(dx), _vector(dweight), _vector(dbias)))
        return derivatives


class _Line:
    """Batch normalisation along a line; only cells whose weight is not 0 have a column."""

    def __init__(
        self,
        x: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        *,
        eps: float,
        direction: np.ndarray | None,
        order: int,
        weights: np.ndarray | None,
        statistics: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        c = x.shape[1]
        counts = np.ones(x.size // c) if weights is None else weights.astype(np.float64).ravel()
        self._shape, self._order, self._counted = x.shape, order, counts > 0
        self._is_constant = statistics is not None
        self.w = _decimals(counts[self._counted])
        self.n = self.w.sum() + _ZERO or _ONE
        self.scale = _column(np.ones(c) if weight is None else weight)
        values = self.rows(x)
        if direction is not None and order:
            values.terms[1] = self.rows(direction).terms[0]
        if statistics is None:
            # Subtract one of the values first, so that a constant channel gives exact zeros.
            centred = values.around(values.terms[0][:, :1]) if self._counted.any() else values
            centred = centred - centred.each(self._mean)
            var = (centred * centred).each(self._mean)
        else:
            running_mean, running_var = map(_column, statistics)
            centred = values.around(running_mean)
            var = _Series([running_var, *[0 * running_var] * order])
        self.invstd = (var + Decimal(eps)).inverse_root()
        self.xhat = centred * self.invstd
        self.y = self.xhat.each(lambda term: self.scale * term) + (_column(np.zeros(c) if bias is None else bias))

    def pullback(self, gradient: _Series) -> tuple[_Series, _Series, _Series]:
        """Return the gradients of x, weight and bias, given that of y."""
        sum_dy, sum_dy_xhat = gradient.each(_sum), (gradient * self.xhat).each(_sum)
        dx = gradient
        if not self._is_constant:
            dx = dx - sum_dy.each(lambda term: self.w * term / self.n)
            dx = dx - (self.xhat * sum_dy_xhat).each(lambda term: self.w * term / self.n)
        return (self.invstd * dx).each(lambda term: self.scale * term), sum_dy_xhat, sum_dy

    def rows(self, x: np.ndarray) -> _Series:
        """Return an array of x's shape as a constant series of rows: one per channel, without cells of weight 0."""
        values = _decimals(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)[:, self._counted])
        return _Series([values, *[0 * values] * self._order])

    def scattered(self, rows: _Rows) -> np.ndarray:
        """Return rows as an array of x's shape, in float64, with 0 in cells of weight 0."""
        n, c, *length = self._shape
        values = np.zeros((c, self._counted.size))
        values[:, self._counted] = rows
        return np.moveaxis(values.reshape(c, n, *length), 0, 1)

    def _mean(self, term: _Rows) -> _Rows:
        return _sum(self.w * term) / self.n


def _sum(rows: _Rows) -> _Rows:
    """Return the sum of each row as a column."""
    return rows.sum(axis=1, keepdims=True) + _ZERO  # converts an empty sum, which is an int


def _decimals(values: np.ndarray) -> _Rows:
    return np.frompyfunc(Decimal, 1, 1)(values.astype(np.float64))


def _column(vector: np.ndarray) -> _Rows:
    return _decimals(vector)[:, None]


def _vector(column: _Rows) -> np.ndarray:
    vector: np.ndarray = column[:, 0].astype(np.float64)
    return vector
