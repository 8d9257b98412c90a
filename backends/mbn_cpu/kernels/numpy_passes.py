"""The passes over x with NumPy alone.

``numpy_tiles`` has a sketch of how arrays are cut into tiles. A tile is a task for one thread, which computes in arrays
of the tile's size that stay in its cache. Sums are made as a tree::

    tile, (a, f, c, l)   --add_rows over a--> (f, c, l) --add_rows over f--> (c, l) --add.reduce over l--> (c,)
    list of tiles        --each writes its channels---> partial[i], num x C
    partial, lists x num x C --fold_rows: the second half is added to the first, until one is left--> num x C

``add_rows`` is ``np.add.reduce``, which adds one row after another, or ``fold_rows``, which is a tree as well.

Statistics have the accuracy of float64 for every dtype of x, and their bits depend neither on the memory order nor on
the number of threads. Each pass reads x once, and allocates its result and a few tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np

from mbn.contract import Batch, Moments, Stats
from mbn_cpu import memory, thread_pool
from mbn_cpu.channel_stats import (
    WIDE,
    Line,
    added,
    as_pair,
    fold_rows,
    heaviest,
    invstd,
    is_far,
    is_wide,
    projection,
    units,
)
from mbn_cpu.kernels import numpy_tiles
from mbn_cpu.kernels.numpy_tiles import Columns, Layout, Scratch, Tile

_SHARE = 4
"""The least number of tiles per thread: waking up a thread takes a good part of the time of one tile."""

TileViews: TypeAlias = tuple[Tile, *tuple[np.ndarray | None, ...]]
"""A tile, and that tile of several arrays; None where an array is absent."""


@np.errstate(all="ignore")
def moments(x: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L).

    The sums are of d = x - shift and of d², with one value of each channel as the shift. Since the shift is one of the
    values, the sums lose at most a factor N of float64's precision. That is accurate enough for narrower input, unless
    the shift is an outlier. Then the batch is summed again around its mean; so is float64 input, with sums in parts,
    which also give the rest of the mean.

    Source: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, section 3 (shifted data).
    """
    shift = heaviest(x, weights)
    count = x.size // x.shape[1] if weights is None else fold_rows(weights.flatten().astype(WIDE))
    divisor = count or 1  # if all weights are 0, so are the sums
    total, squares = sums = _shifted_sums(x, shift, weights)
    if is_wide(x):
        shift += total / divisor
        parts = _shifted_sums(x, shift, weights, units(sums, divisor))
        total, squares = parts[::2] + parts[1::2]
    elif is_far(squares, squares - total * (total / divisor)):
        shift += total / divisor
        total, squares = _shifted_sums(x, shift, weights)
    mean = total / divisor
    return Moments(count, added(shift, mean), squares - total * mean)


