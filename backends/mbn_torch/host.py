"""Torch's tensors in host memory, for the kernels that work on NumPy arrays.

Nothing is copied but halves, which Torch brings to float32 and back much faster than NumPy. Nothing is left behind on a
tensor: ``Tensor.numpy`` would forbid for good to resize its storage. New tensors of x's size are Torch's own wherever a
kernel can write to them, so that they can do whatever tensors of Torch can. The verbs take and return what those of the
other kernels do; the residuals of training stay arrays, which only the pullback reads.
"""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from mbn.contract import Moments, Residuals, widened
from mbn.state import Params, State
from mbn_cpu import pages, threads, vectors
from mbn_cpu.fastest import host
from mbn_torch import ops
from mbn_torch.vectors import Mean, Pair, Scaled, Variance

_has_versions = hasattr(torch._C, "_to_dlpack_versioned")  # noqa: SLF001 - Torch 2.9 and later


_HALVES = torch.float16, torch.bfloat16
_FORMS = Pair, Scaled
_FORMS_IN_ARRAYS = vectors.Pair, vectors.Scaled
"""The same two."""
_KEPT = int, torch.Tensor, *_FORMS


class _Shared:
    """A tensor whose memory NumPy may share: ``Tensor.__dlpack__`` without its checks, which have been made."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: object) -> object:
        is_versioned = max_version is not None and _has_versions
        return (torch._C._to_dlpack_versioned if is_versioned else torch._C._to_dlpack)(self.tensor)  # noqa: SLF001

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def tensors(residuals: Residuals) -> Residuals:
    """Return residuals as tensors, whatever they are."""
    return Residuals(*map(_tensor, residuals))


def moments(x: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
    """Return count, mean (a Pair) and m2 (float64) of each channel of x, (N, C) or (N, C, L)."""
    with _limited():
        return Moments(*map(_tensor, host().moments(_array(_wide(x)), _array(weights))))


def merge(first: Moments, second: Moments) -> Moments:
    """Return the statistics of two batches together."""
    merged = vectors.merge(*(Moments(*map(_array, moments)) for moments in (first, second)))
    return Moments(*map(_tensor, merged))


def normalize(
    x: torch.Tensor,
    mean: Mean,
    var: Variance,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order."""
    y = _like(x) if out is None else out
    wide_x, wide_y = _wide(x), _room(y)
    arrays = map(_array, (wide_x, mean, var, weight, bias))
    with _limited():
        host().normalize(*arrays, eps, _array(weights), _writable(wide_y))
    return _narrow(wide_y, y)


