"""The passes over x with NumPy alone.

Statistics are exact to float64, whatever x is, and the bits do not depend on the run, the memory order or the number
of threads. Each pass reads x once, in tiles that stay within the processor's caches, and needs no more memory than a
few of them beside its result.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import TypeAlias

import numpy as np

from mbn.contract import Moments
from mbn_cpu import threads, tiles
from mbn_cpu.tiles import Form, Tile
from mbn_cpu.vectors import WIDE, Mean, Pair, as_pair, fold_rows, heaviest, invstd, line

Place: TypeAlias = tuple[Tile, *tuple[np.ndarray | None, ...]]
"""A tile, and what several arrays have there."""


@np.errstate(all="ignore")
def moments(x: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    Sums of d = x - shift and of d², with one value of each channel for a shift, lose at most a factor N of
    float64's precision however far the shift is from the mean, since the shift is one of the values. That is plenty
    for narrower input. float64 input is summed again around its mean, which also gives the rest of the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    shift = heaviest(x, weights)
    count = x.size // x.shape[1] if weights is None else fold_rows(weights.flatten().astype(WIDE))
    divisor = count or 1  # without any weight the sums are 0 as well
    total, squares = _shifted_sums(x, shift, weights)
    if x.dtype == WIDE:
        shift += total / divisor
        total, squares = _shifted_sums(x, shift, weights)
    mean = total / divisor
    return Moments(count, Pair(shift, mean), squares - total * mean)


@np.errstate(all="ignore")
def normalize(
    x: np.ndarray,
    mean: Mean,
    var: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
    weights: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order, and 0 where weights are 0."""
    compute = np.result_type(x.dtype, np.float32)  # float16 and bfloat16 are computed in float32
    parameters = line(mean, var, weight, bias, eps, compute)
    y = np.empty_like(x) if out is None else out

    def write(tile: Tile, y: np.ndarray, x: np.ndarray, w: np.ndarray | None) -> None:
        center, scale, shift = (tiles.spread(vector, tile, x.shape) for vector in parameters)
        values = y if y.dtype == compute else np.empty(y.shape, compute)
        np.subtract(x, center, out=values, dtype=compute)
        values *= scale
        values += shift
        _clear(values, w)
        if values is not y:
            y[...] = values

    _each(write, tiles.for_values(x), y, x, _against(weights, x))
    return y


@np.errstate(all="ignore")
def grad_sums(
    dy: np.ndarray, x: np.ndarray, mean: Mean, var: np.ndarray, eps: float, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and of dy * (x - mean) / sqrt(var + eps) for each channel, in float64."""
    hi, lo = as_pair(mean)

    def terms(tile: Tile, x: np.ndarray, dy: np.ndarray, w: np.ndarray | None) -> Iterator[np.ndarray]:
        gradient = dy.astype(WIDE, order="C")
        _clear(gradient, w)
        yield gradient
        product = x.astype(WIDE, order="C")
        product -= tiles.spread(hi, tile, x.shape)
        product *= gradient
        _clear(product, w)
        yield product

    sum_dy, products = _sums(terms, x, dy, _against(weights, x))
    return sum_dy, (products - lo * sum_dy) * invstd(var, eps)


@np.errstate(all="ignore")
def grad_input(
    dy: np.ndarray,
    x: np.ndarray,
    mean: Mean,
    var: np.ndarray,
    weight: np.ndarray | None,
    eps: float,
    sums: tuple[np.ndarray, np.ndarray] | None,
    count: float | None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the gradient of x, in its dtype and memory order: scale * (dy - w * (mean_dy + xhat * mean_dy_xhat)).

    Computed in float64 and rounded once: where the gradient is small its terms are not, and all digits of them cancel.
    """
    scale = invstd(var, eps)
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        hi, lo = as_pair(mean)
        slope = scale * sum_dy_xhat / count
        average = sum_dy / count - lo * slope
    if weight is not None:
        scale = scale * weight
    dx = np.empty_like(x)

    def write(tile: Tile, dx: np.ndarray, dy: np.ndarray, x: np.ndarray, w: np.ndarray | None) -> None:
        values = dy.astype(WIDE)
        if sums is not None:
            shared = np.subtract(x, tiles.spread(hi, tile, x.shape), dtype=WIDE)
            shared *= tiles.spread(slope, tile, x.shape)
            shared += tiles.spread(average, tile, x.shape)
            if w is not None:
                shared *= w
            values -= shared
        values *= tiles.spread(scale, tile, x.shape)
        _clear(values, w)
        dx[...] = values

    _each(write, tiles.for_values(x), dx, dy, x, _against(weights, x))
    return dx


def _shifted_sums(x: np.ndarray, shift: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the weighted sums of x - shift and of its squares for each channel, (2, C) in float64."""
    is_mask = weights is None or bool(np.all((weights == 0) | (weights == 1)))

    def terms(tile: Tile, x: np.ndarray, w: np.ndarray | None) -> Iterator[np.ndarray]:
        d = x.astype(WIDE, order="C")
        d -= tiles.spread(shift, tile, x.shape)
        _clear(d, w)
        if is_mask:
            yield d
            d *= d
            yield d
        else:
            yield d * w
            d *= d
            d *= w
            yield d

    return _sums(terms, x, _against(weights, x))


def _sums(terms: Callable[..., Iterator[np.ndarray]], *arrays: np.ndarray | None) -> np.ndarray:
    """Return the sums of two terms for each channel of arrays in the shape of the first, (2, C) in float64.

    ``terms`` yields those of a tile; one may be used up for the next.
    """
    rows = _rows(tiles.for_sums(arrays[0]), *arrays)
    partial = np.empty((len(rows), 2, arrays[0].shape[1]))
    places = [(totals, *place) for totals, row in zip(partial, rows, strict=True) for place in row]

    def add(i: int) -> None:
        totals, tile, *own = places[i]
        for total, values in zip(totals, terms(tile, *own), strict=True):
            total[tile[2]] = np.add.reduce(fold_rows(np.add.reduce(values)), axis=1)

    threads.run(add, len(places))
    return fold_rows(partial)


def _each(task: Callable[..., None], form: Form, *arrays: np.ndarray | None) -> None:
    """Call ``task(tile, *tiles of the arrays)`` for all tiles; the arrays have the shape of the first."""
    places = [place for row in _rows(form, *arrays) for place in row]
    threads.run(lambda i: task(*places[i]), len(places))


def _rows(form: Form, *arrays: np.ndarray | None) -> list[list[Place]]:
    """Return all tiles of arrays, in lists of those that cover all channels."""
    size = tiles.size_of(arrays[0])
    parts = zip(*(form.parts(array) if array is not None else repeat(None) for array in arrays), strict=False)
    return [
        [(tile, *(None if array is None else tiles.of(array, tile) for array in part)) for tile in row]
        for part in parts
        for row in tiles.cut(part[0].shape, size)
    ]


def _against(weights: np.ndarray | None, x: np.ndarray) -> np.ndarray | None:
    """Return weights, (N,) or (N, L), as (N, 1) or (N, 1, L), to broadcast against x."""
    return None if weights is None else weights[:, None]


def _clear(values: np.ndarray, w: np.ndarray | None) -> None:
    """Set to 0 what has no weight, whatever it is."""
    if w is not None:
        integers = values.view(f"i{values.itemsize}")
        # All bits or none: a product with 0 would keep NaN, and a masked copy takes several times as long.
        integers &= -(w != 0).astype(integers.dtype)
