"""Bugs in what is handed over by another framework."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from toy import Toy

from mbn.contract import Array


class HandedOverWithoutStrides(Toy):
    def from_dlpack(self, x: Any) -> Array:
        return super().from_dlpack(x).ravel(order="K").reshape(x.shape)


class HandedOverInWords(Toy):
    def from_dlpack(self, x: Any) -> Array:
        return super().from_dlpack(x).astype(np.float32)


class ExportedInReverse(Toy):
    def exported(self, x: Array) -> AbstractContextManager[Array]:
        return nullcontext(x[::-1])


class NothingHandedOver(Toy):
    def from_dlpack(self, x: Any) -> Array:
        message = f"no {x.dtype} by DLPack"
        raise BufferError(message)


class HandedOverByAMethodThatIsNotThere(Toy):
    def from_dlpack(self, x: Any) -> Array:
        return np.from_dlpak(x)


class ExportedByAMethodThatIsNotThere(Toy):
    def exported(self, x: Array) -> AbstractContextManager[Array]:
        return nullcontext(x.expotred())


BUGS = [
    (NothingHandedOver, "test_dlpack_exchange_keeps_values_and_device"),
    (HandedOverByAMethodThatIsNotThere, "test_dlpack_exchange_keeps_values_and_device", "AttributeError"),
    (ExportedByAMethodThatIsNotThere, "test_dlpack_exchange_keeps_values_and_device", "AttributeError"),
    (HandedOverWithoutStrides, "test_dlpack_exchange_keeps_values_and_device"),
    (HandedOverInWords, "test_dlpack_exchange_keeps_values_and_device"),
    (ExportedInReverse, "test_dlpack_exchange_keeps_values_and_device"),
]
"""Backends, and the tests that have to name what is wrong with them."""
