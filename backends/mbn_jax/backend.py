"""The backend of JAX: the border, the kernels and the hooks. Every kernel can be traced."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, ClassVar

import jax
import jax.dlpack
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from mbn.contract import Backend, Batch, Capabilities, Kernels, Moments, Params, State, Stats, dtype_name
from mbn_jax import channel_stats, integration
from mbn_jax.group import AxisGroup
from mbn_jax.integration import argument, eps_argument, widened
from mbn_jax.kernels import own_statistics as own
from mbn_jax.kernels import passes
from mbn_jax.kernels.channel_sums import is_known
from mbn_jax.kernels.layouts import Order
from mbn_jax.kernels.pairs import Mean, Pair, Square, Variance, widest_dtype

_ALIGNMENT = 16
"""The alignment of arguments that compiled code needs on a GPU, in bytes. On the CPU, JAX copies unaligned arrays."""


class JaxBackend(Backend):
    """The backend of JAX arrays, traced ones included."""

    name: ClassVar[str] = "jax"
    version = jax.__version__

    @property
    def capabilities(self) -> Capabilities:
        return _capabilities(widest_dtype())

    def owns(self, x: object) -> bool:
        return isinstance(x, jax.Array)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> jax.Array:
        target = None if device is None else _device(device)
        if isinstance(x, jax.Array):
            array = x if dtype is None else x.astype(_dtype(dtype))
            return array if target is None else jax.device_put(array, target)
        with jax.ensure_compile_time_eval():  # the arrays of a layer made under a trace must not be tracers
            # Copy, since JAX on the CPU may share host memory, and read it after the caller has changed it.
            array = jnp.asarray(np.array(x, _host_dtype(x) if dtype is None else _dtype(dtype)))
            return array if target is None else jax.device_put(array, target)

    def to_numpy(self, x: jax.Array) -> np.ndarray:
        return np.asarray(x)

    def from_dlpack(self, x: Any) -> jax.Array:
        _dtype(dtype_name(x.dtype))  # without 64-bit numbers JAX would silently convert float64 to float32
        with jax.ensure_compile_time_eval():  # as in asarray
            array = jax.dlpack.from_dlpack(x)
        if array.unsafe_buffer_pointer() % _ALIGNMENT:
            raise BufferError(f"JAX computes on memory that begins at a multiple of {_ALIGNMENT} bytes.")
        return array

    def device(self, x: jax.Array) -> str | None:
        if isinstance(x, jax.core.Tracer) or not x.committed or len(x.devices()) > 1:
            return None
        return _name(*x.devices())

    def devices(self, x: jax.Array) -> tuple[str, ...]:
        return () if isinstance(x, jax.core.Tracer) else tuple(sorted(map(str, x.devices())))

    def copy(self, x: jax.Array) -> jax.Array:
        # A tracer stays a tracer: JAX has no tape to detach it from, and a pullback may be differentiated again.
        return jnp.array(x, copy=True)

    def within(self, values: jax.Array, low: float, high: float) -> bool | None:
        if isinstance(values, jax.core.Tracer):
            return None
        host = np.asarray(values)
        return bool(np.all((low <= host) & (host < high)))

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return partial(integration.step, forward), partial(integration.differentiate, pullback)

    def register(self, layer_type: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:
        def flatten_here(layer: Any) -> tuple[Any, Any]:
            # A layer whose backend the first input would choose would have another tree structure after that input.
            is_open = layer.backend is None and layer.num_features is not None
            return flatten(copy.copy(layer).to(backend=self.name) if is_open else layer)

        def flatten_with_keys(layer: Any) -> tuple[Any, Any]:
            (params, state), rest = flatten_here(layer)
            return ((GetAttrKey("params"), params), (GetAttrKey("state"), state)), rest

        jax.tree_util.register_pytree_with_keys(layer_type, flatten_with_keys, unflatten, flatten_here)

    def group(self, given: Any) -> AxisGroup:
        names = given if isinstance(given, tuple) else (given,)
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(
                "the group of a layer on JAX is the name of an axis of shard_map, pmap or vmap, or a tuple of names, "
                f"not {given!r}. Under jit over a sharded batch statistics are global without a group."
            )
        return AxisGroup(given)

    def finish(self, *values: Any) -> None:
        jax.block_until_ready(values)  # returns at once for tracers

    def stores(self, before: State, after: State) -> bool:
        traced = [leaf for leaf in after if isinstance(leaf, jax.core.Tracer)]
        if traced:
            lasting = {trace for leaf in before for trace in _traces(leaf)}
            if not all(lasting.issuperset(_traces(leaf)[:1]) for leaf in traced):
                raise RuntimeError(_WOULD_LEAK)
        return True

    def module(self, layer: Any, adopt: Callable[[Params, State], None]) -> Any:
        try:
            from mbn_jax.module import BatchNorm1d
        except ModuleNotFoundError as error:
            if error.name != "flax":
                raise
            raise ImportError("JAX's modules are those of flax, which is not installed: pip install flax.") from error
        return BatchNorm1d(layer, adopt)


class JaxKernels(Kernels):
    """Kernels that can be traced, each of them one compiled call."""

    def __init__(self, group: AxisGroup | None = None, order: Order | None = None) -> None:
        """Make kernels of a group of replicas, over which derivatives are summed, or of one replica if it is None.

        ``order`` is that of x in memory, if it is known.
        """
        self.group, self.order = group, order

    @classmethod
    @cache
    def of(cls, group: AxisGroup | None, order: Order | None = None) -> "JaxKernels":
        """Return the kernels of a group and order, always the same instance, since JAX compiles anew for each."""
        return cls(group, order)

    def moments(self, batch: Batch) -> Moments:
        # No derivative here: ``own_statistics.py`` differentiates the statistics together with the normalisation.
        x = jax.lax.stop_gradient(widened(batch.x, batch.dtype))
        moments = Moments(*passes.moments(x, passes.against(batch.sample_weight, x), self.order))
        n = x.size // x.shape[1]
        return moments._replace(count=n) if batch.sample_weight is None and is_known(n) else moments

    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float | Square, out: None = None) -> jax.Array:
        x, (mean, var, count), (weight, bias) = batch.x, stats, params
        weights = passes.against(batch.sample_weight, x)
        if count is None:
            return passes.normalize(x, mean, var, weight, bias, eps_argument(eps), weights, self.order)
        given = own.batch(x, mean, var, argument(count), eps_argument(eps), weights, self.group, self.order)
        return own.normalize(given, weight, bias)

    def grad_sums(self, dy: jax.Array, batch: Batch, stats: Stats, eps: float | Square) -> tuple[jax.Array, jax.Array]:
        x, (mean, var, _) = batch.x, stats
        weights = passes.against(batch.sample_weight, x)
        return own.grad_sums(dy, x, mean, var, eps_argument(eps), weights, self.order)

    def grad_input(
        self,
        dy: jax.Array,
        batch: Batch,
        stats: Stats,
        weight: jax.Array | None,
        eps: float | Square,
        sums: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        x, (mean, var, count) = batch.x, stats
        weights = passes.against(batch.sample_weight, x)
        return passes.grad_input(dy, x, mean, var, weight, eps_argument(eps), sums, argument(count), weights)

    def pullback(
        self, dy: jax.Array, batch: Batch, weight: jax.Array | None, stats: Stats, eps: Square
    ) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """Return the gradients of x, weight and bias if the statistics are those of x; None if they are constants."""
        x, (mean, var, count) = batch.x, stats
        if count is None:
            return None
        weights = passes.against(batch.sample_weight, x)
        given = own.batch(x, mean, var, argument(count), eps, weights, self.group, self.order)
        return own.pullback(dy, given, weight)

    def sample_weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: jax.Array | None,
        lengths: jax.Array | None,
        sample_weight: jax.Array | None,
    ) -> jax.Array:
        axis = None if self.group is None else self.group.name
        return channel_stats.combine_weights(shape, dtype, mask, lengths, sample_weight, axis)

    def merge(self, first: Moments, second: Moments) -> Moments:
        merged = Moments(*channel_stats.merge(*map(argument, first), *map(argument, second)))
        if isinstance(first.count, int) and isinstance(second.count, int):
            return merged._replace(count=first.count + second.count)
        return merged

    def variance(self, moments: Moments, correction: int) -> Square:
        return channel_stats.variance(moments.m2, argument(moments.count), correction)

    def step(
        self, momentum: float | Pair | None, num_batches_tracked: jax.Array | None, count: int | Pair, correction: int
    ) -> float | Pair | jax.Array:
        step = channel_stats.reciprocal(num_batches_tracked) if momentum is None else momentum
        return step if isinstance(count, int) else channel_stats.step(argument(step), count, correction)

    def lerp(self, start: jax.Array, end: Mean | Variance, step: float | Pair | jax.Array) -> jax.Array:
        return channel_stats.lerp(start, end, argument(step))


JaxBackend.kernels = JaxKernels()


_WOULD_LEAK = """\
a training layer that is closed over by a JAX transformation cannot keep its new statistics: they end with the trace. \
The layer is unchanged. Either pass parameters and state through a pure function:

    y, state = bn.apply(bn.params, bn.state, x, training=True)

