"""The values that pass between the frontend and a backend, and the few questions that both ask of arrays.

Parameters, statistics and all that is returned are NamedTuples: JAX and Torch take those as pytrees without
registration, and a layer that stores its state in one assignment can never be seen half updated.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mbn.contract.dtypes import dtype_name

Array: TypeAlias = Any
"""An array of some framework.

The frontend asks of it ``shape``, ``ndim`` and ``dtype``; ``mT`` or ``swapaxes``; basic slices, ``x[start:stop]``,
``x[0, :]``, ``x[:0, ...]``; and ``x + x``. Of an integer scalar it asks ``int(x)``, ``x - 1`` and ``x >> 1``.
"""

_LIMITS = {f"int{bits}": (2 ** (bits - 1) - 1, bits - 1) for bits in (8, 16, 32, 64)}
"""The largest number of a dtype, and how far its sign is from its last bit."""


def transposed(x: Array) -> Array:
    """Return ``x`` with its last two axes swapped, in the same memory where arrays have memory orders."""
    return x.mT if hasattr(x, "mT") else x.swapaxes(-1, -2)  # CuPy has mT from 14 on


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether two values of an array share memory; ``strides`` are in bytes, as ``itemsize`` is."""
    axes = sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    if 0 in shape or not axes:
        return False
    reach, is_nested = itemsize, True
    for stride, size in axes:
        is_nested = is_nested and stride >= reach
        reach += stride * (size - 1)
    if is_nested or axes[0][0] < itemsize:
        return not is_nested
    # Two values share memory if some steps along the axes, not all of them 0, come back to less than one value's size.
    # Of the longest axis only the two numbers of steps that come nearest to that have to be tried.
    *others, (stride, size) = sorted(axes, key=lambda axis: axis[1])
    offsets = np.zeros(1, np.int64)
    for other, length in others:
        offsets = np.add.outer(offsets, other * np.arange(1 - length, length)).ravel()
    offsets = np.delete(offsets, offsets.size // 2)  # no steps along any of these
    steps = -offsets // stride + np.array([[0], [1]])
    return bool(np.any((abs(steps) < size) & (abs(offsets + steps * stride) < itemsize)))


def counted(count: Array) -> Array:
    """Return a count of batches after one more. At the largest integer of its dtype it stays, and does not wrap."""
    limit, sign = _LIMITS.get(dtype_name(count.dtype), (None, None))
    return count + 1 if limit is None else count - ((count - limit) >> sign)  # which is -1 below the limit


class Params(NamedTuple):
    """The parameters, which training learns: each (C,) in the layer's dtype, or None where the layer has none."""

    weight: Any
    bias: Any


class State(NamedTuple):
    """The statistics that training tracks: (C,), (C,) in the layer's dtype and an integer scalar, or None for each."""

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any


class Settings(NamedTuple):
    """The arguments of a layer that stay the same from call to call; all of them are checked."""

    num_features: int | None
    dtype: str
    eps: float
    momentum: float | None
    axis: int
    correction: int

    def has_channels_last(self, ndim: int) -> bool:
        """Tell whether an input of ``ndim`` axes is (N, L, C), which backends see as (N, C, L)."""
        return self.axis == -1 and ndim == 3


class Capabilities(NamedTuple):
    """What a backend can do. Tests, benchmarks, the command line and the docs read it here and nowhere else."""

    dtypes: frozenset[str]
    """Floating dtypes of x, by name."""
    devices: tuple[str, ...]
    """Devices usable here and now, the default one first; each is accepted by ``asarray(x, device=...)``."""
    mutable: bool
    """Arrays can be written in place, so the suite has to prove that they are not."""
    strided: bool
    """Arrays can have any memory order, and outputs keep that of x."""
    masks: bool = False
    """Batches can have sample weights: the kernels take them."""
    autograd: bool = False
    """The framework differentiates through every call, backwards and forwards and again: ``grad``, ``jvp``."""
    vmap: bool = False
    """The framework vectorises calls over a further axis: ``vmap``."""
    jit: bool = False
    """The framework traces and compiles pure functions: ``jit``."""
    compile: bool = False
    """The framework compiles Python as it stands, a layer that changes its state included: ``compile``."""
    modules: bool = False
    """The framework has modules, and a layer can be one: ``module``."""
    any_size: bool = False
    """Values, parameters and statistics may have any size: one beyond all others, or squares that no dtype holds."""
    out: bool = False
    """Outputs can be written to an array of the caller's: the kernels take it."""


class Batch(NamedTuple):
    """What a kernel passes over."""

    x: Array
    """(N, C) or (N, C, L), with at least one value."""
    sample_weight: Array | None = None
    """How often each value counts, in every channel alike: (N,) for an x of (N, C) and (N, L) for one of (N, C, L), in
    the layer's dtype, at least 0; or None, where each counts once. One that weighs 0 is no value: it may be NaN or
    infinite, and no statistic, output or gradient may depend on it. A constant to differentiation."""
    dtype: str = "float32"
    """That of parameters and statistics, float32 or float64. Where x has fewer digits than float64 and they have all,
    statistics and gradients of parameters are as exact as those of an x in float64."""


class Moments(NamedTuple):
    """Per-channel statistics of one batch."""

    count: Any  # the field's name; tuple.count is of no use here
    """Values per channel, an int; of a weighted batch the sum of its weights, in a form of the backend's own."""
    mean: Any
    """The mean, in whatever form the backend's other kernels read: it may carry more precision than x."""
    m2: Any
    """Sum of squared deviations from the mean, in the backend's own form too: ``variance`` reads it."""


class Stats(NamedTuple):
    """The statistics by which a batch is normalised, and which its pullback needs."""

    mean: Any
    """Of the batch, in the form of ``Moments.mean``; or a running mean, (C,)."""
    var: Any
    """The same of the variance, in the form of ``variance``."""
    count: Any
    """``Moments.count`` where both depend on x; None where they are constants: in evaluation."""
