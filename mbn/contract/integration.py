"""The hooks of a framework in batch normalisation and layers. Each does nothing unless a backend overrides it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

from mbn.contract.replicas import Group
from mbn.contract.values import Array, Params, State
from mbn.threads import Exclusive

Held = TypeVar("Held", bound=tuple[Array | None, ...])
"""Parameters or statistics, or both."""


class Integration:
    """The hooks of a framework with autograd, tracing or modules."""

    name: ClassVar[str]

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the two functions of ``mbn.step.compose`` as the framework calls them: with autograd, or compiled.

        It is called once, when the backend is made and before its own ``__init__``.
        """
        return forward, pullback

    def constant(self, x: Array) -> Array:
        """Return ``x`` itself, or an array in the same memory, as a constant to differentiation.

        So statistics of it hold no reference to the graph of ``x``.
        """
        return x

    def finish(self, *values: Any) -> None:
        """Evaluate lazy results: arrays, numbers, or statistics in the backend's own representation.

        A lazy framework keeps all operands of a result until the result is evaluated. ``fit`` calls this with the
        statistics of each batch, before the next batch is made, and ``stores`` with the state after a step, whose graph
        would grow with every step. Outputs are left to the caller.
        """

    def group(self, given: Any) -> Any:
        """Return the group that ``given`` stands for: an object of an engine of this framework, or True for its world.

        It is called for backends with the capability ``replicas``. An ``mbn.Group`` stands for itself, except where
        the framework traces the communication.

        The result is a :class:`Group`; or where the framework traces the communication itself, as along a named axis,
        a :class:`Replicas`. None stands for a single process.

        Raises:
            TypeError: ``given`` is no group of this framework.
            ValueError: this process is not part of the group.
            RuntimeError: the engine is not ready.
            ImportError: the engine is not installed.
        """
        if isinstance(given, Group):
            return given
        raise TypeError(f"{self.name} has no groups of its own: a group is an mbn.Group, or None; not {given!r}.")

    def traced_replicas(self, key: str) -> Any:
        """Return the :class:`Replicas` of a step that a compiler traces, or None if it traces none.

        ``key`` is that of the layer's membership in ``LIVE``.
        """
        return None

    def register(self, layer_type: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:
        """Register a class of layers, once, when the first of them binds to this backend; for pytrees.

        ``flatten(layer)`` returns ``((params, state), rest)``, where the rest is hashable and comparable;
        ``unflatten(rest, (params, state))`` returns the layer again, for placeholders of the arrays too.
        """

    def parameter(self, value: Array, current: Array | None) -> Array:
        """Return an array that the framework's optimizers can train, with the values of ``value``, a layer's own.

        ``current`` is the parameter that it replaces; ``write`` decides whether ``current`` is written to instead.
        """
        return value

    def stores(self, before: State, after: State) -> bool:
        """Tell whether a layer with the state ``before`` is to store ``after``, the state after this training step.

        It is not, if the step repeats an earlier one, as in activation checkpointing.

        Raises:
            RuntimeError: ``after`` is traced, and the layer would keep it after the trace has ended.
        """
        self.finish(*after)
        return True

    def write(self, before: Held, after: Held) -> Held:
        """Return the arrays that a layer is to hold instead of ``before``: ``after``, or ``before`` with its values.

        ``before`` are arrays that others hold too: parameters, which optimizers may train, or statistics that are
        shared with a module that ``module`` made, or both. If a framework's arrays can be written to, and those that
        differ have the same shapes, dtypes and device, the values of ``after`` are written to ``before``, all or none
        of them even if interrupted, and ``before`` is returned.
        """
        return after

    def writing(self) -> AbstractContextManager[Any]:
        """Return a context that one thread at a time can enter; so no other thread reads arrays half written."""
        return Exclusive()

    def module(self, layer: Any, adopt: Callable[[Params, State], None]) -> Any:
        """Return a module of the framework with the same output as the layer (the capability ``modules``).

        It begins in the layer's mode and has ``train()`` and ``eval()``. Its parameters and statistics are attributes
        named as those of the layer, and the same arrays where arrays can be written to.

        Args:
            layer: the :class:`mbn.BatchNorm1d`.
            adopt: gives the layer other arrays, as they are, perhaps of another device or dtype.

        Raises:
            TypeError: the framework has no modules.
        """
        raise TypeError(f"{self.name} has no modules. Move the layer to a framework that has them: bn.to(backend=...).")
