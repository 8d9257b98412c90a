"""The evaluation of lazy results.

An array of MLX is a graph until it is evaluated. It keeps its operands until then, and only the thread that has made it
can evaluate it. ``mx.compile`` and ``mx.vmap`` trace a function: nothing can be evaluated within it.
"""

from typing import Any

import mlx.core as mx

from mbn.array_api import Pair
from mbn.contract import Integration, State


class LazyEvaluation(Integration):
    """The hooks that evaluate results, and keep traced arrays out of layers."""

    def constant(self, x: mx.array) -> mx.array:
        return mx.stop_gradient(x)

    def finish(self, *values: Any) -> None:
        mx.eval(_tree(values))

    def stores(self, before: State, after: State) -> bool:
        if is_traced(*after):
            raise RuntimeError(_WOULD_LEAK)
        return True

    def evaluated(self, x: mx.array) -> mx.array:
        """Return an array of the layer's, evaluated unless it is traced, since any thread may read it."""
        is_traced(x)
        return x


def is_traced(*arrays: mx.array | None) -> bool:
    """Tell whether ``mx.compile`` or ``mx.vmap`` traces the arrays, which are evaluated if not."""
    try:
        mx.eval(arrays)
    except ValueError as error:  # MLX has no other way to ask
        if "transformations" in str(error):
            return True
        raise
    return False


def _tree(value: Any) -> Any:
    """Return values in a tree of MLX, which has no pairs."""
    if isinstance(value, Pair):
        return value.hi, value.lo
    return tuple(map(_tree, value)) if isinstance(value, tuple) else value


_WOULD_LEAK = """\
a layer that mx.compile or mx.vmap traces cannot keep its new statistics: they end with the trace. The layer is \
unchanged. Pass parameters and state through a pure function:

    y, state = bn.apply(bn.params, bn.state, x, training=True)"""
