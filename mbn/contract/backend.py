"""A backend: the three interfaces together."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeAlias

from mbn.contract.arrays import Arrays
from mbn.contract.integration import Integration
from mbn.contract.kernels import Kernels
from mbn.contract.values import Array, Batch, Stats

Operation: TypeAlias = Literal["train", "evaluate", "pullback", "moments"]
"""The operation that kernels are chosen for."""
_OF_VERSION_1 = {"moments", "normalize", "grad_sums", "grad_input", "batch_norm", "batch_norm_residuals", "pullback"}


class Backend(Arrays, Integration):
    """An array library, the kernels that compute on its arrays, and the hooks of its framework."""

    kernels: Kernels
    """The kernels of every call. With several, those whose formulas on vectors read the statistics of all others."""
    forward: Callable[..., tuple[Array, Any, Stats]]
    """``mbn.step.compose.forward``, bound by the framework."""
    pullback: Callable[..., tuple[Array, Array, Array]]
    """``mbn.step.compose.pullback``, bound by the framework."""

    # The frontend imports this package and not the reverse, so it sets these attributes.
    composition: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    """``forward`` and ``pullback`` of ``mbn.step.compose``."""
    named: ClassVar[Callable[[str], "Backend"]]
    """``mbn.registry.get_backend``."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class of version 1 of the contract, in which kernels were methods of the backend."""
        super().__init_subclass__(**options)
        own = [kind for kind in cls.__mro__ if not issubclass(Backend, kind)]
        if found := sorted(_OF_VERSION_1.intersection(*[{name for kind in own for name in vars(kind)}])):
            raise TypeError(
                f"{cls.__qualname__} is written for version 1 of mbn.contract: it has {', '.join(found)}. Move these "
                "to a subclass of mbn.contract.Kernels, and have the backend's attribute kernels be an instance of it; "
                "see 'From version 1 of the contract' in docs/backends.md."
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a backend, and bind ``forward`` and ``pullback`` to it."""
        backend = super().__new__(cls)
        backend.forward, backend.pullback = backend.bind(*cls.composition)
        return backend

    def kernels_for(
        self,
        operation: Operation,
        batch: Batch,
        other: Array | None = None,
        vectors: tuple[Any, ...] = (),
        size: int | None = None,
    ) -> tuple[Kernels, Batch]:
        """Return the kernels for one call, and its batch prepared for them.

        ``other`` is the other array in x's shape: ``out`` of a forward pass, if any, or ``dy``. ``vectors`` are the
        other operands: ``(params, state)``, or ``(weight, stats)`` of a pullback. ``size`` is the number of values of
        the array that x is a block of, or None: in evaluation a block has the bits of the whole array, so this size
        decides between kernels that differ in bits.
        """
        return self.kernels, batch

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name alone, since a process has one backend of each name."""
        return _named, (self.name,)

    def __deepcopy__(self, memo: object) -> Self:
        """Return the backend itself, which copies of a layer share."""
        return self


def _named(name: str) -> Backend:
    """Return the backend of a pickled name."""
    return Backend.named(name)
