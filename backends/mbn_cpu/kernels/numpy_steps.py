"""Fused steps for arrays so small that a call of NumPy takes longer than its arithmetic.

They make as few calls as possible, compute in float64, and round once. They support neither sample weights nor float64
input, whose statistics need two passes.
"""

import numpy as np

from mbn.contract import Batch, Moments, Params, Settings, State, Stats
from mbn_cpu.channel_stats import (
    FAR_SQUARE,
    FORMULAS,
    WIDE,
    Pair,
    added,
    as_pair,
    counted,
    invstd,
    is_far,
    is_wide,
    lerp,
    step,
)

_BOUND = 2.0**800
"""The bound of vectors whose products with float32 numbers stay in the range of float64."""


@np.errstate(all="ignore")
def train(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> tuple[np.ndarray, State, Stats]:
    """Return output, new state and statistics of a step of training."""
    x, eps = batch.x, settings.eps
    running_mean, running_var, num_batches_tracked = state
    n, axes = x.size // x.shape[1], _axes(x)
    d = x.astype(WIDE, order="C")  # so that the order of sums does not depend on the memory order
    first = d[0].copy() if x.ndim == 2 else d[0, :, 0].copy()
    d -= _column(first, x)
    rest, m2 = _sums(d, n, axes)
    var = m2 / n
    scale = invstd(var, eps)
    far = rest * scale
    if far.dot(far) > FAR_SQUARE + 2 * far.size:  # ``is_far``, as one fast test of all channels
        first += rest
        np.subtract(x, _column(first, x), out=d)
        rest, m2 = _sums(d, n, axes)
        var = m2 / n
        scale = invstd(var, eps)
        far = rest * scale
    if params.weight is not None:
        scale *= params.weight
        far = rest * scale
    d *= _column(scale, x)
    d += _column(-far if params.bias is None else params.bias - far, x)
    y = _rounded(d, x, out)
    if num_batches_tracked is not None:
        num_batches_tracked = counted(num_batches_tracked)
    if running_mean is not None:
        share = step(settings.momentum, num_batches_tracked, n, settings.correction)
        running_mean = lerp(running_mean, first + rest, share)
        running_var = lerp(running_var, m2 / (n - settings.correction), share)
    return y, State(running_mean, running_var, num_batches_tracked), Stats(Pair(first, rest), var, n)


@np.errstate(all="ignore")
def evaluate(
    batch: Batch, params: Params, state: State, settings: Settings, out: np.ndarray | None
) -> np.ndarray | None:
    """Return the output of evaluation, or None where products may leave the range of float64."""
    x, (weight, bias) = batch.x, params
    scale = invstd(state.running_var, settings.eps)
    if weight is not None:
        scale *= weight
    if is_wide(state.running_var) and not all(
        vector is None or abs(vector).max() < _BOUND for vector in (scale, state.running_mean, bias)
    ):
        return None
    d = x.astype(WIDE)
    d -= _column(state.running_mean, x)
    d *= _column(scale, x)
    if bias is not None:
        d += _column(bias, x)
    return _rounded(d, x, out)


@np.errstate(all="ignore")
def pullback(
    dy: np.ndarray, batch: Batch, weight: np.ndarray | None, stats: Stats, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, weight and bias."""
    x, (mean, var, count) = batch.x, stats
    axes, factor = _axes(x), invstd(var, eps)
    d, gradient = x.astype(WIDE, order="C"), dy.astype(WIDE, order="C")
    for part in mean if isinstance(mean, Pair) else (mean,):
        d -= _column(part, x)
    sum_dy = np.add.reduce(gradient, axes)
    sum_dy_xhat = np.add.reduce(d * gradient, axes)
    sum_dy_xhat *= factor
    if count is not None:
        d *= _column(factor * sum_dy_xhat / count, x)
        gradient -= d
        gradient -= _column(sum_dy / count, x)
    scale = factor if weight is None else factor * weight
    gradient *= _column(scale, x)
    dx = _rounded(gradient, x)
    if weight is not None:  # the gradients in the parameters' dtype, infinite beyond its range
        sum_dy_xhat, sum_dy = sum_dy_xhat.astype(weight.dtype), sum_dy.astype(weight.dtype)
    return dx, sum_dy_xhat, sum_dy


# The parts of these steps before and after an exchange with other replicas.


@np.errstate(all="ignore")
def moments(batch: Batch) -> Moments:
    """Return the statistics of a batch."""
    x = batch.x
    n, axes = x.size // x.shape[1], _axes(x)
    d = x.astype(WIDE, order="C")
    center = d[0].copy() if x.ndim == 2 else d[0, :, 0].copy()
    d -= _column(center, x)
    rest, m2 = _sums(d, n, axes)
    if is_far(m2 + n * rest * rest, m2):
        center += rest
        np.subtract(x, _column(center, x), out=d)
        rest, m2 = _sums(d, n, axes)
    return Moments(n, added(center, rest), m2)


merge = FORMULAS.merge


@np.errstate(all="ignore")
def advance(state: State, moments: Moments, settings: Settings) -> tuple[Stats, State]:
    """Return the statistics to normalise a batch by, and the state after the step, as the formulas do."""
    n, (hi, lo), m2 = moments
    mean, var, count = state
    if count is not None:
        count = counted(count)
    share = 0.0 if mean is None else float(step(settings.momentum, count, n, settings.correction))
    if share != 0:
        rest = 1 - share
        mean = (rest * mean.astype(WIDE) + share * (hi + lo)).astype(mean.dtype)
        var = (rest * var.astype(WIDE) + share * (m2 / (n - settings.correction))).astype(var.dtype)
    return Stats(moments.mean, m2 / n, n), State(mean, var, count)


@np.errstate(all="ignore")
def normalize(batch: Batch, stats: Stats, params: Params, eps: float, out: np.ndarray | None) -> np.ndarray:
    """Return the output."""
    x, (weight, bias) = batch.x, params
    hi, lo = as_pair(stats.mean)
    scale = invstd(stats.var, eps)
    if weight is not None:
        scale *= weight
    d = x - _column(hi, x)
    d *= _column(scale, x)
    far = lo * scale
    d += _column(-far if bias is None else bias - far, x)
    return _rounded(d, x, out)


@np.errstate(all="ignore")
def grad_sums(dy: np.ndarray, batch: Batch, stats: Stats, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of dy and dy * xhat."""
    x, axes = batch.x, _axes(batch.x)
    hi, lo = as_pair(stats.mean)
    d, gradient = np.subtract(x, _column(hi, x), order="C"), dy.astype(WIDE, order="C")
    sum_dy = np.add.reduce(gradient, axes)
    d *= gradient
    products = np.add.reduce(d, axes)
    products -= lo * sum_dy
    products *= invstd(stats.var, eps)
    return sum_dy, products


@np.errstate(all="ignore")
def grad_input(
    dy: np.ndarray,
    batch: Batch,
    stats: Stats,
    weight: np.ndarray | None,
    eps: float,
    sums: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return the gradient of x, given the sums."""
    x, (sum_dy, sum_dy_xhat), (mean, var, count) = batch.x, sums, stats
    (hi, lo), scale = as_pair(mean), invstd(var, eps)
    slope = scale * sum_dy_xhat / count
    d = x - _column(hi, x)
    d *= _column(slope, x)
    d += _column(sum_dy / count - lo * slope, x)
    gradient = np.subtract(dy, d, out=d)
    gradient *= _column(scale if weight is None else scale * weight, x)
    return _rounded(gradient, x)


def _sums(d: np.ndarray, n: int, axes: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of d, and the sum of squares around it."""
    total, m2 = np.add.reduce(d, axes), np.add.reduce(d * d, axes)
    mean = total / n
    m2 -= total * mean
    return mean, m2


def _rounded(values: np.ndarray, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return values in the dtype and memory order of x, or in ``out``: a separate cast is fastest."""
    result = np.empty_like(x) if out is None else out
    result[...] = values
    return result


def _axes(x: np.ndarray) -> int | tuple[int, int]:
    return 0 if x.ndim == 2 else (0, 2)


def _column(vector: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return a (C,) vector in the shape that broadcasts against x."""
    return vector if x.ndim == 2 else vector[:, None]
