"""The border: how arrays come to a framework and go back to the host, and where they are."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np

from mbn.contract.values import Array, Capabilities


class Arrays(ABC):
    """The arrays of one framework.

    Constructing one must raise where its framework cannot work (no GPU, say); the message reaches the user.
    """

    name: ClassVar[str]
    """The name under which it is registered."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do here and now."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The version of the framework."""

    @abstractmethod
    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is an array of this framework. Asked once for each class of array."""

    @abstractmethod
    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        """Bring an own array or host data (a NumPy array, nested lists, a number) to this framework.

        It may share memory with ``x``. ``"int64"`` may become int32 where the framework has no 64-bit integers.

        Raises:
            TypeError: the framework has no such dtype.
            ValueError: it has no such device.
        """

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Bring an own array to the host. It may share memory with ``x``."""

    def from_dlpack(self, x: Any) -> Array:
        """Return another framework's array, as its backend has ``exported`` it, as an own array in the same memory.

        Asked where that memory is on a device. Whatever is raised says that it cannot be: x then comes as a copy, which
        lies in order, and if that is refused too by way of the host.

        Source: the Python specification of DLPack, https://dmlc.github.io/dlpack/latest/python_spec.html.
        """
        raise BufferError(f"{self.name} takes no arrays by DLPack.")

    def exported(self, x: Array) -> AbstractContextManager[Any]:
        """Return a context in which ``x``, as what it gives, can be taken by ``from_dlpack`` of another backend."""
        return nullcontext(x)

    @abstractmethod
    def device(self, x: Array) -> Any:
        """Return where ``x`` lies, comparable with ``==``; None where that binds nobody: traced, or free to move."""

    def devices(self, x: Array) -> tuple[str, ...]:
        """Return the names of the devices that ``x`` is spread over, for messages; asked where ``device`` is None."""
        return ()

    @abstractmethod
    def copy(self, x: Array) -> Array:
        """Return a copy that changes with nothing else; of a parameter, one that nobody trains."""

    def flaw(self, name: str, x: Array) -> str | None:
        """Say why the kernels cannot read ``x``, an own array that is called ``name``; None if they can.

        This is not asked of the x that is normalised, nor of parameters and statistics in a call, where it would cost
        too much: there the kernels themselves raise a TypeError.
        """
        return None

    def conflict(self, out: Array, x: Array) -> str | None:
        """Say why the output of ``x`` cannot be written to ``out``, in the words that follow its name; None if it can.

        Asked where ``out`` is declared. An array in the shape, dtype and place of x can be written to if it is x itself
        or shares no memory with it, no two of its values share memory (``overlaps_itself``), and nobody forbids it: a
        read-only array, or one whose history is recorded.
        """
        return None

    @abstractmethod
    def within(self, values: Array, low: float, high: float) -> bool | None:
        """Tell whether ``low <= value < high`` holds for all values; None while they are being traced."""
