"""Arrays so small that a call of NumPy costs more than its arithmetic.

As few calls as possible, and all of the arithmetic in float64, rounded once. Neither weights nor float64 input, whose
statistics are summed twice, come here.
"""

import numpy as np

from mbn.contract import Residuals
from mbn.state import Params, State
from mbn_cpu.vectors import WIDE, Mean, Pair, step

_SIZE = 1 << 14
"""Values up to which this is the faster way."""


def takes(x: np.ndarray, weights: np.ndarray | None, *others: np.ndarray) -> bool:  # noqa: ARG001 - any memory will do
    """Tell whether a batch, and other arrays in its shape, are for this module."""
    return weights is None and x.size <= _SIZE and x.dtype != WIDE


@np.errstate(all="ignore")
def train(
    x: np.ndarray,
    params: Params,
    state: State,
    momentum: float | None,
    eps: float,
    correction: int,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, State, Residuals]:
    """Return output, new state and residuals of a step of training on x, (N, C) or (N, C, L)."""
    running_mean, running_var, num_batches_tracked = state
    n, axes = x.size // x.shape[1], _axes(x)
    first = x[0] if x.ndim == 2 else x[0, :, :1]  # noqa: PLR2004 - (N, C)
    d = np.subtract(x, first, dtype=WIDE, order="C")  # the order of sums must not be that of the memory
    rest = np.add.reduce(d, axes)
    rest /= n
    d -= _column(rest, x)
    var = np.add.reduce(np.square(d), axes)
    m2 = var.copy()
    var /= n
    mean = Pair(first.reshape(-1).astype(WIDE), rest)
    y = _affine(d, x, params, _invstd(var, eps), out)
    if num_batches_tracked is not None:
        num_batches_tracked = num_batches_tracked + 1
    if running_mean is not None:
        share = step(momentum, num_batches_tracked, n, correction)
        new = np.array((running_mean, running_var), WIDE)
        if share != 0:  # else they are kept, whatever the batch holds
            m2 *= share / (n - correction)
            new *= 1 - share
            new[0] += (mean.hi + rest) * share
            new[1] += m2
        running_mean, running_var = new.astype(running_mean.dtype)
    return y, State(running_mean, running_var, num_batches_tracked), Residuals(mean, var, n)


@np.errstate(all="ignore")
def evaluate(x: np.ndarray, params: Params, state: State, eps: float, out: np.ndarray | None = None) -> np.ndarray:
    """Return the output of evaluation on x, (N, C) or (N, C, L)."""
    d = np.subtract(x, _column(state.running_mean, x), dtype=WIDE)
    return _affine(d, x, params, _invstd(state.running_var, eps), out)


@np.errstate(all="ignore")
def pullback(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None, residuals: Residuals, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, weight and bias."""
    mean, var, count = residuals
    axes, invstd = _axes(x), _invstd(var, eps)
    d = _deviation(x, mean)
    gradient = dy.astype(WIDE, order="C")
    sum_dy = np.add.reduce(gradient, axes)
    sum_dy_xhat = np.add.reduce(d * gradient, axes)
    sum_dy_xhat *= invstd
    if count is not None:
        d *= _column(sum_dy_xhat * invstd / count, x)
        gradient -= _column(sum_dy / count, x)
        gradient -= d
    dx = np.empty_like(x)
    scale = invstd if weight is None else invstd * weight
    np.multiply(gradient, _column(scale, x), out=dx, casting="unsafe")
    return dx, sum_dy_xhat, sum_dy


def _affine(d: np.ndarray, x: np.ndarray, params: Params, scale: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Return d * scale * weight + bias, rounded once, like x; d and scale are used up."""
    weight, bias = params
    y = np.empty_like(x) if out is None else out
    if weight is not None:
        scale *= weight
    if bias is None:
        return np.multiply(d, _column(scale, x), out=y, casting="unsafe")
    d *= _column(scale, x)
    return np.add(d, _column(bias, x), out=y, casting="unsafe")


def _deviation(x: np.ndarray, mean: Mean) -> np.ndarray:
    hi, lo = mean if isinstance(mean, Pair) else (mean, None)
    d = np.subtract(x, _column(hi, x), dtype=WIDE, order="C")
    if lo is not None:
        d -= _column(lo, x)
    return d


def _invstd(var: np.ndarray, eps: float) -> np.ndarray:
    """Return 1 / sqrt(var + eps), and 0 where that has no value."""
    spread = np.add(var, eps, dtype=WIDE)
    result = 1 / np.sqrt(spread)
    if eps == 0:
        result[spread == 0] = 0
    return result


def _axes(x: np.ndarray) -> int | tuple[int, int]:
    return 0 if x.ndim == 2 else (0, 2)  # noqa: PLR2004 - (N, C) or (N, C, L)


def _column(vector: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return a (C,) vector in the shape that broadcasts against x."""
    return vector if x.ndim == 2 else vector[:, None]  # noqa: PLR2004 - (N, C) or (N, C, L)
