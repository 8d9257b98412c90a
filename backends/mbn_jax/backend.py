"""JAX's verbs. Every verb is one compiled call and can be traced; so is the whole, which a training step calls."""

from contextlib import suppress
from functools import cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mbn.contract import Backend, Capabilities, Moments
from mbn.state import Params, State
from mbn_jax import kernels


class JaxBackend(Backend):
    """The backend of JAX arrays, traced ones included."""

    name: ClassVar[str] = "jax"
    version = jax.__version__

    @property
    def capabilities(self) -> Capabilities:
        return _capabilities(kernels.widest_dtype())

    def owns(self, x: object) -> bool:
        return isinstance(x, jax.Array)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> jax.Array:
        target = None if device is None else _device(device)
        if isinstance(x, jax.Array):
            array = x if dtype is None else x.astype(_dtype(dtype))
        else:
            # A copy of our own: on the CPU JAX takes host memory for its own and may read it later.
            array = jnp.asarray(np.array(x, _host_dtype(x) if dtype is None else _dtype(dtype)))
        return array if target is None else jax.device_put(array, target)

    def to_numpy(self, x: jax.Array) -> np.ndarray:
        return np.asarray(x)

    def device(self, x: jax.Array) -> str | None:
        if isinstance(x, jax.core.Tracer) or not x.committed or len(x.devices()) > 1:
            return None
        return _name(*x.devices())

    def moments(self, x: jax.Array) -> Moments:
        return Moments(x.size // x.shape[1], *kernels.moments(x))

    def normalize(
        self,
        x: jax.Array,
        mean: kernels.Statistic,
        var: kernels.Statistic,
        weight: jax.Array | None,
        bias: jax.Array | None,
        eps: float | kernels.Pair,
    ) -> jax.Array:
        return kernels.normalize(x, mean, var, weight, bias, _argument(eps))

    def lerp(self, start: jax.Array, end: kernels.Statistic, weight: float | kernels.Pair | jax.Array) -> jax.Array:
        return kernels.lerp(start, end, _argument(weight))

    def reciprocal(self, count: jax.Array) -> jax.Array:
        return kernels.reciprocal(count)

    def batch_norm(
        self,
        x: jax.Array,
        params: Params,
        state: State,
        *,
        training: bool,
        momentum: float | None,
        eps: float,
        correction: int,
    ) -> tuple[jax.Array, State]:
        return _batch_norm(
            self,
            x,
            params,
            state,
            training=training,
            momentum=_argument(momentum),
            eps=_argument(eps),
            correction=correction,
        )


_batch_norm = jax.jit(Backend.batch_norm, static_argnames=("self", "training", "correction"))


def _argument(value: Any) -> Any:
    """Return what stands for a Python number among the arguments of compiled code; anything else as it is."""
    return kernels.number(value) if isinstance(value, float) else value


@cache
def _capabilities(widest: np.dtype) -> Capabilities:
    """Return what JAX can do with ``widest`` for its widest dtype; asked for at every call of a layer."""
    return Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", widest.name}),
        devices=_device_names(),
        mutable=False,
        strided=False,
    )


def _device_names() -> tuple[str, ...]:
    """Return the names of the devices here, the default platform first: "cpu", or "gpu:0" where there are more."""
    names = []
    for platform in dict.fromkeys((jax.default_backend(), "cpu")):
        with suppress(RuntimeError):  # JAX_PLATFORMS can leave the CPU out
            devices = jax.local_devices(backend=platform)
            names += [platform] if len(devices) == 1 else [f"{platform}:{index}" for index in range(len(devices))]
    return tuple(names)


@cache
def _name(device: jax.Device) -> str:
    """Return the name of a device, which unlike the device can be pickled with a layer."""
    return f"{device.platform}:{jax.local_devices(backend=device.platform).index(device)}"


def _device(given: jax.Device | str) -> jax.Device:
    """Return a device from itself, from a platform ("gpu", "cuda": its first device) or from "platform:index"."""
    if isinstance(given, jax.Device):
        return given
    platform, _, index = str(given).partition(":")
    with suppress(RuntimeError, KeyError):  # no such platform, no such index
        devices = jax.local_devices(backend=platform)
        return {str(number): device for number, device in enumerate(devices)}[index or "0"]
    message = f"JAX has no device {given!r} here; it has {', '.join(_device_names())}."
    raise ValueError(message)


def _dtype(name: str) -> np.dtype:
    """Return the dtype of a name; integers may lose their upper half, floating dtypes must be what was asked for."""
    dtype = np.dtype(name)
    usable = jax.dtypes.canonicalize_dtype(dtype)
    if usable != dtype and dtype.kind not in "iu":
        message = (
            f"JAX has no {dtype} while 64-bit numbers are off. Turn them on, by JAX_ENABLE_X64=1 in the environment or "
            f"jax.config.update('jax_enable_x64', True) before anything is computed; or convert to {usable}."
        )
        raise TypeError(message)
    return usable


def _host_dtype(x: Any) -> np.dtype:
    """Return the dtype for host data as it is: lists and scalars of Python have none, and take JAX's."""
    if hasattr(x, "dtype"):
        return _dtype(x.dtype)
    return jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
