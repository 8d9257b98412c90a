"""Bugs in the exchange of arrays with other frameworks by DLPack."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from toy import Toy

from mbn.contract import Array


class ImportIgnoresStrides(Toy):
    def from_dlpack(self, x: Any) -> Array:
        return super().from_dlpack(x).ravel(order="K").reshape(x.shape)


class ImportConvertsToFloat32(Toy):
    def from_dlpack(self, x: Any) -> Array:
        return super().from_dlpack(x).astype(np.float32)


class ExportReversesRows(Toy):
    def exported(self, x: Array) -> AbstractContextManager[Array]:
        return nullcontext(x[::-1])


class ImportRejectsEveryArray(Toy):
    def from_dlpack(self, x: Any) -> Array:
        message = f"no {x.dtype} by DLPack"
        raise BufferError(message)


class ImportCallsAMissingMethod(Toy):
    def from_dlpack(self, x: Any) -> Array:
        return np.from_dlpak(x)


class ExportCallsAMissingMethod(Toy):
    def exported(self, x: Array) -> AbstractContextManager[Array]:
        return nullcontext(x.expotred())


BUGS = [
    (ImportRejectsEveryArray, "test_dlpack_exchange_keeps_values_and_device"),
    (ImportCallsAMissingMethod, "test_dlpack_exchange_keeps_values_and_device", "AttributeError"),
    (ExportCallsAMissingMethod, "test_dlpack_exchange_keeps_values_and_device", "AttributeError"),
    (ImportIgnoresStrides, "test_dlpack_exchange_keeps_values_and_device"),
    (ImportConvertsToFloat32, "test_dlpack_exchange_keeps_values_and_device"),
    (ExportReversesRows, "test_dlpack_exchange_keeps_values_and_device"),
]
"""Wrong backends, each with the test that must fail on it."""
