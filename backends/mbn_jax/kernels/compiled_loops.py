"""The passes over x by the loops of ``mbn_cpu``, which XLA's programs for the CPU call where Numba is installed.

XLA's own form of a large pass takes longer: the pages of a new output are cleared one by one, and sums in float64 are
written to memory level by level of their tree. A pass decides when it is lowered, since the platform and the shape are
known then. It calls the loops if all of this holds, and else computes XLA's form, by the same formulas:

- x is in float32, and has at least ``LEAST`` values; a sample has at most ``LARGEST``; a sample weight is in float32;
- the order of x in memory is known (:class:`Order`);
- the program is for the CPU of this process: it is not exported;
- XLA does not distribute it over devices (in a shard_map, each device has its own), and there is no vmap;
- Numba works, and XLA accepts the handlers.

A compiled program that is pickled (``jax.experimental.serialize_executable``) needs these handlers where it is loaded;
JAX's cache of compiled programs does not, since a program is lowered before the cache is asked.
"""

import ctypes
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbn_cpu.thread_pool import CHUNK
from mbn_jax.kernels.layouts import Order

MOMENTS, GRAD_SUMS, NORMALIZE, GRAD_INPUT = range(4)
"""The passes, as in ``xla_handlers.PASSES``."""
TARGETS = "mbn_moments", "mbn_grad_sums", "mbn_normalize", "mbn_grad_input"
"""The names of the passes in XLA's programs."""
LEAST = [1 << 18, 1 << 23]
"""The least numbers of values of x for the loops: for sums and gradients without sample weights, and for other passes.

Below, the loops are not faster, and Numba need not be imported. XLA fuses its own form of an output with the operations
around it, and not a loop; but from 32 MiB on an output has new pages each time, for which the loops request huge pages.
Sample weights are first converted to float64, which takes the loops too long for smaller arrays.
"""
LARGEST = 1 << 22
"""The most values of a sample: chunks are whole samples."""
_WIDE, _NARROW = np.dtype(np.float64), np.dtype(np.float32)
_ALLOWED = ContextVar("allowed", default=False)
_LOCK = threading.Lock()
_errors: list[Exception] = []
"""The error for which there are no loops in this process."""


@contextmanager
def allowed(context: Any, levels: tuple[Any, ...], devices: int) -> Iterator[None]:
    """Lower the body with loops, if the context of its lowering has a program for this process."""
    module = context.module_context
    is_here = tuple(module.platforms) == ("cpu",) and not getattr(module.lowering_parameters, "for_export", True)
    token = _ALLOWED.set(is_here and not levels and devices == 1)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


class Loops(NamedTuple):
    """The passes over an x of one shape. They take and return arrays in its shape ``in_order``."""

    shape: tuple[int, int, int]
    """N, C and L."""
    has_channels_last: bool
    partials: int
    """Partial sums of each channel and chunk."""
    samples: int
    """The samples of a chunk."""

    def in_order(self, x: jax.Array) -> jax.Array:
        """Return an (N, C, L) with its axes in the order of memory, (N, L, C) with channels last, or the reverse."""
        return x.swapaxes(1, 2) if self.has_channels_last and x.ndim == 3 else x

    def moments(self, x: jax.Array, center: jax.Array, weights: jax.Array | None) -> list[jax.Array]:
        """Return the weighted sums of x - center and of its square, in float64."""
        return list(self._sums(MOMENTS, (x, center), weights)[:2])

    def grad_sums(self, dy: jax.Array, x: jax.Array, center: jax.Array, weights: jax.Array | None) -> list[jax.Array]:
        """Return the weighted sum of x - center, and the sums of dy and dy * (x - center), in float64."""
        total, products, drift = self._sums(GRAD_SUMS, (dy, x, center), weights)
        # The loop leaves out the values of dy of weight 0, and does not see weights of NaN.
        invalid = 0.0 if weights is None else jnp.where(jnp.any(jnp.isnan(weights)), jnp.nan, 0)
        return [drift, total + invalid, products + invalid]

    def normalize(
        self, x: jax.Array, center: jax.Array, scale: jax.Array, shift: jax.Array, weights: jax.Array | None
    ) -> jax.Array:
        """Return (x - center) * scale + shift, with 0 where the weight is 0; no weight is NaN."""
        return self._call(NORMALIZE, jax.ShapeDtypeStruct(x.shape, _NARROW), (x, center, scale, shift), weights)

    def grad_input(self, dy: jax.Array, x: jax.Array, *vectors: Any) -> jax.Array:
        """Return the gradient of x, given center, slope, average, scale and weights.

        It is scale * (dy - w * ((x - center) * slope + average)), rounded once, with 0 where the weight is 0.
        """
        *vectors, weights = vectors  # type: ignore[assignment]  # a list
        return self._call(GRAD_INPUT, jax.ShapeDtypeStruct(x.shape, _NARROW), (dy, x, *vectors), weights)

    def _sums(self, number: int, operands: tuple[jax.Array, ...], weights: jax.Array | None) -> jax.Array:
        return self._call(number, jax.ShapeDtypeStruct((3, self.shape[1]), _WIDE), operands, weights)

    def _call(
        self, number: int, result: jax.ShapeDtypeStruct, operands: tuple[jax.Array, ...], weights: jax.Array | None
    ) -> Any:
        plan = [number, self.has_channels_last, *self.shape, self.partials, self.samples, len(operands)]
        given = operands if weights is None else (*operands, weights)
        return jax.ffi.ffi_call(TARGETS[number], result)(*given, plan=np.array(plan, np.int64))


def of(number: int, x: jax.Array, weights: jax.Array | None, order: Order | None) -> Loops | None:
    """Return the loops for a pass over x, (N, C) or (N, C, L), that is being lowered; None for XLA's form."""
    if not _ALLOWED.get() or x.dtype != _NARROW or (weights is not None and weights.dtype != _NARROW):
        return None
    if (
        x.size < LEAST[number == NORMALIZE or weights is not None]
        or x.size > LARGEST * x.shape[0]
        or (order is None and x.ndim == 3)
    ):
        return None
    return _planned(x.shape, order) if is_registered(number) else None


@cache
def _planned(shape: tuple[int, ...], order: Order | None) -> Loops:
    from mbn_cpu.kernels.numba_passes import Layout, partials_of

    n, c, length = (*shape, 1)[:3]
    is_last = length == 1 or (order is not None and order.has_channels_last)
    layout = Layout(is_last, (n, c, length), partials_of(shape))
    return Loops(layout.shape, is_last, layout.partials, layout.chunks(CHUNK)[0].samples.stop)


def is_registered(number: int) -> bool:
    """Register the handler of a pass, and tell whether XLA has it. The first call compiles it, or loads it."""
    with _LOCK:
        return not _errors and _registered(number)


@cache
def _registered(number: int) -> bool:
    if sys.platform not in ("linux", "darwin") or sys.byteorder != "little" or sys.maxsize < 2**63 - 1:
        return False
    try:
        from mbn_jax.kernels import xla_handlers

        jax.local_devices(backend="cpu")  # so that XLA checks the handler now
        address = ctypes.c_void_p(xla_handlers.address_of_pass(number))
        jax.ffi.register_ffi_target(TARGETS[number], jax.ffi.pycapsule(address), platform="cpu")
    except ModuleNotFoundError as error:
        _errors.append(error)
    except Exception as error:  # noqa: BLE001 - the user has not requested Numba, so its errors are only logged
        _errors.append(error)
        message = "Numba's loops do not work in JAX here, which makes mbn slower: %s: %s"
        logging.getLogger("mbn.numba").warning(message, type(error).__name__, error)
    return not _errors
