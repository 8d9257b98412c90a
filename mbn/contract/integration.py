"""The hooks of a framework in batch normalisation and layers. Each does nothing unless a backend says otherwise."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

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
        """Return the two functions of ``mbn.step.compose`` as the framework runs them: recorded, or compiled.

        It is called once, when the backend is made and before its own ``__init__``.
        """
        return forward, pullback

    def constant(self, x: Array) -> Array:
        """Return ``x`` itself, or what shares its memory, as a constant to differentiation.

        Its statistics hold on to nothing that ``x`` was computed from.
        """
        return x

    def finish(self, *values: Any) -> None:
        """Have arrays, numbers, or statistics in the backend's own form computed now.

        A framework that computes lazily has to do so, or it would keep all that they are made of. ``fit`` asks it for
        the statistics of each batch, before the next batch is made, and ``stores`` for the state after a step, whose
        graph would grow with every step. The graph of an output is its caller's.
        """

    def register(self, layer_type: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:
        """Learn of a class of layers, once, when the first of them binds to this backend.

        ``flatten(layer)`` gives ``((params, state), rest)``, where the rest is hashable and comparable;
        ``unflatten(rest, (params, state))`` gives a layer again, whatever stands for the arrays.
        """

    def parameter(self, value: Array, current: Array | None) -> Array:
        """Return an array that the framework's optimizers can train, with the values of ``value``, a layer's own.

        ``current`` is the parameter that it takes the place of; ``write`` decides whether that stays.
        """
        return value

    def stores(self, before: State, after: State) -> bool:
        """Tell whether a layer that held ``before`` is to hold ``after`` from this training step on.

        It is not where the step repeats an earlier one, whose activations were not kept.

        Raises:
            RuntimeError: ``after`` is part of a trace that ends before the layer does.
        """
        self.finish(*after)
        return True

    def write(self, before: Held, after: Held) -> Held:
        """Return what a layer is to hold in the place of ``before``, where somebody else holds that too: ``after``.

        ``before`` are parameters, which optimizers may train, or statistics that are shared with a module that
        ``module`` made, or both. Where arrays can be written to, and those that differ have the same shapes, dtypes and
        device, they are written to, all or none of them even if interrupted, and ``before`` is returned.
        """
        return after

    def writing(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread is in one: what ``write`` writes to is seen before or after."""
        return Exclusive()

    def module(self, layer: Any, adopt: Callable[[Params, State], None]) -> Any:
        """Return a module of the framework's own kind that does what the layer does (``modules``).

        It begins in the layer's mode and has ``train()`` and ``eval()``. Its parameters and statistics are attributes
        named as those of the layer, and the same arrays where arrays can be written to.

        Args:
            layer: the :class:`mbn.BatchNorm1d`.
            adopt: makes the layer hold other arrays, of another device or dtype maybe, as they are.

        Raises:
            TypeError: the framework has no modules.
        """
        raise TypeError(f"{self.name} has no modules. Move the layer to a framework that has them: bn.to(backend=...).")
