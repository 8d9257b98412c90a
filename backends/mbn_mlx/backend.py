"""MLX's border, and what MLX needs of ``mbn.array_api``: in float64 on the CPU, in pairs of float32 on a GPU."""

import copyreg
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mbn import array_api
from mbn.array_api import ArrayAPIBackend, ArrayAPIKernels, Pair
from mbn.contract import Arrays, Capabilities, Moments, dtype_name, numpy_dtype
from mbn_mlx import integration


class MlxKernels(ArrayAPIKernels):
    """Kernels that MLX differentiates, vectorises and compiles."""

    def constant(self, x: mx.array) -> mx.array:
        return mx.stop_gradient(x)

    def from_vectors(self, count: Any, vectors: tuple[Any, ...]) -> Moments:
        if isinstance(vectors[0], np.ndarray):
            vectors, count = tuple(map(_in_float64, vectors)), count if isinstance(count, int) else float(count)
        return super().from_vectors(count, vectors)


class MlxBackend(integration.LazyEvaluation, ArrayAPIBackend):
    """The backend of MLX arrays, which lie on no device: the default device computes."""

    name: ClassVar[str] = "mlx"
    namespace = mx
    kernels = MlxKernels()

    @property
    def capabilities(self) -> Capabilities:
        return _capabilities(mx.default_device().type.name)

    def owns(self, x: object) -> bool:
        return isinstance(x, mx.array)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> mx.array:
        default = mx.default_device()
        if device is not None and device not in (default, default.type.name):
            raise ValueError(
                f"arrays of MLX are on no device, and the default one computes, which is {default.type.name}, not "
                f"{device!r}: mx.set_default_device chooses it."
            )
        x = x.hi if isinstance(x, Pair) else x
        if not isinstance(x, mx.array):
            x = np.array(x, order="C")  # MLX takes no negative strides
            return mx.array(x, _dtype(dtype or x.dtype))  # a copy: a shared one would be read after x has changed
        return x if dtype is None else self.evaluated(mx.astype(x, _dtype(dtype)))

    def to_numpy(self, x: mx.array) -> np.ndarray:
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16)).view(numpy_dtype("bfloat16"))
        return np.array(x)

    def device(self, x: mx.array) -> None:
        return None

    def copy(self, x: mx.array) -> mx.array:
        return self.evaluated(super().copy(x))

    def concatenated(self, parts: Sequence[Any]) -> Any:
        if not array_api.has_float64(mx, mx.default_device()):
            return super().concatenated(parts)
        return Arrays.concatenated(self, parts)  # on the host, since engines take no arrays of MLX

    def within(self, values: mx.array, low: float, high: float) -> bool | None:
        return None if integration.is_traced(values) else super().within(values, low, high)


@cache
def _capabilities(device: str) -> Capabilities:
    has_float64 = array_api.has_float64(mx, mx.default_device())
    return Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32"} | ({"float64"} if has_float64 else set())),
        devices=(device,),
        mutable=True,
        strided=False,
        masks=True,
        autograd=True,
        vmap=True,
        jit=True,
        replicas=has_float64,
    )


def _dtype(given: Any) -> mx.Dtype:
    name = dtype_name(given)
    dtype = getattr(mx, "bool_" if name == "bool" else name, None)
    device = mx.default_device()
    if not isinstance(dtype, mx.Dtype) or (dtype == mx.float64 and not array_api.has_float64(mx, device)):
        raise TypeError(f"MLX has no dtype {name} on its default device, {device.type.name}.")
    return dtype


def _reduced(x: mx.array) -> Any:
    return (_in_float64, (np.array(x),)) if x.dtype == mx.float64 else x.__reduce_ex__(2)


def _in_float64(values: np.ndarray) -> mx.array:
    return mx.array(values, mx.float64)


copyreg.pickle(mx.array, _reduced)  # MLX itself pickles numbers in float64, but returns them in float32
