"""A backend: the three interfaces together."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeAlias

from mbn.contract.arrays import Arrays
from mbn.contract.integration import Integration
from mbn.contract.kernels import Kernels
from mbn.contract.values import Array, Batch, Stats

Operation: TypeAlias = Literal["train", "evaluate", "pullback", "moments"]
"""The purpose of a batch."""
_OF_VERSION_1 = {"moments", "normalize", "grad_sums", "grad_input", "batch_norm", "batch_norm_residuals", "pullback"}


class Backend(Arrays, Integration):
    """An array library, the kernels that compute on its arrays, and what its framework wants."""

    kernels: Kernels
    """The kernels of every call. Of several, one whose formulas on vectors read the statistics of the others."""
    forward: Callable[..., tuple[Array, Any, Stats]]
    """``mbn.step.compose.forward`` as the framework runs it."""
    pullback: Callable[..., tuple[Array, Array, Array]]
    """``mbn.step.compose.pullback`` as the framework runs it."""

    # The frontend builds on this package, so it says itself what a backend needs of it.
    composition: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    """``forward`` and ``pullback`` of ``mbn.step.compose``."""
    named: ClassVar[Callable[[str], "Backend"]]
    """``mbn.registry.get_backend``."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class of the first contract, whose arithmetic was its own."""
        super().__init_subclass__(**options)
        own = [kind for kind in cls.__mro__ if not issubclass(Backend, kind)]
        if found := sorted(_OF_VERSION_1.intersection(*[{name for kind in own for name in vars(kind)}])):
            raise TypeError(
                f"{cls.__qualname__} is written for version 1 of mbn.contract: it has {', '.join(found)}. Move these "
                "to a subclass of mbn.contract.Kernels, and have the backend's attribute kernels be an instance of it; "
                "see 'From version 1 of the contract' in docs/backends.md."
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a backend, and bind to it what a step is made of."""
        backend = super().__new__(cls)
        backend.forward, backend.pullback = backend.bind(*cls.composition)
        return backend

    def kernels_for(
        self, operation: Operation, batch: Batch, other: Array | None = None, vectors: tuple[Any, ...] = ()
    ) -> tuple[Kernels, Batch]:
        """Return the kernels for one call, and its batch as they read it.

        ``other`` is the other array in x's shape: ``out`` of a forward pass, if any, or ``dy``. ``vectors`` are all
        that the call reads beside: ``(params, state)``, or ``(weight, stats)`` of a pullback.
        """
        return self.kernels, batch

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a name: there is one backend of a name in a process."""
        return _named, (self.name,)

    def __deepcopy__(self, memo: object) -> Self:
        """Be the same backend in a copied layer."""
        return self


def _named(name: str) -> Backend:
    """Return the backend that was pickled."""
    return Backend.named(name)
