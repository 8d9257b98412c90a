"""Primitives that compute in float64.

By default JAX has no 64-bit numbers, and only the user may enable them; but a primitive can be lowered with 64-bit
numbers enabled for itself alone. The primitives compose with any number of vmaps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from mbn_jax.kernels import compiled_loops
from mbn_jax.kernels.layouts import over

try:
    from jax import enable_x64
except ImportError:  # JAX 0.7
    from jax.experimental import enable_x64  # type: ignore[attr-defined, no-redef]  # of another version

Arrays: TypeAlias = Sequence[jax.Array]


class Level(NamedTuple):
    """One vmap over a primitive."""

    name: Any
    """The name of its axis, by which a group of replicas finds it, or JAX's placeholder for an axis without a name."""
    has_axis: tuple[bool, ...]
    """For each operand, whether it has this axis."""


Levels: TypeAlias = tuple[Level, ...]


@contextmanager
def usual_rules() -> Iterator[None]:
    """Trace with 64-bit numbers and JAX's default promotion of ranks and dtypes, regardless of the user's settings."""
    rank, dtype = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with enable_x64(True), rank, dtype:
        yield


class WidePrimitive:
    """A primitive from trees of arrays to a list of arrays, which is called like a function. It has no derivative.

    Args:
        name: the name of the primitive in a jaxpr.
        function: ``function(*arguments, **settings)``. It is traced with 64-bit numbers, but the dtypes of its results
            must exist without them.
        on_gpu: the same in the layout for GPUs, if that differs.
    """

    def __init__(
        self, name: str, function: Callable[..., list[jax.Array]], on_gpu: Callable[..., list[jax.Array]] | None = None
    ) -> None:
        self._function, self.on_gpu = function, on_gpu
        self.primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(self._run)
        primitive.def_abstract_eval(self._abstract_eval)
        batching.fancy_primitive_batchers[primitive] = self._batch
        mlir.register_lowering(primitive, partial(self._lower, function))
        if on_gpu is not None:
            for platform in ("cuda", "rocm"):
                mlir.register_lowering(primitive, partial(self._lower, on_gpu), platform)

    def __call__(self, *arguments: Any, **settings: Any) -> list[jax.Array]:
        """Apply the function."""
        leaves, tree = jax.tree.flatten(arguments)
        return self.bind(*leaves, tree=tree, levels=(), **settings)

    def bind(self, *operands: Any, **parameters: Any) -> list[jax.Array]:
        """Bind the primitive, with operands that vary alike over the devices of a ``shard_map``."""
        return self.primitive.bind(*varying_alike(operands), **parameters)

    # The parameters of the primitive are the tree of its operands, the levels of vmap, the outermost first, and the
    # settings. Each level adds an axis in front of the results, and in front of the operands that the level marks.

    def _apply(
        self, function: Callable[..., list[jax.Array]], *operands: Any, tree: Any, levels: Levels, **settings: Any
    ) -> list[jax.Array]:
        return vectorized(lambda *leaves: function(*tree.unflatten(leaves), **settings), levels)(*operands)

    def _run(self, *operands: Any, **parameters: Any) -> list[jax.Array]:
        with jax.disable_jit(False):
            return _compiled(self.primitive, *operands, **parameters)

    def _abstract_eval(self, *operands: Any, levels: Levels, **parameters: Any) -> list[Any]:
        apply = partial(self._apply, self._function, levels=levels, **parameters)
        with usual_rules():
            results = jax.eval_shape(
                apply, *(jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands)
            )
        return [result_type(operands, levels, result.shape, result.dtype) for result in results]

    def _lower(self, function: Callable[..., Any], context: Any, *operands: Any, **parameters: Any) -> Any:
        sizes = [jax.core.ShapedArray((), jax.dtypes.canonicalize_dtype(np.int64)) for _ in context.dim_var_values]
        devices = _devices(context.module_context.axis_context)
        allowed = compiled_loops.allowed(context, parameters["levels"], devices)
        with usual_rules(), over(devices), allowed:
            apply = partial(self._apply, function)
            # Drop the operands' shardings: here XLA chooses shardings, even if the caller has explicit mesh axes.
            context = context.replace(
                avals_in=[jax.core.ShapedArray(kind.shape, kind.dtype) for kind in context.avals_in]
            )
            if sizes:
                context = _with_wide_sizes(context, sizes)
            return mlir.lower_fun(apply, multiple_results=True)(context, *operands, **parameters)

    def _batch(
        self, axis_data: Any, operands: Arrays, axes: Sequence[int | None], *, levels: Levels, **parameters: Any
    ) -> tuple[list[jax.Array], list[int | None]]:
        if all(axis is None for axis in axes):
            results = self.bind(*operands, levels=levels, **parameters)
            return results, [None] * len(results)
        in_front = [
            operand if axis is None else jnp.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        level = Level(axis_data.name, tuple(axis is not None for axis in axes))
        results = self.bind(*in_front, levels=(level, *levels), **parameters)
        return results, [0] * len(results)


@partial(jax.jit, static_argnums=0, static_argnames=("tree", "levels", "shape", "correction"))
def _compiled(primitive: Primitive, *operands: Any, **parameters: Any) -> list[jax.Array]:
    return primitive.bind(*operands, **parameters)


def _devices(context: Any) -> int:
    """Return the number of devices over which XLA partitions a computation, without the axes of a ``shard_map``."""
    if hasattr(context, "num_devices"):
        return context.num_devices or 1
    if hasattr(context, "manual_axes"):
        return math.prod(size for axis, size in context.mesh.shape.items() if axis not in context.manual_axes)
    return 1


def _with_wide_sizes(context: Any, kinds: list[Any]) -> Any:
    """Return a context whose symbolic sizes of axes, which an export has, are 64-bit numbers like all others here.

    The caches of lowerings are new, since JAX's other lowerings have 32-bit sizes among their arguments.
    """
    convert = mlir.lower_fun(lambda *sizes: [size.astype(np.int64) for size in sizes], multiple_results=True)
    sizes = convert(context.replace(avals_in=kinds), *context.dim_var_values)
    module = context.module_context
    caches: dict[str, Any] = {
        name: {} for name in ("lowering_cache", "cached_primitive_lowerings") if hasattr(module, name)
    }
    return context.replace(dim_var_values=tuple(sizes), module_context=module.replace(**caches))


def varying_alike(operands: Sequence[Any]) -> list[Any]:
    """Return operands that all vary over each axis of a ``shard_map`` over which one of them varies.

    JAX's own operations do the same. The results then vary over these axes too, and the gradient of an operand that did
    not vary over an axis is a sum over it.
    """
    own = [_manual_axes(jax.typeof(operand)) for operand in operands]
    every = frozenset[Any]().union(*own)
    return [
        operand if axes == every else _vary(operand, tuple(every - axes))
        for operand, axes in zip(operands, own, strict=True)
    ]


def _manual_axes(kind: Any) -> frozenset[Any]:
    """Return the mesh axes over which an array of a type varies."""
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before JAX 0.9; from JAX 0.9 on


def _vary(operand: Any, axes: tuple[Any, ...]) -> jax.Array:
    if hasattr(lax, "pcast"):
        return lax.pcast(operand, axes, to="varying")
    return lax.pvary(operand, axes)  # type: ignore[attr-defined]  # until JAX 0.8


def result_type(operands: Sequence[Any], levels: Levels, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of a result, given the types of the operands: it is sharded and varies over devices as they do.

    Along explicit mesh axes, a result is sharded like an operand of its rank, and its channels like those of any
    operand.
    """
    kind = max(operands, key=lambda operand: not operand.sharding.mesh.empty)
    spec: list[Any] = [None] * len(shape)
    rank = len(shape) - len(levels)
    specs = [
        operand.sharding.spec[sum(each) :]
        for operand, *each in zip(operands, *(level.has_axis for level in levels), strict=True)
    ]
    for own in sorted(specs, key=lambda own: len(own) != rank):
        places = own if len(own) == rank else own[1:2] if rank == 1 else (None, *own) if len(own) == 1 else ()
        for place, axis in enumerate(places[:rank], len(levels)):
            if axis is not None and axis not in spec:
                spec[place] = axis if spec[place] is None else spec[place]
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec(*spec))
    return kind.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def vectorized(function: Callable[..., Any], levels: Sequence[Level]) -> Callable[..., Any]:
    """Return ``function`` under one vmap per level, which maps the first axes of the arguments that the level marks."""
    for level in reversed(levels):
        axes = tuple(0 if has_axis else None for has_axis in level.has_axis)
        function = jax.vmap(function, axes, axis_name=level.name)
    return function
