"""The whole of a call in as few of Torch's operations as it takes, each of them on several threads.

It is for float32 of a size for which one operation is done in some microseconds, and the values that it leaves behind
are still in the caches when the next one reads them. Statistics are exact to float64. The bits do not depend on the
memory order or the number of threads: all that is summed up lies in one order, and Torch sums each row of a result
on one thread. Vectors are NumPy's, whose calls take less time.
"""

from typing import Any

import numpy as np
import torch

from mbn.contract import Batch, Operation, Stats
from mbn.state import Params, Settings, State
from mbn_cpu.extremes import of_line
from mbn_cpu.tiles import Scratch
from mbn_cpu.vectors import WIDE, Line, Mean, added, as_pair, counted, invstd, is_far, is_wide, lerp, line, step

_SMALLEST = 1 << 14
_LARGEST = 1 << 19
"""Values of a batch in training: with more, memory in float64 is what everything waits for."""
_PARTS = 32
"""Sums made apart and added afterwards: a thread takes whole ones as long as there are no more threads than these."""
_SMALL_MEAN = 0.5
"""The largest mean, in standard deviations, that need not be subtracted first."""
_BLOCK = 1 << 18
"""Values that two operations one after another find in the caches."""


def takes(operation: Operation, batch: Batch, vectors: tuple[Any, ...]) -> bool:
    """Tell whether this is the fastest way for a call, of arrays, that Numba does not do."""
    x, sample_weight, dtype = batch
    if sample_weight is not None or x.dtype != np.float32 or x.size <= _SMALLEST or operation == "moments":
        return False
    if operation == "evaluate":
        return True
    if x.size > _LARGEST or len(x) < _PARTS:
        return False
    return dtype == "float32" if operation == "train" else vectors[0] is None or not is_wide(vectors[0])


@np.errstate(all="ignore")
def train(
    x: torch.Tensor,
    y: torch.Tensor,
    params: Params,
    state: State,
    settings: Settings,
) -> tuple[State, Stats] | None:
    """Write the output of a step of training on x, (N, C) or (N, C, L), to y; return new state and statistics.

    Parameters and statistics are arrays, those returned too. Where a channel is beyond the range of float32, return
    None and write nothing.
    """
    running_mean, running_var, num_batches_tracked = state
    n = x.numel() // x.shape[1]
    shift = (x[0] if x.ndim == 2 else x[0, :, 0]).to(torch.float64).numpy()  # noqa: PLR2004 - (N, C)
    with Scratch.taken() as scratch:
        d = _deviations(scratch, x, shift)
        total, squares = _sums(scratch, x, d, torch.mul(d, d, out=_empty(scratch, d.shape)))
        if is_far(squares, squares - total * (total / n)):
            shift += total / n
            d = _deviations(scratch, x, shift)
            total, squares = _sums(scratch, x, d, torch.mul(d, d, out=_empty(scratch, d.shape)))
    rest = total / n
    m2 = squares - total * rest
    mean, var = added(shift, rest), m2 / n
    if not _normalize(x, y, mean, var, params, settings.eps):
        return None
    if num_batches_tracked is not None:
        num_batches_tracked = counted(num_batches_tracked)
    if running_mean is not None:
        share = step(settings.momentum, num_batches_tracked, n, settings.correction)
        running_mean = lerp(running_mean, mean, share)
        running_var = lerp(running_var, m2 / (n - settings.correction), share)
    return State(running_mean, running_var, num_batches_tracked), Stats(mean, var, n)


@np.errstate(all="ignore")
def evaluate(x: torch.Tensor, y: torch.Tensor, params: Params, state: State, eps: float) -> bool:
    """Write the output of evaluation on x, (N, C) or (N, C, L), to y; return False, and write nothing, as ``train``."""
    return _normalize(x, y, state.running_mean, state.running_var, params, eps)