def normalize(
    x: np.ndarray, line: Line, weights: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Return x normalised by a line, in its dtype and memory order, and 0 where weights are 0."""
    compute, columns = line.scale.dtype, Columns(*line)
    y = memory.empty_like(x) if out is None else out

    def write(scratch: Scratch, tile: Tile, y: np.ndarray, x: np.ndarray, w: np.ndarray | None) -> None:
        # Compute in y itself if it has the dtype to compute in, else in the scratch.
        center, scale, shift = columns.of(tile, x.shape)
        values = y if y.dtype == compute else scratch.empty(y.shape, compute)
        np.subtract(x, center, out=values, dtype=compute)
        values *= scale
        values += shift
        _clear(values, w)
        if values is not y:
            y[...] = values

    _each(write, numpy_tiles.for_values(x, y), y, x, _against_x(weights))
    return y


@np.errstate(all="ignore")
def grad_sums(dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and of dy * (x - mean) / sqrt(var + eps) for each channel, in float64."""
    hi, lo = as_pair(stats.mean)
    columns = Columns(hi)

    # The terms of both sums, dy and dy * (x - hi). A weight of 0 clears the product, since x may be NaN.
    def terms(
        scratch: Scratch, tile: Tile, x: np.ndarray, dy: np.ndarray, w: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        gradient, product = scratch.copy(dy, WIDE), scratch.copy(x, WIDE)
        product -= columns.of(tile, x.shape)[0]
        product *= gradient
        for term in (gradient, product):
            _clear(term, w)
            yield term

    sum_dy, products = _sums(terms, batch.x, dy, _against_x(batch.sample_weight), add_rows=fold_rows)
    return sum_dy, (products - lo * sum_dy) * invstd(stats.var, eps)


@np.errstate(all="ignore")
def grad_input(
    dy: np.ndarray,
    batch: Batch,
    stats: Stats,
    weight: np.ndarray | None,
    eps: float,
    sums: tuple[np.ndarray, np.ndarray] | None,
) -> np.ndarray:
    """Return the gradient of x, in its dtype and memory order.

    It is scale * (dy - w * ((x - center) * slope + average)), or scale * dy without sums. It is computed in float64 and
    rounded once, since its terms may be much larger than the gradient and lose most of their digits in the difference.
    """
    x, weights, _ = batch
    scale, shared = projection(stats, weight, eps, sums)
    columns = Columns(scale) if shared is None else Columns(*shared)
    dx: np.ndarray = memory.empty_like(x)

    def write(
        scratch: Scratch, tile: Tile, dx: np.ndarray, dy: np.ndarray, x: np.ndarray, w: np.ndarray | None
    ) -> None:
        values = scratch.copy(dy, WIDE)
        scale, *others = columns.of(tile, x.shape)
        if others:
            center, slope, average = others
            projected = scratch.copy(x, WIDE)
            projected -= center
            projected *= slope
            projected += average
            if w is not None:
                projected *= w
            values -= projected
        values *= scale
        _clear(values, w)
        dx[...] = values

    _each(write, numpy_tiles.for_values(x, dx, dy), dx, dy, x, _against_x(weights))
    return dx


def _shifted_sums(
    x: np.ndarray, shift: np.ndarray, weights: np.ndarray | None, units: np.ndarray | tuple[()] = ()
) -> np.ndarray:
    """Return the weighted sums of x - shift and of its squares for each channel, (2, C) in float64.

    With ``units`` of both sums the result is (4, C), each sum in two parts: that of multiples of its unit's last digit,
    which add up exactly, and that of the rests.
    """
    columns = Columns(shift, *units)
    is_mask = weights is None or bool(np.all((weights == 0) | (weights == 1)))

    # The terms of both sums. The second term is computed in the array of the first, after the first has been summed.
    def terms(scratch: Scratch, tile: Tile, x: np.ndarray, w: np.ndarray | None) -> Iterator[np.ndarray]:
        d = scratch.copy(x, WIDE)
        d -= columns.of(tile, x.shape)[0]
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

    # The terms of four sums. Groups of four rows are added up first, so that fewer rows have to be split: an extreme
    # value costs the digits of the three values that it is added to, and of no others.
    def parts(scratch: Scratch, tile: Tile, x: np.ndarray, w: np.ndarray | None) -> Iterator[np.ndarray]:
        few, part, (_, *units) = *(scratch.empty(x.shape, WIDE) for _ in range(2)), columns.of(tile, x.shape)
        for values, unit in zip(terms(scratch, tile, x, w), units, strict=True):
            rows = values if len(values) == 1 else _add_halves(_add_halves(values, few), few)
            multiples = np.add(rows, unit, out=part[: len(rows)])
            multiples -= unit
            yield multiples
            yield np.subtract(rows, multiples, out=multiples)

    return _sums(parts if len(units) else terms, x, _against_x(weights), num=2 + len(units))


def _sums(
    terms: Callable[..., Iterator[np.ndarray]],
    x: np.ndarray,
    *others: np.ndarray | None,
    num: int = 2,
    add_rows: Callable[[np.ndarray], np.ndarray] = np.add.reduce,
) -> np.ndarray:
    """Return the sums of ``num`` terms for each channel of arrays in the shape of the first, (num, C) in float64.

    ``terms`` yields the terms of a tile; each may be overwritten by the next, and by ``add_rows``. Adding one row after
    another, as ``np.add.reduce`` does, is fastest, and accurate enough where sums have parts, or x has fewer digits
    than float64.
    """
    rows = _rows(numpy_tiles.for_sums(x), x, *others)
    partial = np.empty((len(rows), num, x.shape[1]))

    def add(scratch: Scratch, totals: np.ndarray, tile: Tile, *own: np.ndarray | None) -> None:
        for total, values in zip(totals, terms(scratch, tile, *own), strict=True):
            np.add.reduce(add_rows(add_rows(values)), axis=1, out=total[tile[2]])

    _execute(add, [(totals, *views) for totals, row in zip(partial, rows, strict=True) for views in row])
    return fold_rows(partial)


def _add_halves(rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Add the second half of rows to the first, write the sums to ``out``, and return them; ``out`` may be ``rows``."""
    n, half = len(rows), (len(rows) + 1) // 2
    np.add(rows[: n - half], rows[half:], out=out[: n - half])
    out[n - half : half] = rows[n - half : half]
    return out[:half]


def _each(task: Callable[..., None], layout: Layout, *arrays: np.ndarray | None) -> None:
    """Call ``task(scratch, tile, *tiles of the arrays)`` for each tile; all arrays have the same shape."""
    # Backward: in training the pass for sums has just read each thread's last tiles, which are still in its cache.
    _execute(task, [views for row in _rows(layout, *arrays) for views in row], backward=True)


def _execute(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *, backward: bool = False) -> None:
    """Call ``task(scratch, *arguments[i])`` for each i, on several threads if these are many."""

    def execute(i: int) -> None:
        with Scratch.taken() as scratch:
            task(scratch, *arguments[i])

    thread_pool.run_tasks(execute, len(arguments), at_least=_SHARE, backward=backward)


def _rows(layout: Layout, *arrays: np.ndarray | None) -> list[list[TileViews]]:
    """Return the tiles of arrays in lists; the tiles of a list differ only in their channels. An array may be None."""
    parts = zip(*(layout.parts(array) if array is not None else repeat(None) for array in arrays), strict=False)
    return [
        [(tile, *(None if array is None else numpy_tiles.of(array, tile) for array in part)) for tile in row]
        for part in parts
        for row in numpy_tiles.cut(part[0].shape)
    ]


def _against_x(weights: np.ndarray | None) -> np.ndarray | None:
    """Return weights, (N,) or (N, L), as (N, 1) or (N, 1, L)."""
    return None if weights is None else weights[:, None]


def _clear(values: np.ndarray, w: np.ndarray | None) -> None:
    """Set values of weight 0 to 0, even NaN; ``w`` broadcasts against them."""
    if w is not None:
        integers = values.view(f"i{values.itemsize}")
        # The mask has all bits, -1, or none. A product with 0 would keep NaN, and a masked copy is several times
        # slower.
        integers &= -(w != 0).astype(integers.dtype)
