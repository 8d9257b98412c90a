"""A plugin of pytest that lowers JAX's primitives for GPUs on the CPU too."""

import gc
from functools import partial

from jax.interpreters import mlir

import mbn
from mbn_jax.kernels.primitives import WidePrimitive

mbn.get_backend("jax")  # makes the primitives
PRIMITIVES = [value for value in gc.get_objects() if isinstance(value, WidePrimitive) and value.on_gpu is not None]
for _primitive in PRIMITIVES:
    mlir.register_lowering(_primitive.primitive, partial(_primitive._lower, _primitive.on_gpu), "cpu")
