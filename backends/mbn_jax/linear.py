"""Linear maps with transposes of their own.

JAX transposes a broadcast to a plain sum, and cannot transpose a sum in pairs at all. So what derivatives are made of
has to be primitives, of which JAX takes the transpose as given. They have to compose with every transformation, in any
order and as often as it likes: each of a primitive's rules is written with primitives again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mbn_jax.pairs import as_pair, channel_sums, column

Arrays: TypeAlias = Sequence[jax.Array]
Shape: TypeAlias = tuple[int, ...]


class LinearMap:
    """A map from arrays to arrays of the same dtype, linear in them; what else it depends on are its residuals.

    Args:
        name: how it is called in a jaxpr.
        function: ``function(arrays, residuals, shape)``, which returns a list of arrays. Nobody differentiates it.
        shapes: the shapes of the results, given those of the arrays and ``shape``.
        derivative: ``derivative(arrays, residuals, tangents)``, by the residuals, in operations that JAX can
            differentiate and transpose again; None where there are no residuals.

    A map has a transpose once :func:`are_transposes` says so. To call it is to apply it.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Arrays, Any, Shape], list[jax.Array]],
        shapes: Callable[[list[Shape], Shape], list[Shape]],
        derivative: Callable[[Arrays, Any, Any], list[jax.Array]] | None = None,
    ) -> None:
        self._function, self._shapes, self._derivative = function, shapes, derivative
        self._primitive = primitive = Primitive(name)
        self.transpose: Primitive | None = None
        primitive.multiple_results = True
        primitive.def_impl(jax.jit(self._apply, static_argnames=("count", "tree", "levels", "shape")))
        primitive.def_abstract_eval(self._abstract_eval)
        ad.primitive_jvps[primitive] = self._jvp
        ad.primitive_transposes[primitive] = self._transpose
        batching.primitive_batchers[primitive] = self._batch
        mlir.register_lowering(primitive, mlir.lower_fun(self._apply, multiple_results=True))

    def __call__(self, arrays: Arrays, residuals: Any = (), shape: Shape = ()) -> list[jax.Array]:
        """Apply the map. ``shape`` is what the arrays don't tell of the results."""
        leaves, tree = jax.tree.flatten(residuals)
        return self._primitive.bind(*arrays, *leaves, count=len(arrays), tree=tree, levels=(), shape=shape)

    # The parameters of the primitive: how many of its operands are the arrays, the others being the leaves of the
    # residuals; the tree of those; the levels of vmap, the outermost first; and shape. At each level the arrays and the
    # results have one more axis in front; so do those leaves that the level says have it.

    def _apply(self, *operands: Any, count: int, tree: Any, levels: Any, shape: Shape) -> list[jax.Array]:
        def function(*operands: jax.Array) -> list[jax.Array]:
            return self._function(operands[:count], tree.unflatten(operands[count:]), shape)

        return _vectorised(function, [(True,) * count + level for level in levels])(*operands)

    def _abstract_eval(self, *operands: Any, count: int, tree: Any, levels: Any, shape: Shape) -> list[Any]:  # noqa: ARG002 - all parameters are passed
        depth = len(levels)
        batch, dtype = operands[0].shape[:depth], operands[0].dtype
        shapes = self._shapes([operand.shape[depth:] for operand in operands[:count]], shape)
        return [jax.core.ShapedArray((*batch, *result), dtype) for result in shapes]

    def _jvp(self, primals: Arrays, tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
        bind = partial(self._primitive.bind, **parameters)
        count, tree, levels = (parameters[name] for name in ("count", "tree", "levels"))
        has_tangent = [not isinstance(tangent, ad.Zero) for tangent in tangents]
        tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
        terms = []
        if any(has_tangent[:count]):
            terms.append(bind(*tangents[:count], *primals[count:]))
        if any(has_tangent[count:]):

            def derivative(*operands: jax.Array) -> list[jax.Array]:
                leaves, changes = operands[count : len(primals)], operands[len(primals) :]
                return self._derivative(operands[:count], tree.unflatten(leaves), tree.unflatten(changes))

            vectorised = _vectorised(derivative, [(True,) * count + level + level for level in levels])
            terms.append(vectorised(*primals, *tangents[count:]))
        return bind(*primals), [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]

    def _transpose(self, cotangents: Sequence[Any], *operands: Any, count: int, **parameters: Any) -> list[Any]:
        cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
        results = self.transpose.bind(*cotangents, *operands[count:], count=len(cotangents), **parameters)
        results += [None] * (len(operands) - count)
        # An array that is not asked for is a zero that JAX has written out.
        asked = (ad.is_undefined_primal(operand) for operand in operands)
        return [result if is_asked else None for result, is_asked in zip(results, asked, strict=True)]

    def _batch(
        self, operands: Arrays, axes: Sequence[int | None], *, count: int, levels: Any, **parameters: Any
    ) -> tuple[Any, Any]:
        size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
        in_front = [
            operand if axis is None else jnp.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        for i in range(count):
            if axes[i] is None:
                in_front[i] = jnp.broadcast_to(in_front[i], (size, *in_front[i].shape))
        level = tuple(axis is not None for axis in axes[count:])
        results = self._primitive.bind(*in_front, count=count, levels=(level, *levels), **parameters)
        return results, [0] * len(results)


def are_transposes(one: LinearMap, other: LinearMap) -> None:
    """Tell JAX that two maps of the same residuals are each other's transposes."""
    one.transpose, other.transpose = other._primitive, one._primitive  # noqa: SLF001 - two of a kind


def _vectorised(function: Callable[..., Any], levels: Sequence[Sequence[bool]]) -> Callable[..., Any]:
    """Return ``function`` under a vmap for each level, which says what arguments have its axis in front."""
    for level in reversed(levels):
        function = jax.vmap(function, in_axes=tuple(0 if has_axis else None for has_axis in level))
    return function


def _channel_sum(arrays: Arrays, residuals: Any, shape: Shape) -> list[jax.Array]:  # noqa: ARG001 - it has no residuals
    return [channel_sums(lambda x: as_pair(x, x.dtype), arrays[0]).hi]


def _spread(arrays: Arrays, residuals: Any, shape: Shape) -> list[jax.Array]:  # noqa: ARG001
    return [jnp.broadcast_to(column(arrays[0], len(shape)), shape)]


_CHANNEL_SUM = LinearMap("channel_sum", _channel_sum, lambda arrays, shape: [shape[1:2]])  # noqa: ARG005
_SPREAD = LinearMap("spread", _spread, lambda arrays, shape: [shape])  # noqa: ARG005
are_transposes(_CHANNEL_SUM, _SPREAD)


def channel_sum(x: jax.Array) -> jax.Array:
    """Return the sum of each channel of x, (N, C) or (N, C, L), made in pairs and rounded once."""
    return _CHANNEL_SUM([x], shape=x.shape)[0]


def spread(vector: jax.Array, shape: Shape) -> jax.Array:
    """Return a (C,) vector in the shape of an x, so that its gradient is a ``channel_sum``."""
    return _SPREAD([vector], shape=shape)[0]
