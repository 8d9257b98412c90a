"""JAX's layout for GPUs, on the CPU: a plugin of pytest, with which all that is compiled takes it."""

import gc
from functools import partial

from hypothesis import HealthCheck, settings
from jax.interpreters import mlir

import mbn
from mbn_jax.kernels.primitives import WidePrimitive

mbn.get_backend("jax")  # makes the primitives
PRIMITIVES = [value for value in gc.get_objects() if isinstance(value, WidePrimitive) and value.on_gpu is not None]
settings.register_profile(
    "gpu",
    deadline=None,
    derandomize=True,
    max_examples=12,  # each of them compiles
    suppress_health_check=[HealthCheck.too_slow],
)
for _primitive in PRIMITIVES:
    mlir.register_lowering(_primitive.primitive, partial(_primitive._lower, _primitive.on_gpu), "cpu")
