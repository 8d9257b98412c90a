"""What a backend is.

A backend does the arithmetic of batch normalisation on one framework's arrays and nothing else: it never sees a mode,
a message or a layer. This module has to stay free of frameworks, and is all of mbn that a backend may import, with
the values of mbn.state and the number of mbn.threads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np

from mbn.state import Params, State
from mbn.threads import Exclusive

Array: TypeAlias = Any
"""An array of some framework; only the backend that owns it knows more."""

Arrays = TypeVar("Arrays", bound=tuple[Array | None, ...])

_LIMITS = {f"int{bits}": (2 ** (bits - 1) - 1, bits - 1) for bits in (8, 16, 32, 64)}
"""The largest number of a dtype, and how far its sign is from its last bit."""
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


def layer_dtype(dtype: str) -> str:
    """Return the dtype of the parameters and statistics that an input of ``dtype`` needs."""
    return "float64" if dtype == "float64" else "float32"


def widened(x: Array, params: Params, state: State) -> bool:
    """Tell whether a layer is float64 and x is not: its statistics are to be as exact as those of float64 are."""
    vector = state.running_mean
    if vector is None:
        vector = params.bias if params.weight is None else params.weight
    return vector is not None and dtype_name(vector.dtype) == "float64" != dtype_name(x.dtype)


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
    """Batches can have weights: the verbs take them."""
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
    """Outputs can be written to an array of the caller's: the verbs take it."""


class Moments(NamedTuple):
    """Per-channel statistics of one batch."""

    count: Any  # the field's name; tuple.count is of no use here
    """Values per channel, an int; of a weighted batch the sum of its weights, in a form of the backend's own."""
    mean: Any
    """The mean, in whatever form the backend's other verbs read: it may carry more precision than x."""
    m2: Any
    """Sum of squared deviations from the mean, in the backend's own form too: ``variance`` reads it."""


class Residuals(NamedTuple):
    """What a forward pass leaves behind for ``pullback``."""

    mean: Any
    """What was normalised by: ``Moments.mean``, or the running mean."""
    var: Any
    """The same of the variance: from ``variance``, or the running one."""
    count: Any
    """``Moments.count`` where both depend on x; None where they are constants: in evaluation."""


