"""The border: the conversion of arrays to a framework and back to the host, and their devices."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np

from mbn.contract.values import Array, Capabilities


class Arrays(ABC):
    """The arrays of one framework.

    The constructor must raise where the framework cannot work, without a GPU for example; the message reaches the user.
    """

    name: ClassVar[str]
    """The name under which the backend is registered."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """The capabilities of this backend on this machine, in this process."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The version of the framework."""

    @abstractmethod
    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is an array of this framework. It is called once for each class of array."""

    @abstractmethod
    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        """Return an array of this framework from one, or from host data (a NumPy array, nested lists, a number).

        The result may share memory with ``x``. ``"int64"`` may become int32 where the framework has no 64-bit integers.

        Raises:
            TypeError: the framework has no such dtype.
            ValueError: the framework has no such device.
        """

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Return an own array as a NumPy array. The result may share memory with ``x``."""

    def from_dlpack(self, x: Any) -> Array:
        """Return another framework's array, as its backend has ``exported`` it, as an own array in the same memory.

        It is called for memory on a device. If it raises anything, it is called again with a copy of x, whose memory
        is contiguous; if it raises again, the array is converted by way of the host.

        Source: the Python specification of DLPack, https://dmlc.github.io/dlpack/latest/python_spec.html.
        """
        raise BufferError(f"{self.name} takes no arrays by DLPack.")

    def exported(self, x: Array) -> AbstractContextManager[Any]:
        """Return a context whose value is ``x`` as another backend's ``from_dlpack`` can take it."""
        return nullcontext(x)

    @abstractmethod
    def device(self, x: Array) -> Any:
        """Return the device of ``x``, comparable with ``==``; None where any device will do, as for a traced array."""

    def devices(self, x: Array) -> tuple[str, ...]:
        """Return the names of the devices that ``x`` is spread over, for messages, where ``device`` returns None."""
        return ()

    @abstractmethod
    def copy(self, x: Array) -> Array:
        """Return a copy that shares no memory; the copy of a parameter is an array that no optimizer trains."""

    def flaw(self, name: str, x: Array) -> str | None:
        """Return the reason why the kernels cannot read ``x``, an own array that messages call ``name``, or None.

        It is not called for the x that is normalised, nor for parameters and statistics in a call, where it would take
        too long: there the kernels themselves raise a TypeError.
        """
        return None

    def conflict(self, out: Array, x: Array) -> str | None:
        """Return the reason why the output of ``x`` cannot be written to ``out``, None if it can.

        The reason continues a sentence that begins with "out". This is called where ``out`` is declared. An array of
        the shape, dtype and device of x can be written to if it is x itself or shares no memory with it, if no two of
        its values share memory (``overlaps_itself``), and if it is neither read-only nor recorded by autograd.
        """
        return None

    def concatenated(self, parts: Sequence[Any]) -> Any:
        """Return vectors, sequences of numbers and arrays of one number as one vector in float64, for a group.

        It is an array of the framework on the device of the arrays, or a NumPy array.
        """
        arrays = [self.to_numpy(part) if self.owns(part) else np.asarray(part) for part in parts]
        return np.concatenate([array if array.ndim else array[None] for array in arrays], dtype=np.float64)

    @abstractmethod
    def within(self, values: Array, low: float, high: float) -> bool | None:
        """Tell whether ``low <= value < high`` holds for all values; None while they are being traced."""
