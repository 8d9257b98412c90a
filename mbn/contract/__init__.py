"""The contract of backends: arrays at the border, kernels that compute, and the hooks of its framework.

This package has to stay free of frameworks, and is all of mbn that a backend may import, with the values of mbn.state,
the number of mbn.threads and the arithmetic of mbn.array_api.
"""

from collections.abc import Callable
from typing import Any, Literal, Self, TypeAlias

from mbn.contract.arrays import Arrays
from mbn.contract.dtypes import dtype_name, layer_dtype, numpy_dtype
from mbn.contract.integration import Held, Integration
from mbn.contract.kernels import Kernels
from mbn.contract.replicas import Group, merged, summed
from mbn.contract.values import (
    Array,
    Batch,
    Capabilities,
    Moments,
    Stats,
    counted,
    overlaps_itself,
    transposed,
)

__all__ = [
    "Array",
    "Arrays",
    "Backend",
    "Batch",
    "Capabilities",
    "Group",
    "Held",
    "Integration",
    "Kernels",
    "Moments",
    "Operation",
    "Stats",
    "counted",
    "dtype_name",
    "layer_dtype",
    "merged",
    "numpy_dtype",
    "overlaps_itself",
    "summed",
    "transposed",
]

Operation: TypeAlias = Literal["train", "evaluate", "pullback", "moments"]
"""The purpose of a batch."""
_OF_VERSION_1 = {"moments", "normalize", "grad_sums", "grad_input", "batch_norm", "batch_norm_residuals", "pullback"}
_MOVED = {"Residuals": "Stats", "widened": "Batch.dtype"}
"""Names of version 1, and what there is in their place."""


def __getattr__(name: str) -> Any:
    """Say of a name of version 1 what has become of it."""
    if name in _MOVED:
        message = (
            f"{name} is of version 1 of mbn.contract; version 2 has {_MOVED[name]} in its place. "
            "See 'From version 1 of the contract' in docs/backends.md."
        )
        raise ImportError(message)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


class Backend(Arrays, Integration):
    """An array library, the kernels that compute on its arrays, and what its framework wants."""

    kernels: Kernels
    """The kernels of every call. Of several, one whose formulas on vectors read the statistics of the others."""
    forward: Callable[..., tuple[Array, Any, Stats]]
    """``mbn.step.compose.forward`` as the framework runs it."""
    pullback: Callable[..., tuple[Array, Array, Array]]
    """``mbn.step.compose.pullback`` as the framework runs it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class of the first contract, whose arithmetic was its own."""
        super().__init_subclass__(**options)
        own = [kind for kind in cls.__mro__ if not issubclass(Backend, kind)]
        if found := sorted(_OF_VERSION_1.intersection(*[{name for kind in own for name in vars(kind)}])):
            message = (
                f"{cls.__qualname__} is written for version 1 of mbn.contract: it has {', '.join(found)}. Move these "
                "to a subclass of mbn.contract.Kernels, and have the backend's attribute kernels be an instance of it; "
                "see 'From version 1 of the contract' in docs/backends.md."
            )
            raise TypeError(message)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: ARG004 - those of __init__
        """Make a backend, and bind to it what a step is made of."""
        from mbn.step import compose  # noqa: PLC0415 - which builds on this package

        backend = super().__new__(cls)
        backend.forward, backend.pullback = backend.bind(compose.forward, compose.pullback)
        return backend

    def kernels_for(
        self,
        operation: Operation,  # noqa: ARG002 - the signature for backends with several kernels
        batch: Batch,
        other: Array | None = None,  # noqa: ARG002
        vectors: tuple[Any, ...] = (),  # noqa: ARG002
    ) -> tuple[Kernels, Batch]:
        """Return the kernels for one call, and its batch as they read it.

        ``other`` is the other array in x's shape: ``out`` of a forward pass, if any, or ``dy``. ``vectors`` are all
        that the call reads beside: ``(params, state)``, or ``(weight, stats)`` of a pullback.
        """
        return self.kernels, batch

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a name: there is one backend of a name in a process."""
        from mbn.registry import get_backend  # noqa: PLC0415 - the registry builds on this module

        return get_backend, (self.name,)

    def __deepcopy__(self, memo: object) -> Self:
        """Be the same backend in a copied layer."""
        return self
