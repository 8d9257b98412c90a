"""Linear maps as primitives with transposes of their own.

JAX would transpose a broadcast to a plain sum, and cannot transpose a sum in float64 at all. So the linear maps of
derivatives are primitives, whose transposes are given. They compose with all transformations, in any order and number,
because the rules of each primitive are written with such primitives again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad
from jax.sharding import NamedSharding, reshard

from mbn_jax.group import AxisGroup
from mbn_jax.kernels.channel_sums import column
from mbn_jax.kernels.layouts import CPU, GPU, Layout
from mbn_jax.kernels.primitives import Arrays, Levels, WidePrimitive, result_type, vectorized

Shape: TypeAlias = tuple[int, ...]


class LinearPrimitive(WidePrimitive):
    """A map from arrays to arrays of the same dtype, linear in the arrays; its other inputs are its residuals.

    Args:
        name: the name of the primitive in a jaxpr.
        function: ``function(arrays, residuals, shape)``, which returns a list of arrays; JAX never differentiates it.
        shapes: ``shapes(shapes of the arrays, shape)``, which returns the shapes of the results.
        derivative: ``derivative(arrays, residuals, tangents)``, the derivative by the residuals, made of operations
            that JAX can differentiate and transpose again; None if there are no residuals.
        on_gpu: the function in the layout for GPUs, if that differs.

    :func:`are_transposes` sets the transpose of a map.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Arrays, Any, Shape], list[jax.Array]],
        shapes: Callable[[list[Shape], Shape], list[Shape]],
        derivative: Callable[[Arrays, Any, Any], list[jax.Array]] | None = None,
        on_gpu: Callable[[Arrays, Any, Shape], list[jax.Array]] | None = None,
    ) -> None:
        super().__init__(name, function, on_gpu)
        self._shapes = shapes
        self._derivative: Any = derivative
        self.transpose: WidePrimitive
        ad.primitive_jvps[self.primitive] = self._jvp
        ad.primitive_transposes[self.primitive] = self._transpose

    def __call__(self, arrays: Arrays, residuals: Any = (), shape: Shape = ()) -> list[jax.Array]:
        """Apply the map. ``shape`` is the shape of the results, for maps whose arrays do not determine it."""
        return super().__call__(list(arrays), residuals, shape=shape)

    def _abstract_eval(self, *operands: Any, tree: Any, levels: Levels, shape: Shape) -> list[Any]:  # type: ignore[override]  # its own settings
        depth = len(levels)
        arrays, _ = tree.unflatten(operands)
        batch, dtype = operands[0].shape[:depth], operands[0].dtype
        shapes = self._shapes([array.shape[depth:] for array in arrays], shape)
        return [result_type(operands, levels, (*batch, *result), dtype) for result in shapes]

    def _jvp(self, primals: Arrays, tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
        bind = partial(self.bind, **parameters)
        tree, levels = parameters["tree"], parameters["levels"]
        count = len(tree.unflatten(primals)[0])
        has_tangent = [not isinstance(tangent, ad.Zero) for tangent in tangents]
        tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
        terms = []
        if any(has_tangent[:count]):
            terms.append(bind(*tangents[:count], *primals[count:]))
        if any(has_tangent[count:]):

            def derivative(*operands: jax.Array) -> list[jax.Array]:
                arrays, residuals = tree.unflatten(operands[: len(primals)])
                _, changes = tree.unflatten((*arrays, *operands[len(primals) :]))
                return self._derivative(arrays, residuals, changes)

            terms.append(
                vectorized(
                    derivative, [level._replace(has_axis=level.has_axis + level.has_axis[count:]) for level in levels]
                )(*primals, *tangents[count:])
            )
        return bind(*primals), [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]

    def _transpose(
        self, cotangents: Sequence[Any], *operands: Any, tree: Any, levels: Levels, **parameters: Any
    ) -> list[Any]:
        cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
        arrays, residuals = tree.unflatten(operands)
        count = len(arrays)
        leaves, tree = jax.tree.flatten((cotangents, residuals))
        levels = tuple(level._replace(has_axis=(True,) * len(cotangents) + level.has_axis[count:]) for level in levels)
        results = self.transpose.bind(*leaves, tree=tree, levels=levels, **parameters)
        # JAX asks for the cotangents of undefined primals only; the other arrays are zeros that it instantiated.
        asked_for = [
            _lying_as(array.aval, result) if ad.is_undefined_primal(array) else None
            for array, result in zip(arrays, results, strict=True)
        ]
        return asked_for + [None] * (len(operands) - count)

    def _batch(  # type: ignore[override]  # the same
        self, axis_data: Any, operands: Arrays, axes: Sequence[int | None], *, tree: Any, **parameters: Any
    ) -> tuple[list[jax.Array], list[int | None]]:
        operands, axes = list(operands), list(axes)
        arrays, residuals = tree.unflatten(operands)
        # Results have the batch axis if an array has it, or if the map sums over a group of replicas along the axis.
        has_axis = any(axis is not None for axis in axes) or _is_shared(residuals, axis_data.name)
        for i in range(len(arrays) if has_axis else 0):
            if axes[i] is None:
                operands[i], axes[i] = jnp.broadcast_to(operands[i], (axis_data.size, *operands[i].shape)), 0
        return super()._batch(axis_data, operands, axes, tree=tree, **parameters)


def _is_shared(residuals: Any, axis: Any) -> bool:
    """Tell whether residuals contain a group of replicas along an axis."""
    leaves = jax.tree.leaves(residuals, is_leaf=lambda value: isinstance(value, AxisGroup))
    return any(isinstance(leaf, AxisGroup) and axis in leaf.names for leaf in leaves)


def _lying_as(kind: Any, x: jax.Array) -> jax.Array:
    """Return x with the sharding of a type, along explicit mesh axes."""
    own, spec = jax.typeof(x).sharding, kind.sharding.spec
    return (
        x if own.spec == spec else reshard(x, NamedSharding(kind.sharding.mesh if own.mesh.empty else own.mesh, spec))
    )


def are_transposes(one: LinearPrimitive, other: LinearPrimitive) -> None:
    """Tell JAX that two maps of the same residuals are each other's transposes."""
    one.transpose, other.transpose = other, one


def _channel_sum(layout: Layout, arrays: Arrays, residuals: Any, shape: Shape) -> list[jax.Array]:
    (x,) = arrays
    (total,) = layout.sums(layout.view(x).astype(np.float64))
    return [total.astype(x.dtype)]


def _spread(arrays: Arrays, residuals: Any, shape: Shape) -> list[jax.Array]:
    return [jnp.broadcast_to(column(arrays[0], len(shape)), shape)]


_CHANNEL_SUM = LinearPrimitive(
    "channel_sum", partial(_channel_sum, CPU), lambda arrays, shape: [shape[1:2]], on_gpu=partial(_channel_sum, GPU)
)
_SPREAD = LinearPrimitive("spread", _spread, lambda arrays, shape: [shape])
are_transposes(_CHANNEL_SUM, _SPREAD)


def channel_sum(x: jax.Array) -> jax.Array:
    """Return the sum of each channel of x, (N, C) or (N, C, L), computed in float64 and rounded once."""
    return _CHANNEL_SUM([x], shape=x.shape)[0]


def spread(vector: jax.Array, shape: Shape) -> jax.Array:
    """Return a (C,) vector broadcast to the shape of x; the gradient of the vector is a ``channel_sum``."""
    return _SPREAD([vector], shape=shape)[0]
