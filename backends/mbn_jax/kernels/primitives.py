"""Functions as primitives.

They must compute in float64 where they have to, though JAX has no 64-bit numbers by default and the switch is the
user's: a primitive is lowered with them, whatever else is. And they must compose with vmap, as often as it is applied.
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

from mbn_jax.kernels.layouts import over

try:
    from jax import enable_x64
except ImportError:  # JAX 0.7
    from jax.experimental import enable_x64  # type: ignore[attr-defined, no-redef]  # of another version

Arrays: TypeAlias = Sequence[jax.Array]


class Level(NamedTuple):
    """One vmap over a primitive."""

    name: Any
    """That of its axis, by which replicas along it find each other, or JAX's own for an axis without one."""
    has_axis: tuple[bool, ...]
    """For each operand, whether it has this axis."""


Levels: TypeAlias = tuple[Level, ...]


@contextmanager
def usual_rules() -> Iterator[None]:
    """Trace as functions of maps are written: with 64-bit numbers, and promoting as JAX does unless it is told."""
    rank, dtype = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with enable_x64(True), rank, dtype:
        yield


class WidePrimitive:
    """A function of trees of arrays that returns a list of arrays. Nobody differentiates it. To call it is to apply it.

    Args:
        name: how it is called in a jaxpr.
        function: ``function(*arguments, **settings)``. It is traced with 64-bit numbers; its results have a dtype that
            there is without them too.
        on_gpu: the same in the layout for GPUs, where that is another one.
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
        """Apply the map."""
        leaves, tree = jax.tree.flatten(arguments)
        return self.bind(*leaves, tree=tree, levels=(), **settings)

    def bind(self, *operands: Any, **parameters: Any) -> list[jax.Array]:
        """Bind the primitive, as JAX binds its own."""
        return self.primitive.bind(*varying_alike(operands), **parameters)

    # The parameters of the primitive: the tree that its operands are the leaves of; the levels of vmap, the outermost
    # first; and the settings. At each level the results have one more axis in front; so do those operands that the
    # level says have it.

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
        with usual_rules(), over(_devices(context.module_context.axis_context)):
            apply = partial(self._apply, function)
            # Where its operands lie is for XLA to see, though axes of devices are explicit to whoever calls it.
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
    """Return over how many devices XLA spreads what is lowered in a context: not those of a ``shard_map``."""
    if hasattr(context, "num_devices"):
        return context.num_devices or 1
    if hasattr(context, "manual_axes"):
        return math.prod(size for axis, size in context.mesh.shape.items() if axis not in context.manual_axes)
    return 1


def _with_wide_sizes(context: Any, kinds: list[Any]) -> Any:
    """Return a context whose sizes of axes, symbols in an export, are 64-bit numbers as everything is there.

    What JAX has lowered for others has 32-bit ones among its arguments, and is not to be taken for the same.
    """
    convert = mlir.lower_fun(lambda *sizes: [size.astype(np.int64) for size in sizes], multiple_results=True)
    sizes = convert(context.replace(avals_in=kinds), *context.dim_var_values)
    module = context.module_context
    caches: dict[str, Any] = {
        name: {} for name in ("lowering_cache", "cached_primitive_lowerings") if hasattr(module, name)
    }
    return context.replace(dim_var_values=tuple(sizes), module_context=module.replace(**caches))


def varying_alike(operands: Sequence[Any]) -> list[Any]:
    """Return operands that all vary over the devices of a ``shard_map`` that one of them varies over.

    What JAX's own operations do with theirs: then so do results; and what varies less is given a sum over devices for
    its gradient.
    """
    own = [_manual_axes(jax.typeof(operand)) for operand in operands]
    every = frozenset[Any]().union(*own)
    return [
        operand if axes == every else _vary(operand, tuple(every - axes))
        for operand, axes in zip(operands, own, strict=True)
    ]


def _manual_axes(kind: Any) -> frozenset[Any]:
    """Return the axes of devices that an array of a type varies over."""
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # until JAX 0.9, and from then on


def _vary(operand: Any, axes: tuple[Any, ...]) -> jax.Array:
    if hasattr(lax, "pcast"):
        return lax.pcast(operand, axes, to="varying")
    return lax.pvary(operand, axes)  # type: ignore[attr-defined]  # until JAX 0.8


def result_type(operands: Sequence[Any], levels: Levels, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of a result, which lies and varies over devices as the operands do, given their types.

    Along explicit axes of devices it is sharded as an operand of its rank is, and its channels as those of any.
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
    """Return ``function`` under a vmap for each level, which says what arguments have its axis in front."""
    for level in reversed(levels):
        axes = tuple(0 if has_axis else None for has_axis in level.has_axis)
        function = jax.vmap(function, axes, axis_name=level.name)
    return function