or pass the layer itself, a pytree, through the function:

    @jax.jit
    def step(bn, x):
        y = bn(x)
        return bn, y

    bn, y = step(bn, x)

A layer that is made without num_features or without a backend has no arrays of JAX before its first call: \
give it both, BatchNorm1d(C, backend="jax"), or call it once outside of the transformation."""


def _traces(leaf: Any) -> list[Any]:
    """Return the traces that an array is part of, the innermost first; an empty list for a concrete array."""
    traces, trace = [], getattr(leaf, "_trace", None)
    while trace is not None:
        traces.append(trace)
        trace = getattr(trace, "parent_trace", None)
    return traces


@cache
def _capabilities(widest: np.dtype) -> Capabilities:
    """Return JAX's capabilities, given its widest dtype; cached, since every call of a layer reads them."""
    return Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", widest.name}),
        devices=_device_names(),
        mutable=False,
        strided=False,
        masks=True,
        any_size=True,
        autograd=True,
        vmap=True,
        jit=True,
        modules=find_spec("flax") is not None,
        replicas=True,
    )


def _device_names() -> tuple[str, ...]:
    """Return the names of the local devices, the default platform first: "cpu", or "gpu:0" if it has several."""
    names = []
    for platform in dict.fromkeys((jax.default_backend(), "cpu")):
        with suppress(RuntimeError):  # JAX_PLATFORMS may exclude the CPU
            devices = jax.local_devices(backend=platform)
            names += [platform] if len(devices) == 1 else [f"{platform}:{index}" for index in range(len(devices))]
    return tuple(names)


