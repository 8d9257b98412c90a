"""What hypothesis draws: inputs that are hard in the ways that inputs are.

Whatever makes a backend compile anew (shapes, eps, momentum) is drawn from short lists, so that a compiled backend can
be tested on many values in little time; the values themselves are drawn freely.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from mbn.contract import layer_dtype

SHAPES = [(2, 1), (3, 4), (7, 3), (64, 5), (257, 2), (1, 3, 2), (3, 4, 5), (2, 1, 33), (16, 2, 9)]
LAYOUTS = ["C", "Fortran", "strided", "reversed", "read-only", "broadcast"]
PATTERNS = ["normal", "outlier first", "constant", "ramp", "two values"]
EPS = [0.0, 1e-12, 1e-5, 1e-3, 1.0]
MOMENTA = [0.0, 0.1, 0.25, 0.9, 1.0]

_HALVES = {"float16", "bfloat16"}


class Batch(NamedTuple):
    """An input on the host, with the dtype of a layer that takes it."""

    x: np.ndarray
    dtype: str
    layer_dtype: str


@st.composite
def batches(draw: st.DrawFn, dtypes: frozenset[str], shape: tuple[int, ...] | None = None) -> Batch:
    """Draw an input of one of ``dtypes``: its shape, pattern, offset, scale and memory layout."""
    dtype = draw(st.sampled_from(sorted(dtypes)))
    shape = shape or draw(st.sampled_from(SHAPES))
    half = dtype in _HALVES  # few digits and, in float16, a short range
    offset = draw(st.sampled_from([0.0, 1.0, -30.0] if half else [0.0, 1.0, -1e2, 1e4, -1e6]))
    scale = draw(st.sampled_from([0.25, 1.0, 4.0] if half else [1e-3, 1.0, 1e3]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = offset + scale * _pattern(draw(st.sampled_from(PATTERNS)), shape, generator)
    return Batch(laid_out(values.astype(dtype), draw(st.sampled_from(LAYOUTS))), dtype, layer_dtype(dtype))


def _pattern(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    normal = generator.standard_normal(shape)
    if name == "outlier first":
        normal[0] += 100
    elif name == "constant":
        normal = np.broadcast_to(normal[:1, :, ...].mean(axis=tuple(range(2, len(shape))), keepdims=True), shape).copy()
    elif name == "ramp":
        normal = np.sort(normal, axis=0)
    elif name == "two values":
        normal = np.where(normal > 0, 1.0, -1.0)
    return normal


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """Return the same values in another memory layout; a broadcast input repeats its first row."""
    if layout == "Fortran":
        return np.asfortranarray(x)
    if layout == "strided":
        return np.repeat(x, 2, axis=0)[::2]
    if layout == "reversed":
        return x[::-1].copy()[::-1]
    if layout == "broadcast":
        return np.broadcast_to(x[:1], x.shape)
    if layout == "read-only":
        x.flags.writeable = False
    return x
