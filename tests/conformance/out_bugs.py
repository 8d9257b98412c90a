"""Bugs in what is written to an array of the caller's."""

from itertools import pairwise
from typing import Any

import numpy as np
from toy import Toy

from mbn.contract import Array


class OutForgotten(Toy):
    def normalize(self, x: Array, *args: Any, out: Any = None) -> Array:  # noqa: ARG002 - the bug
        return super().normalize(x, *args)


class OutClearedFirst(Toy):
    def normalize(self, x: Array, *args: Any, out: Any = None) -> Array:
        if out is not None:
            out[...] = 0
        return super().normalize(x, *args, out=out)


class OutInTheOrderOfX(Toy):
    def normalize(self, x: Array, *args: Any, out: Any = None) -> Array:
        y = super().normalize(x, *args)
        if out is None:
            return y
        out.ravel(order="K")[...] = y.ravel(order="K")
        return out


class MaskForgottenInOut(Toy):
    def normalize(self, x: Array, *args: Any, out: Any = None) -> Array:
        if out is None:
            return super().normalize(x, *args)
        *vectors, _ = args
        return super().normalize(x, *vectors, None, out=out)


class OverlapNotSeen(Toy):
    def conflict(self, out: Array, x: Array) -> str | None:  # noqa: ARG002 - the bug
        return None


class OverlapWithItselfNotSeen(Toy):
    def conflict(self, out: Array, x: Array) -> str | None:
        return super().conflict(out, x) if np.shares_memory(out, x) else None


class OverlapByStepsNotSeen(Toy):
    def conflict(self, out: Array, x: Array) -> str | None:
        return super().conflict(out, x) if 0 in out.strides else None


class RowsBetweenRowsRefused(Toy):
    def conflict(self, out: Array, x: Array) -> str | None:
        steps = sorted(zip(out.strides, out.shape, strict=True))
        if any(step < before * size for (before, size), (step, _) in pairwise(steps)):
            return "overlaps itself"
        return super().conflict(out, x)


class OutOfHalvesWidened(Toy):
    def normalize(self, x: Array, *args: Any, out: Any = None) -> Array:
        y = super().normalize(x, *args)
        if out is None:
            return y
        out[...] = y * (1 + 2 * np.finfo(y.dtype).eps) if y.dtype == np.float16 else y
        return out


class InputWrittenBesideOut(Toy):
    def normalize(self, x: Array, *args: Any, out: Any = None) -> Array:
        y = super().normalize(x, *args, out=out)
        if out is not None:
            x[...] = y
        return y


BUGS = [
    (OutForgotten, "test_what_is_declared_is_true"),
    (OutClearedFirst, "test_out_may_be_x"),
    (OutInTheOrderOfX, "test_output_is_written_to_out"),
    (MaskForgottenInOut, "test_output_is_written_to_out"),
    (OverlapNotSeen, "test_out_that_overlaps_x_is_refused"),
    (OverlapWithItselfNotSeen, "test_out_that_overlaps_itself_is_refused"),
    (OverlapByStepsNotSeen, "test_out_that_overlaps_itself_is_refused"),
    (RowsBetweenRowsRefused, "test_out_with_rows_between_its_rows"),
    (OutOfHalvesWidened, "test_out_has_any_dtype_of_x"),
    (InputWrittenBesideOut, "test_output_is_written_to_out"),
]
"""Backends, and the tests that have to name what is wrong with them."""