@np.errstate(all="ignore")
def pullback(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: np.ndarray | None,
    stats: Stats,
    eps: float,
    dx: torch.Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Write the gradient of x to dx; return those of weight and bias."""
    mean, var, count = stats
    hi, lo = as_pair(mean)
    spread = invstd(var, eps)
    factor = spread if weight is None else spread * weight
    with Scratch.taken() as scratch:
        d, gradient = _deviations(scratch, x, hi), _contiguous(scratch, dy)
        sum_dy, products = _sums(scratch, x, gradient, torch.mul(d, gradient, out=_empty(scratch, d.shape)))
        sum_dy_xhat = (products - lo * sum_dy) * spread
        if count is None:
            gradient.mul_(_along(factor, x))
        else:
            slope = spread * sum_dy_xhat / count
            average = sum_dy / count - lo * slope
            torch.addcmul(gradient, d, _along(-slope, x), out=gradient)
            torch.addcmul(_along(-average * factor, x), gradient, _along(factor, x), out=gradient)
        dx.copy_(gradient.view(x.shape))
    return sum_dy_xhat, sum_dy


def _normalize(x: torch.Tensor, y: torch.Tensor, mean: Mean, var: np.ndarray, params: Params, eps: float) -> bool:
    """Write (x - mean) / sqrt(var + eps) * weight + bias to y, block by block, or nothing and return False."""
    vectors = _line(mean, var, *params, eps)
    if of_line(Line(vectors[0], *vectors[-2:]), mean, var, params.weight, eps) is not None:
        return False
    rows, results = x, y
    if x.ndim == 3:  # noqa: PLR2004 - (N, C, L)
        if x.is_contiguous() and y.is_contiguous():
            rows, results = x.view(len(x), -1), y.view(len(x), -1)
            vectors = [vector.repeat(x.shape[2]) for vector in vectors]
        elif x.mT.is_contiguous() and y.mT.is_contiguous():
            rows, results = (values.mT.reshape(-1, x.shape[1]) for values in (x, y))
        else:
            vectors = [vector[:, None] for vector in vectors]
    *center, scale, shift = map(torch.from_numpy, vectors)
    size = max(1, _BLOCK * len(rows) // x.numel())
    blocks = ((rows, results),) if len(rows) <= size else zip(rows.split(size), results.split(size), strict=True)
    for block, result in blocks:
        values = torch.sub(block, *center, out=result) if center else block
        torch.addcmul(shift, values, scale, out=result)
    return True


def _line(
    mean: Mean, var: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> list[np.ndarray]:
    """Return center, scale and shift, or two of them: x * scale + shift is as exact where no mean is large.

    Up to half a standard deviation the mean adds no more to the error, in a shift and a product that are rounded once,
    than the rounding of x - center would.
    """
    hi, lo = as_pair(mean)
    scale = invstd(var, eps)
    if not abs(hi * scale).max() <= _SMALL_MEAN:  # NaN is not small
        return list(line(mean, var, weight, bias, eps, np.float32))
    if weight is not None:
        scale *= weight
    shift = -(hi + lo) * scale
    if bias is not None:
        shift += bias
    return [scale.astype(np.float32), shift.astype(np.float32)]


def _sums(scratch: Scratch, x: torch.Tensor, *terms: torch.Tensor) -> np.ndarray:
    """Return the sums of two (N, C) or (N, C * L) for each channel, (2, C)."""
    n, width = terms[0].shape
    height = n // _PARTS
    whole = height * _PARTS
    parts = scratch.empty((_PARTS + n - whole, 2, width), WIDE)
    tensor = torch.from_numpy(parts)
    for i, values in enumerate(terms):
        torch.sum(values[:whole].view(_PARTS, height, width), 1, out=tensor[:_PARTS, i])
        if whole < n:
            tensor[_PARTS:, i] = values[whole:]
    sums = np.add.reduce(parts)
    return sums if x.ndim == 2 else np.add.reduce(sums.reshape(2, *x.shape[1:]), axis=2)  # noqa: PLR2004 - (N, C)


def _deviations(scratch: Scratch, x: torch.Tensor, center: np.ndarray) -> torch.Tensor:
    """Return x - center as (N, C) or (N, C * L) in float64."""
    return _contiguous(scratch, x).sub_(_along(center, x))


def _contiguous(scratch: Scratch, x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x in float64 and C order, as (N, C) or (N, C * L)."""
    return _empty(scratch, x.shape).copy_(x).view(len(x), -1)


def _empty(scratch: Scratch, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(scratch.empty(shape, WIDE))


def _along(vector: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Return a (C,) vector as it goes along a row of x, as (C,) or (C * L,)."""
    return torch.from_numpy(vector if x.ndim == 2 else vector.repeat(x.shape[2]))  # noqa: PLR2004 - (N, C)