@cache
def _name(device: jax.Device) -> str:
    """Return the name of a device, which a layer can pickle, unlike the device."""
    return f"{device.platform}:{jax.local_devices(backend=device.platform).index(device)}"


def _device(given: jax.Device | str) -> jax.Device:
    """Return the device that is given: a device, a platform ("gpu", "cuda": its first device) or "platform:index"."""
    if isinstance(given, jax.Device):
        return given
    platform, _, index = str(given).partition(":")
    with suppress(RuntimeError, KeyError):  # an unknown platform, or an unknown index
        devices = jax.local_devices(backend=platform)
        return {str(number): device for number, device in enumerate(devices)}[index or "0"]
    raise ValueError(f"JAX has no device {given!r} here; it has {', '.join(_device_names())}.")


def _dtype(name: str) -> np.dtype:
    """Return the dtype of a name, for integers 32 bits wide if JAX has no 64-bit numbers.

    Raises:
        TypeError: JAX has no such floating dtype, for lack of 64-bit numbers.
    """
    dtype = np.dtype(name)
    usable = jax.dtypes.canonicalize_dtype(dtype)
    if usable != dtype and dtype.kind not in "iu":
        raise TypeError(
            f"JAX has no {dtype} while 64-bit numbers are off. Turn them on, by JAX_ENABLE_X64=1 in the environment or "
            f"jax.config.update('jax_enable_x64', True) before anything is computed; or convert to {usable}."
        )
    return usable


def _host_dtype(x: Any) -> np.dtype:
    """Return the dtype for host data: its own, or JAX's default for Python's lists and scalars, which have none."""
    if hasattr(x, "dtype"):
        return _dtype(x.dtype.newbyteorder("="))
    return jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
