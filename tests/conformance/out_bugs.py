"""Bugs in the output to an array of the caller's (``out=``)."""

from itertools import pairwise
from typing import Any

import numpy as np
from toy import Toy, ToyKernels

from mbn.contract import Array, Batch, Params, Stats


class OutForgotten(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        return super().normalize(batch, stats, params, eps)


class OutClearedFirst(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        if out is not None:
            out[...] = 0
        return super().normalize(batch, stats, params, eps, out)


class OutInTheOrderOfX(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        y = super().normalize(batch, stats, params, eps)
        if out is None:
            return y
        out.ravel(order="K")[...] = y.ravel(order="K")
        return out


class MaskForgottenInOut(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        batch = batch if out is None else batch._replace(sample_weight=None)
        return super().normalize(batch, stats, params, eps, out)


class OverlapNotSeen(Toy):
    def conflict(self, out: Array, x: Array) -> str | None:
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


class OutOfHalvesWidened(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        y = super().normalize(batch, stats, params, eps)
        if out is None:
            return y
        out[...] = y * (1 + 2 * np.finfo(y.dtype).eps) if y.dtype == np.float16 else y
        return out


class InputWrittenBesideOut(ToyKernels):
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Any = None) -> Array:
        y = super().normalize(batch, stats, params, eps, out)
        if out is not None:
            batch.x[...] = y
        return y


BUGS = [
    (OutForgotten, "test_out_is_written_to_if_declared_and_rejected_otherwise"),
    (OutClearedFirst, "test_out_may_be_x"),
    (OutInTheOrderOfX, "test_output_is_written_to_out"),
    (MaskForgottenInOut, "test_output_is_written_to_out"),
    (OverlapNotSeen, "test_out_that_overlaps_x_is_rejected"),
    (OverlapWithItselfNotSeen, "test_out_that_overlaps_itself_is_rejected"),
    (OverlapByStepsNotSeen, "test_out_that_overlaps_itself_is_rejected"),
    (RowsBetweenRowsRefused, "test_out_may_have_interleaved_rows", "ValueError: out overlaps itself"),
    (OutOfHalvesWidened, "test_out_may_have_any_dtype_of_x"),
    (InputWrittenBesideOut, "test_output_is_written_to_out"),
]
"""Wrong backends, each with the test that must fail on it."""
