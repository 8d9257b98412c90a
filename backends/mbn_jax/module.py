"""The layer as a module of flax.

It has to be to flax what ``flax.nnx.BatchNorm`` is, under every transformation and to all that looks for modes and
variables, and to compute what the layer computes. Steps are compiled once for equal modules, so all of it that is no
variable has to be hashable and comparable. Nothing else of mbn needs flax, so only the backend's hook imports this.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mbn.contract import Params, State


class BatchNorm1d(nnx.Module):
    """Batch normalisation of (N, C) or (N, C, L) inputs, as :class:`mbn.BatchNorm1d` does it.

    In training (:meth:`train`) the input is normalised by its own statistics, and the running ones move towards them;
    in evaluation (:meth:`eval`) it is normalised by the running statistics, which stay.

    Example usage::

        >>> import jax, jax.numpy as jnp, mbn
        >>> from flax import nnx

        >>> module = mbn.BatchNorm1d(3, backend="jax").as_module()
        >>> x = jax.random.normal(jax.random.key(0), (5, 3), jnp.float32)
        >>> module.train()
        >>> y = module(x)
        >>> assert module.num_batches_tracked[...] == 1
        >>> module.eval()
        >>> y = module(x)
        >>> assert module.num_batches_tracked[...] == 1

    Attributes:
        weight, bias: ``nnx.Param`` of shape (C,), or None where the layer has none.
        running_mean, running_var: ``nnx.BatchStat`` of shape (C,), or None where the layer has none.
        num_batches_tracked: ``nnx.BatchStat`` of an integer, or None where the layer has none.
        use_running_average: the mode: False in training, True in evaluation.

    Args:
        layer: the layer. The module begins with copies of its arrays and with its mode, and is frozen if it is.
        adopt: makes the layer hold other arrays.
    """

    def __init__(self, layer: Any, adopt: Callable[[Params, State], None]) -> None:
        params, state = layer.params, layer.state
        self.weight = _variable(nnx.Param, params.weight)
        self.bias = _variable(nnx.Param, params.bias)
        self.running_mean = _variable(nnx.BatchStat, state.running_mean)
        self.running_var = _variable(nnx.BatchStat, state.running_var)
        self.num_batches_tracked = _variable(nnx.BatchStat, state.num_batches_tracked)
        self.use_running_average = not layer.training
        self.definition = _Definition(layer, adopt)

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        sample_weight: Any = None,
    ) -> jax.Array:
        """Normalise ``x``; in training, update the running statistics.

        Args:
            x: as in a call of :class:`mbn.BatchNorm1d`.
            use_running_average: a mode for this call.
            mask, lengths, sample_weight: as in a call of :class:`mbn.BatchNorm1d`.

        Returns:
            An array with the shape and dtype of ``x``.

        Raises:
            TypeError, ValueError: as in a call of :class:`mbn.BatchNorm1d`. The module is unchanged.
        """
        tracked = self.running_mean, self.running_var, self.num_batches_tracked
        params, before = Params(_value(self.weight), _value(self.bias)), State(*map(_value, tracked))
        evaluates = self.use_running_average if use_running_average is None else use_running_average
        y, after = self.definition.layer.apply(
            params, before, x, training=not evaluates, mask=mask, lengths=lengths, sample_weight=sample_weight
        )
        for variable, old, new in zip(tracked, before, after, strict=True):
            if new is not old:  # a module that is closed over may be read, but not written to
                variable[...] = new
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view; called by ``nnx.view``.

        Args:
          use_running_average: if True, the running statistics are used and left alone, instead of those of the input.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class _Definition:
    """A layer but for its arrays, its mode and its place, equal to every other that does the same."""

    def __init__(self, layer: Any, adopt: Callable[[Params, State], None]) -> None:
        layer, adopt = copy.deepcopy((layer, adopt))  # together, so that the one is still about the other
        layer.train()
        with jax.ensure_compile_time_eval():
            adopt(*jax.tree.map(lambda array: jnp.zeros(0, array.dtype), (layer.params, layer.state)))
        self.layer = layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Definition) and jax.tree.structure(self.layer) == jax.tree.structure(other.layer)  # type: ignore[operator]

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self.layer))

    def __repr__(self) -> str:
        return repr(self.layer)


def _variable(kind: type[nnx.Variable[Any]], array: jax.Array | None) -> Any:
    """Return a variable with an array of its own, which may be donated."""
    return nnx.data(None) if array is None else kind(jnp.array(array, copy=True))


def _value(variable: Any) -> jax.Array | None:
    return None if variable is None else variable[...]