class Backend(ABC):
    """The verbs of one framework.

    Every verb takes and returns the framework's own arrays, except at the border (``asarray``, ``to_numpy``). ``x`` has
    shape (N, C) or (N, C, L), holds at least one value, and has been checked: a backend validates nothing. Vectors are
    (C,) in the layer's dtype, float32 or float64. No verb writes to its arguments, with one exception, ``write``.

    ``weights`` say how often each value counts, in every channel alike: (N,) for an x of (N, C) and (N, L) for one of
    (N, C, L), in the layer's dtype, at least 0; or None, where each counts once. A value of weight 0 is no value: it
    may be NaN or infinite, and no statistic, output or gradient may depend on it. They come from ``weights``, and are
    constants to differentiation.

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
        """Bring an own array or host data (a NumPy array, nested lists, a number) to this framework.

        It may share memory with ``x``. ``"int64"`` may become int32 where the framework has no 64-bit integers.

        Raises:
            TypeError: the framework has no such dtype.
            ValueError: it has no such device.
        """

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Bring an own array to the host. It may share memory with ``x``."""

    def from_dlpack(self, x: Any) -> Array:  # noqa: ARG002 - the signature for whoever can
        """Return another framework's array, as its backend has ``exported`` it, as an own array in the same memory.

        Asked where that memory is on a device. Whatever is raised says that it cannot be: x then comes as a copy, which
        lies in order, and if that is refused too by way of the host.

        Source: the Python specification of DLPack, https://dmlc.github.io/dlpack/latest/python_spec.html.
        """
        message = f"{self.name} takes no arrays by DLPack."
        raise BufferError(message)

    def exported(self, x: Array) -> AbstractContextManager[Any]:
        """Return a context in which ``x``, as what it gives, can be taken by ``from_dlpack`` of another backend."""
        return nullcontext(x)

    @abstractmethod
    def device(self, x: Array) -> Any:
        """Return where ``x`` lies, comparable with ``==``; None where that binds nobody: traced, or free to move."""

    def devices(self, x: Array) -> tuple[str, ...]:  # noqa: ARG002 - the signature for whoever can tell
        """Return the names of the devices that ``x`` is spread over, for messages; asked where ``device`` is None."""
        return ()

    @abstractmethod
    def copy(self, x: Array) -> Array:
        """Return a copy that changes with nothing else; of a parameter, one that nobody trains."""

    def flaw(self, name: str, x: Array) -> str | None:  # noqa: ARG002 - the signature for whoever has such arrays
        """Say why the verbs cannot read ``x``, an own array that is called ``name``; None if they can.

        This is not asked of the x that is normalised, nor of parameters and statistics in a call, where it would cost
        too much: there the verbs themselves raise a TypeError.
        """
        return None

    def conflict(self, out: Array, x: Array) -> str | None:  # noqa: ARG002 - the signature for whoever declares it
        """Say why the output of ``x`` cannot be written to ``out``, in the words that follow its name; None if it can.

        Asked where ``out`` is declared. An array in the shape, dtype and place of x can be written to if it is x itself
        or shares no memory with it, no two of its values share memory (``overlaps_itself``), and nobody forbids it: a
        read-only array, or one whose history is recorded.
        """
        return None

    # Arithmetic.

    @abstractmethod
    def weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: Array | None,
        lengths: Array | None,
        sample_weight: Array | None,
    ) -> Array:
        """Return the weights, of ``shape`` and ``dtype``: the sample weight where mask and lengths allow, else 0.

        Args:
            shape: (N,) or (N, L).
            dtype: the layer's, float32 or float64.
            mask: True for a value: bool, (N,) or (N, L).
            lengths: how many values each sequence has, from its start: integers, (N,), for a shape (N, L) alone.
            sample_weight: real numbers, (N,) or (N, L); 1 if None.

        Where ``within`` could not tell, under a trace, a negative weight or a length outside of 0 to L gives NaN, which
        nobody can take for a result.
        """

    @abstractmethod
    def within(self, values: Array, low: float, high: float) -> bool | None:
        """Tell whether ``low <= value < high`` holds for all values; None while they are being traced."""

    def constant(self, x: Array) -> Array:
        """Return ``x`` itself, or what shares its memory, as a constant to differentiation.

        Its statistics hold on to nothing that ``x`` was computed from.
        """
        return x

    @abstractmethod
    def moments(self, x: Array, weights: Array | None = None) -> Moments:
        """Return the statistics of each channel over all other axes; finite ones where all weights are 0.

        Where the layer is float64 and its input is not, ``x`` comes in float64. Statistics that leave the range of
        float64 may have a form of their own, for ``normalize`` to be right all the same.
        """

    @abstractmethod
    def merge(self, first: Moments, second: Moments) -> Moments:
        """Return the statistics of two batches taken together.

        With n the counts, and d the difference of the means, the second less the first::

            count = n1 + n2    mean = mean1 + d * n2 / count    m2 = m2_1 + m2_2 + d**2 * n1 * n2 / count

        The second changes the first least where n2 <= n1, which is how it is called. Where neither has a value, the
        result is that of no values too.

        Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
        1979, equations 2.1.
        """

    @abstractmethod
    def variance(self, moments: Moments, correction: int) -> Any:
        """Return ``m2 / (count - correction)``, in a form that ``normalize`` and ``lerp`` read.

        It is 0 where the weights add up to ``correction`` or less. Without weights the count is greater, as checked.
        """

    @abstractmethod
    def normalize(
        self,
        x: Array,
        mean: Any,
        var: Any,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        weights: Array | None = None,
    ) -> Array:
        """Return ``(x - mean) / sqrt(var + eps) * weight + bias``, rounded once to x's dtype.

        ``mean`` and ``var`` are (C,) vectors, or ``Moments.mean`` and from ``variance``. Where ``var + eps`` is 0 the
        result is the bias; where the weight of a value is 0 it is 0. Memory order and device are those of ``x``.

        A backend that declares ``out`` takes one more argument, ``out=None``, and where that is an array it writes the
        result there and returns it. It has been checked: ``conflict``.
        """

    @abstractmethod
    def lerp(self, start: Array, end: Any, weight: Any) -> Array:
        """Return ``(1 - weight) * start + weight * end`` for (C,) statistics, rounded once to the dtype of ``start``.

        ``end`` is a vector, ``Moments.mean`` or from ``variance``; ``weight`` is a float, or from ``step``. With a
        weight of 0 the result is ``start``, whatever ``end`` is. To differentiation it is a constant.
        """

    @abstractmethod
    def step(self, momentum: float | None, num_batches_tracked: Array | None, count: Any, correction: int) -> Any:
        """Return the weight of a batch in the running statistics, for ``lerp``, without waiting for any device.

        It is ``momentum``, or ``1 / num_batches_tracked`` where that is None; and 0 for a batch without a variance,
        whose ``count``, a sum of weights, is ``correction`` or less.
        """

    @abstractmethod
    def grad_sums(
        self, dy: Array, x: Array, mean: Any, var: Any, eps: float, weights: Array | None = None
    ) -> tuple[Array, Array]:
        """Return the sums of ``dy`` and of ``dy * xhat`` for each channel; ``xhat = (x - mean) / sqrt(var + eps)``.

        They are the gradients of bias and weight: (C,), in the dtype of the statistics or a wider one. Values of weight
        0 are left out; no other weight matters, since ``dy`` says how much each output counts. Where ``var + eps`` is 0
        so is ``xhat``.
        """

    @abstractmethod
    def grad_input(
        self,
        dy: Array,
        x: Array,
        mean: Any,
        var: Any,
        weight: Array | None,
        eps: float,
        sums: tuple[Array, Array] | None,
        count: Any,
        weights: Array | None = None,
    ) -> Array:
        """Return the gradient of x, in its dtype, memory order and device.

        With ``w`` the weight of a value (1 without weights) and ``(sum_dy, sum_dy_xhat) = sums``, from ``grad_sums``::

            weight / sqrt(var + eps) * (dy - w * sum_dy / count - w * xhat * sum_dy_xhat / count)

        or, where ``sums`` is None because mean and variance are constants, ``weight / sqrt(var + eps) * dy``. It is 0
        where the weight of a value is 0.
        """

    # The whole, composed of the verbs. A backend whose framework runs it faster as one call overrides it, with the same
    # numbers.

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
        weights: Array | None = None,
        **out: Array,
    ) -> tuple[Array, State]:
        """Normalise ``x`` by its own moments (``training``) or by the running ones; return the output and new state.

        ``out`` is only ever passed to a backend that declares it.
        """
        y, state, _ = self.batch_norm_residuals(
            x,
            params,
            state,
            training=training,
            momentum=momentum,
            eps=eps,
            correction=correction,
            weights=weights,
            **out,
        )
        return y, state

    def batch_norm_residuals(
        self,
        x: Array,
        params: Params,
        state: State,
        *,
        training: bool,
        momentum: float | None,
        eps: float,
        correction: int,
        weights: Array | None = None,
        **out: Array,
    ) -> tuple[Array, State, Residuals]:
        """Do what ``batch_norm`` does, and return what ``pullback`` needs as well."""
        running_mean, running_var, num_batches_tracked = state
        weight, bias = params
        if not training:
            y = self.normalize(x, running_mean, running_var, weight, bias, eps, weights, **out)
            return y, state, Residuals(running_mean, running_var, None)
        moments = self.moments(self.asarray(x, "float64") if widened(x, params, state) else x, weights)
        mean, var = moments.mean, self.variance(moments, 0)
        y = self.normalize(x, mean, var, weight, bias, eps, weights, **out)
        if num_batches_tracked is not None:
            num_batches_tracked = counted(num_batches_tracked)
        if running_mean is not None:
            # Without a momentum it is the cumulative average: each batch so far weighs the same.
            step = self.step(momentum, num_batches_tracked, moments.count, correction)
            running_mean = self.lerp(running_mean, mean, step)
            running_var = self.lerp(running_var, self.variance(moments, correction), step)
        state = State(running_mean, running_var, num_batches_tracked)
        return y, state, Residuals(mean, var, moments.count)

    def pullback(
        self,
        dy: Array,
        x: Array,
        weight: Array | None,
        residuals: Residuals,
        eps: float,
        weights: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of x, weight and bias, given that of y; the last two are ``grad_sums``."""
        mean, var, count = residuals
        if widened(x, Params(weight, None), State(mean if count is None else None, None, None)):
            sums = self.grad_sums(self.asarray(dy, "float64"), self.asarray(x, "float64"), mean, var, eps, weights)
        else:
            sums = self.grad_sums(dy, x, mean, var, eps, weights)
        dx = self.grad_input(dy, x, mean, var, weight, eps, None if count is None else sums, count, weights)
        sum_dy, sum_dy_xhat = sums
        return dx, sum_dy_xhat, sum_dy

    # What a framework wants of a layer. These do nothing unless a backend says otherwise.

    def register(self, layer_type: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:  # noqa: B027
        """Learn of a class of layers, once, when the first of them binds to this backend.

        ``flatten(layer)`` gives ``((params, state), rest)``, where the rest is hashable and comparable;
        ``unflatten(rest, (params, state))`` gives a layer again, whatever stands for the arrays.
        """

    def parameter(self, value: Array, current: Array | None) -> Array:  # noqa: ARG002 - for those who need it
        """Return an array that the framework's optimizers can train, with the values of ``value``, a layer's own.

        ``current`` is the parameter that it takes the place of; ``write`` decides whether that stays.
        """
        return value

    def stores(self, before: State, after: State) -> bool:  # noqa: ARG002
        """Tell whether a layer that held ``before`` is to hold ``after`` from this training step on.

        It is not where the step repeats an earlier one, whose activations were not kept.

        Raises:
            RuntimeError: ``after`` is part of a trace that ends before the layer does.
        """
        return True

    def write(self, before: Arrays, after: Arrays) -> Arrays:  # noqa: ARG002 - for those who need it
        """Return what a layer is to hold in the place of ``before``, where somebody else holds that too: ``after``.

        ``before`` are parameters, which optimizers may train, or statistics that are shared with a module that
        ``module`` made, or both. Where arrays can be written to, and those that differ have the same shapes, dtypes and
        device, they are written to, all or none of them even if interrupted, and ``before`` is returned.
        """
        return after

    def writing(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread is in one: what ``write`` writes to is seen before or after."""
        return Exclusive()

    def module(self, layer: Any, adopt: Callable[[Params, State], None]) -> Any:  # noqa: ARG002
        """Return a module of the framework's own kind that does what the layer does (``modules``).

        It begins in the layer's mode and has ``train()`` and ``eval()``. Its parameters and statistics are attributes
        named as those of the layer, and the same arrays where arrays can be written to.

        Args:
            layer: the :class:`mbn.BatchNorm1d`.
            adopt: makes the layer hold other arrays, of another device or dtype maybe, as they are.

        Raises:
            TypeError: the framework has no modules.
        """
        message = f"{self.name} has no modules. Move the layer to a framework that has them: bn.to(backend=...)."
        raise TypeError(message)

    # The framework's own transformations, through which the suite sees whether the capabilities of the same names are
    # what they are said to be.

    def grad(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """Return the gradient, by its first argument, of a function whose result is a scalar (``autograd``)."""
        raise NotImplementedError

    def jvp(self, function: Callable[[Array], Array], x: Array, tangent: Array) -> Array:
        """Return the derivative of ``function`` at ``x`` in a direction, in forward mode (``autograd``)."""
        raise NotImplementedError

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` over the first axes of all its arguments and results (``vmap``)."""
        raise NotImplementedError

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, a pure one of arrays, compiled (``jit``)."""
        raise NotImplementedError

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` compiled without a break (``compile``)."""
        raise NotImplementedError
