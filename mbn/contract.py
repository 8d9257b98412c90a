"""What a backend is.

A backend does the arithmetic of batch normalisation on one framework's arrays and nothing else: it never sees a mode,
a message or a layer. This module has to stay free of frameworks, and is all of mbn that a backend may import.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import numpy as np

from mbn.state import Params, State

Array: TypeAlias = Any
"""An array of some framework; only the backend that owns it knows more."""

_DTYPE_NAMES: dict[tuple[type, Hashable], str] = {}


def dtype_name(dtype: Any) -> str:
    """Return the name that NumPy, CuPy, JAX and Torch share for a dtype: ``"float32"`` for ``torch.float32``.

    ``dtype`` is a dtype of any framework, a NumPy scalar type or a name.
    """
    key = type(dtype), dtype  # equal dtypes of two frameworks may refuse to be compared
    name = _DTYPE_NAMES.get(key)
    if name is None:
        try:
            name = np.dtype(dtype).name
        except TypeError:  # torch.float32, array_api_strict.float32, "bfloat16": the last word is the name
            name = str(dtype).rpartition(".")[2]
        _DTYPE_NAMES[key] = name
    return name


def layer_dtype(dtype: str) -> str:
    """Return the dtype of the parameters and statistics that an input of ``dtype`` needs."""
    return "float64" if dtype == "float64" else "float32"


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


class Moments(NamedTuple):
    """Per-channel statistics of one batch."""

    count: int  # type: ignore[assignment]  # the field's name; tuple.count is of no use here
    """Values per channel."""
    mean: Any
    """The mean, in whatever form this backend's ``normalize`` and ``lerp`` read: it may carry more precision than x."""
    m2: Any
    """Sum of squared deviations from the mean; ``m2 / n`` is a variance in a form that the two read as well."""


class Backend(ABC):
    """The verbs of one framework.

    Every verb takes and returns the framework's own arrays, except at the border (``asarray``, ``to_numpy``). ``x`` has
    shape (N, C) or (N, C, L), holds at least one value, and has been checked: a backend validates nothing. Vectors are
    (C,) in the layer's dtype, float32 or float64. No verb writes to its arguments.

    Constructing a backend must raise where its framework cannot work (no GPU, say); the message reaches the user.
    """

    name: ClassVar[str]
    """The name under which it is registered."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a name: there is one backend of a name in a process."""
        from mbn.registry import get_backend  # noqa: PLC0415 - the registry builds on this module

        return get_backend, (self.name,)

    def __deepcopy__(self, memo: object) -> Self:
        """Be the same backend in a copied layer."""
        return self

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do here and now."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The version of the framework."""

    @abstractmethod
    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is an array of this framework. Asked once for each class of array."""

    @abstractmethod
    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        """Bring an own array or host data (a NumPy array, nested lists) to this framework.

        It may share memory with ``x``. ``"int64"`` may become int32 where the framework has no 64-bit integers.

        Raises:
            TypeError: the framework has no such dtype.
            ValueError: it has no such device.
        """

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Bring an own array to the host. It may share memory with ``x``."""

    @abstractmethod
    def device(self, x: Array) -> Any:
        """Return where ``x`` lies, comparable with ``==``; None where that binds nobody: traced, or free to move."""

    @abstractmethod
    def moments(self, x: Array) -> Moments:
        """Return the statistics of each channel over all other axes."""

    @abstractmethod
    def normalize(self, x: Array, mean: Any, var: Any, weight: Array | None, bias: Array | None, eps: float) -> Array:
        """Return ``(x - mean) / sqrt(var + eps) * weight + bias``, rounded once to x's dtype.

        ``mean`` and ``var`` are (C,) vectors, or ``Moments.mean`` and ``Moments.m2 / n``. Where ``var + eps`` is 0 the
        result is the bias. Memory order and device are those of ``x``.
        """

    @abstractmethod
    def lerp(self, start: Array, end: Any, weight: Any) -> Array:
        """Return ``(1 - weight) * start + weight * end`` for (C,) statistics, rounded once to the dtype of ``start``.

        ``end`` is a vector, ``Moments.mean`` or ``Moments.m2 / n``; ``weight`` is a float, or from ``reciprocal``.
        """

    @abstractmethod
    def reciprocal(self, count: Array) -> Array:
        """Return ``1 / count`` of an integer scalar on its device, without waiting for it, as a weight for ``lerp``."""

    def batch_norm(
        self,
        x: Array,
        params: Params,
        state: State,
        *,
        training: bool,
        momentum: float | None,
        eps: float,
        correction: int,
    ) -> tuple[Array, State]:
        """Normalise ``x`` by its own moments (``training``) or by the running ones; return the output and new state.

        This is the verbs composed. A backend whose framework runs the whole faster as one call overrides it, with the
        same numbers.
        """
        running_mean, running_var, num_batches_tracked = state
        weight, bias = params
        if not training:
            return self.normalize(x, running_mean, running_var, weight, bias, eps), state
        count, mean, m2 = self.moments(x)
        n = float(count)  # an int may be too large for a framework's integers
        y = self.normalize(x, mean, m2 / n, weight, bias, eps)
        if num_batches_tracked is not None:
            num_batches_tracked = num_batches_tracked + 1
        if running_mean is not None:
            # Without a momentum it is the cumulative average: each batch so far weighs the same.
            step = self.reciprocal(num_batches_tracked) if momentum is None else momentum
            running_mean = self.lerp(running_mean, mean, step)
            running_var = self.lerp(running_var, m2 / (n - correction), step)
        return y, State(running_mean, running_var, num_batches_tracked)