def grad_sums(
    dy: torch.Tensor, x: torch.Tensor, mean: Mean, var: Variance, eps: float, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of dy and of dy * xhat for each channel, in float64."""
    with _limited():
        sum_dy, sum_dy_xhat = host().grad_sums(*map(_array, (_wide(dy), _wide(x), mean, var)), eps, _array(weights))
    return _tensor(sum_dy), _tensor(sum_dy_xhat)


def grad_input(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: Mean,
    var: Variance,
    weight: torch.Tensor | None,
    eps: float,
    sums: tuple[torch.Tensor, torch.Tensor] | None,
    count: Any,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of x, in its dtype and memory order."""
    arrays = (
        *map(_array, (_wide(dy), _wide(x), mean, var, weight)),
        eps,
        None if sums is None else tuple(map(_array, sums)),
    )
    with _limited():
        return _arranged(host().grad_input(*arrays, _array(count), _array(weights)), x)


def batch_norm_residuals(
    x: torch.Tensor,
    params: Params,
    state: State,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    correction: int,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State, Residuals]:
    """Return output, new state and residuals of a whole call."""
    y = _like(x) if out is None else out
    params, arrays = Params(*map(_array, params)), State(*map(_array, state))
    wide_y = _room(y)
    after, residuals = _run(_wide(x), wide_y, params, arrays, training, momentum, eps, correction, weights)
    _narrow(wide_y, y)
    if not training:
        return y, state, Residuals(state.running_mean, state.running_var, None)
    return y, State(*map(_tensor, after)), residuals


def pullback(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residuals: Residuals,
    eps: float,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of x, weight and bias."""
    weight, residuals = _array(weight), Residuals(*map(_array, residuals))
    wide_dy, wide_x, fastest = _wide(dy), _wide(x), host()
    is_double = weight is not None and vectors.is_wide(weight)
    if not fastest.compiled and ops.takes(wide_x, weights, training=True) and not is_double:
        dx = torch.empty_like(x)
        sums = ops.pullback(wide_dy, wide_x, weight, residuals, eps, dx)
    else:
        with _limited():
            dx, *sums = fastest.pullback(_array(wide_dy), _array(wide_x), weight, residuals, eps, _array(weights))
        dx = _arranged(dx, x)
    if weight is not None and sums[0].dtype != weight.dtype:  # which autograd would do, in more time
        with np.errstate(over="ignore"):
            sums = [total.astype(weight.dtype) for total in sums]
    return dx, *map(_tensor, sums)


def _run(
    x: torch.Tensor,
    y: torch.Tensor,
    params: Params,
    state: State,
    training: bool,  # noqa: FBT001 - in every call, where keywords cost
    momentum: float | None,
    eps: float,
    correction: int,
    weights: torch.Tensor | None,
) -> tuple[State, Residuals | None]:
    """Write the output to y in the fastest way; return new state and, of training, residuals. Vectors are arrays."""
    is_widened = training and widened(x, params, state)
    if ops.takes(x, weights, training=training) and not (training and host().compiled) and not is_widened:
        if training:
            result = ops.train(x, y, params, state, momentum, eps, correction)
        else:
            result = (state, None) if ops.evaluate(x, y, params, state, eps) else None
        if result is not None:
            return result
    fastest = host()
    values, out = _array(x), _writable(y)
    if fastest.whole.takes(values, weights, out) and not is_widened:
        result = fastest.at_once(values, params, state, training, momentum, eps, correction, out)
        if result is not None:
            return result[1:]
    settings = {"training": training, "momentum": momentum, "eps": eps, "correction": correction}
    with _limited():
        return fastest.batch_norm_residuals(values, params, state, **settings, weights=_array(weights), out=out)[1:]


def _limited() -> AbstractContextManager[None]:
    return threads.limited(torch.get_num_threads())


def _array(value: Any) -> Any:
    """Return a tensor, or all that a statistic consists of, as arrays; anything else is one, or no array at all."""
    if isinstance(value, torch.Tensor):
        return np.from_dlpack(_Shared(value))
    if isinstance(value, _FORMS):
        return _FORMS_IN_ARRAYS[_FORMS.index(type(value))](*map(_array, value))
    return value


def _writable(tensor: torch.Tensor) -> np.ndarray:
    array = _array(tensor)
    # Before Torch 2.9 and NumPy 2.1 neither could say who may write.
    return array if array.flags.writeable else tensor.numpy()


def _tensor(value: Any) -> Any:
    """Return an array, or all that a statistic consists of, as tensors; anything else is one, a count, or None."""
    if value is None or isinstance(value, _KEPT):
        return value
    if isinstance(value, _FORMS_IN_ARRAYS):
        return _FORMS[_FORMS_IN_ARRAYS.index(type(value))](*map(_tensor, value))
    return torch.from_numpy(np.asarray(value))


def _arranged(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Return an array in the shape of x as a tensor in its dtype and memory order, as Torch has it."""
    tensor = _tensor(values)
    if tensor.dtype == x.dtype:
        if tensor.stride() == x.stride():
            return tensor
        like = torch.empty_like(x)
        return tensor if tensor.stride() == like.stride() else like.copy_(tensor)
    return _like(x).copy_(tensor)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy in float32 of halves."""
    return _like(x, torch.float32).copy_(x) if x.dtype in _HALVES else x


def _room(y: torch.Tensor) -> torch.Tensor:
    """Return y to write to, or a tensor like it in float32 for one of halves."""
    return _like(y, torch.float32) if y.dtype in _HALVES else y


def _narrow(wide: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y with what was written to its room."""
    return y if wide is y else y.copy_(wide)


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a new tensor like x, to be written to."""
    y = torch.empty_like(x, dtype=dtype)
    pages.advise(y.data_ptr(), y.nbytes)
    return y
