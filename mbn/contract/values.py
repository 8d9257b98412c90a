"""The values that pass between the frontend and a backend, and a few functions of arrays that both use.

Parameters, statistics and all results are NamedTuples: JAX and Torch take those as pytrees without registration, and a
layer stores its state in one assignment, so that no thread reads half an update.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mbn.contract.dtypes import dtype_name

Array: TypeAlias = Any
"""An array of some framework.

The frontend uses ``shape``, ``ndim`` and ``dtype``; ``mT`` or ``swapaxes``; basic slices, ``x[start:stop]``,
``x[0, :]``, ``x[:0, ...]``; and ``x + x``. Of an integer scalar it uses ``int(x)``, ``x - 1`` and ``x >> 1``.
"""

_LIMITS = {f"int{bits}": (2 ** (bits - 1) - 1, bits - 1) for bits in (8, 16, 32, 64)}
"""By dtype: its largest number, and the index of its sign bit."""


def transposed(x: Array) -> Array:
    """Return ``x`` with its last two axes swapped: a view, where a framework has views."""
    return x.mT if hasattr(x, "mT") else x.swapaxes(-1, -2)  # CuPy has mT from 14 on


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether two values of an array share memory; ``strides`` and ``itemsize`` are in bytes."""
    axes = sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    if 0 in shape or not axes:
        return False
    reach, is_nested = itemsize, True
    for stride, size in axes:
        is_nested = is_nested and stride >= reach
        reach += stride * (size - 1)
    if is_nested or axes[0][0] < itemsize:
        return not is_nested
    # Two values share memory if some steps along the axes, not all of them 0, lead to an offset below the size of one
    # value. Along the longest axis only the two numbers of steps that lead nearest to 0 have to be tried.
    *others, (stride, size) = sorted(axes, key=lambda axis: axis[1])
    offsets = np.zeros(1, np.int64)
    for other, length in others:
        offsets = np.add.outer(offsets, other * np.arange(1 - length, length)).ravel()
    offsets = np.delete(offsets, offsets.size // 2)  # the offset of no steps along any of these axes
    steps = -offsets // stride + np.array([[0], [1]])
    return bool(np.any((abs(steps) < size) & (abs(offsets + steps * stride) < itemsize)))


def counted(count: Array) -> Array:
    """Return a count of batches plus 1, or the largest integer of its dtype, so that it never wraps."""
    limit, sign = _LIMITS.get(dtype_name(count.dtype), (None, None))
    return count + 1 if limit is None else count - ((count - limit) >> sign)  # the shift gives -1 below the limit


class Params(NamedTuple):
    """The parameters, which training learns: each (C,) in the layer's dtype, or None where the layer has none."""

    weight: Any
    bias: Any


class State(NamedTuple):
    """The running statistics, (C,) in the layer's dtype, and the count of batches, an integer scalar; or None each."""

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
    """The capabilities of a backend: the only source for tests, benchmarks, the command line and the docs."""

    dtypes: frozenset[str]
    """Floating dtypes of x, by name."""
    devices: tuple[str, ...]
    """Names of the usable devices, the default one first; ``asarray(x, device=...)`` takes each."""
    mutable: bool
    """Arrays can be written to, so the suite has to show that no argument is."""
    strided: bool
    """Arrays can have any memory order, and outputs have that of x."""
    masks: bool = False
    """Batches can have sample weights: the kernels take them."""
    autograd: bool = False
    """The framework differentiates every call, in reverse and forward mode and to any order: ``grad``, ``jvp``."""
    vmap: bool = False
    """The framework vectorises calls over a further axis: ``vmap``."""
    jit: bool = False
    """The framework traces and compiles pure functions: ``jit``."""
    compile: bool = False
    """The framework compiles Python code that calls a layer and changes its state: ``compile``."""
    modules: bool = False
    """The framework has modules, and ``module`` makes one of a layer."""
    any_size: bool = False
    """Values, parameters and statistics may have any magnitude: extreme outliers, or squares beyond every dtype."""
    replicas: bool = False
    """Replicas can share the statistics of their batches: in processes, for which the kernels have ``to_vectors``, or
    along the axes of a program that the framework traces."""
    out: bool = False
    """Outputs can be written to an array of the caller's: the kernels take ``out``."""


class Batch(NamedTuple):
    """The input of a kernel: x and its sample weights."""

    x: Array
    """(N, C) or (N, C, L), with at least one value."""
    sample_weight: Array | None = None
    """The weight of each value, the same in every channel: (N,) for an x of (N, C) and (N, L) for one of (N, C, L), in
    the layer's dtype, at least 0; or None, where each value counts once. A value of weight 0 may be NaN or infinite,
    and no statistic, output or gradient may depend on it. A constant to differentiation."""
    dtype: str = "float32"
    """The dtype of parameters and statistics, float32 or float64. With float64, statistics and gradients of parameters
    are as exact as those of an x in float64, even if x has another dtype."""


class Moments(NamedTuple):
    """Per-channel statistics of one batch."""

    count: Any  # it hides tuple.count, which is of no use here
    """Values per channel, an int; of a weighted batch the sum of its weights, in the backend's representation."""
    mean: Any
    """The mean, in the backend's representation, which may have more digits than x."""
    m2: Any
    """The sum of squared deviations from the mean, in the backend's representation; ``variance`` reads it."""


class Stats(NamedTuple):
    """The statistics by which a batch is normalised, and which its pullback needs."""

    mean: Any
    """The batch's ``Moments.mean``, or a running mean, (C,)."""
    var: Any
    """The batch's biased variance, as ``variance`` returns it, or a running variance, (C,)."""
    count: Any
    """``Moments.count`` where mean and variance depend on x; None where they are constants, as in evaluation."""
