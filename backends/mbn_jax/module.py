"""The layer as a module of flax.

The module must behave like ``flax.nnx.BatchNorm`` under every transformation and for every tool that reads modes and
variables, and compute the same as the layer. flax compiles a step once for equal modules, so all attributes that are no
variables must be hashable and comparable. Only the backend's hook imports this file, since the rest of mbn needs no
flax.
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
    in evaluation (:meth:`eval`) it is normalised by the running statistics, which do not change.

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
        group: the axis whose replicas share the statistics of their batches in training, as
            :attr:`mbn.BatchNorm1d.group`; settable.

    Args:
        layer: the layer. The module starts with copies of its arrays, with its mode and its group, and is frozen if the
            layer is.
        adopt: a function that makes the layer hold other arrays.
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
        self.group = layer.group  # flax notes the name of each attribute that is set, and compares modules by them

    @property
    def group(self) -> Any:
        """The name of the axis along which replicas share statistics, or a tuple of names, or None."""
        return self.definition.layer.group

    @group.setter
    def group(self, value: Any) -> None:
        self.definition = self.definition.joined(value)

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
            if new is not old:  # flax allows reads of a module that is closed over, but no writes
                variable[...] = new
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view; called by ``nnx.view``.

        Args:
          use_running_average: if True, the running statistics are used and not updated, as in evaluation.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class _Definition:
    """A layer without its arrays, mode and device, which compares equal to any other layer with the same settings."""

    def __init__(self, layer: Any, adopt: Callable[[Params, State], None]) -> None:
        layer, adopt = copy.deepcopy((layer, adopt))  # in one call, so that the copy of adopt acts on that of layer
        layer.train()
        with jax.ensure_compile_time_eval():
            adopt(*jax.tree.map(lambda array: jnp.zeros(0, array.dtype), (layer.params, layer.state)))
        self.layer = layer

    def joined(self, group: Any) -> "_Definition":
        """Return the definition of a layer in a group; other modules and compiled functions may hold this one."""
        other = copy.copy(self)
        other.layer = copy.copy(self.layer)
        other.layer.group = group
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Definition) and jax.tree.structure(self.layer) == jax.tree.structure(other.layer)  # type: ignore[operator]

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self.layer))

    def __repr__(self) -> str:
        return repr(self.layer)


def _variable(kind: type[nnx.Variable[Any]], array: jax.Array | None) -> Any:
    """Return a variable with its own copy of an array, since flax may donate it."""
    return nnx.data(None) if array is None else kind(jnp.array(array, copy=True))


def _value(variable: Any) -> jax.Array | None:
    return None if variable is None else variable[...]
