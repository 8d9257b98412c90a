"""The strategies of hypothesis: inputs that are hard for batch normalisation.

Arguments that make a backend compile anew (shapes, eps, momentum) are drawn from short lists, so that a compiled
backend can be tested on many values in little time; the values themselves are drawn freely.
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

EXTREMES = {
    "float16": [1e-6, 6e4],
    "bfloat16": [1e-40, 1e-20, 1e20, 3e38],
    "float32": [1e-40, 1e-33, 1e-20, 1e19, 1e30, 3e38],
    "float64": [1e-310, 1e-200, 1e-150, 1e150, 1e200, 1e308],
}
"""By dtype: sizes of values whose squares, roots, quotients or sums leave its range."""

_HALVES = {"float16", "bfloat16"}


class Batch(NamedTuple):
    """An input on the host, with the dtype of a layer that takes it."""

    x: np.ndarray
    dtype: str
    layer_dtype: str


class Masking(NamedTuple):
    """The mask arguments of a call, and the weights that follow from them."""

    arguments: dict[str, np.ndarray]
    """Arguments of the call: mask, lengths, sample_weight."""
    weights: np.ndarray
    """The weight of each cell: (N,) for an x of (N, C), (N, L) for one of (N, C, L)."""

    def counted(self, x: np.ndarray) -> np.ndarray:
        """Return for each value of ``x``, in its shape, whether its weight is above 0."""
        return np.broadcast_to(np.expand_dims(self.weights > 0, 1), x.shape)

    def poisoned(self, x: np.ndarray, poison: float = np.nan) -> np.ndarray:
        """Return ``x`` with ``poison`` in all cells of weight 0."""
        return np.where(self.counted(x), x, np.asarray(poison, x.dtype))


def maskings(cells: tuple[int, ...], seed: int = 0) -> dict[str, Masking]:
    """Return one masking of each kind, by name, for an x with ``cells``: (N,) of an (N, C), (N, L) of an (N, C, L)."""
    if len(cells) == 1:
        of_columns = maskings((*cells, 1), seed).items()
        return {
            name: Masking({key: values.reshape(cells) for key, values in arguments.items()}, weights[:, 0])
            for name, (arguments, weights) in of_columns
            if "lengths" not in arguments
        }
    n, length = cells
    generator = np.random.default_rng(seed)
    mask = generator.choice([True, True, False], cells)
    rows = generator.permutation(np.arange(n) % 3 > 0)
    lengths = generator.permutation(np.arange(n) % (length + 1))
    within = np.arange(length) < lengths[:, None]
    counts = generator.integers(0, 4, cells)
    reals = generator.uniform(0.1, 3, cells).astype(np.float32)
    of_rows = generator.uniform(0.1, 3, n).astype(np.float32)
    ones, rows_of_ones = np.ones(cells), np.ones((1, length))
    return {
        "mask": Masking({"mask": mask}, ones * mask),
        "mask of rows": Masking({"mask": rows}, rows[:, None] * rows_of_ones),
        "lengths": Masking({"lengths": lengths}, ones * within),
        "whole weights": Masking({"sample_weight": counts}, ones * counts),
        "real weights": Masking({"sample_weight": reals}, ones * reals),
        "weights of rows": Masking({"sample_weight": of_rows}, of_rows[:, None] * rows_of_ones),
        "mask and weights": Masking({"mask": mask, "sample_weight": of_rows}, of_rows[:, None] * mask * ones),
        "all three": Masking(
            {"mask": rows, "lengths": lengths, "sample_weight": reals}, rows[:, None] * within * reals * ones
        ),
        "nothing masked": Masking({"mask": mask | True}, ones),
    }


def of_any_size(shape: tuple[int, ...], dtype: str, size: float, seed: int = 0) -> np.ndarray:
    """Return values of three channels: one of ``size``, one of about 1, and one of ``size`` with a small variance."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(-1, 1, shape)
    values[:, 0] *= size
    values[:, 2] = size * (0.75 + 2.0 ** (-4 if dtype in _HALVES else -12) * values[:, 2])
    return values.astype(dtype)


@st.composite
def batches(draw: st.DrawFn, dtypes: frozenset[str], shape: tuple[int, ...] | None = None) -> Batch:
    """Draw an input of one of ``dtypes``: its shape, pattern, offset, scale and memory layout."""
    dtype = draw(st.sampled_from(sorted(dtypes)))
    shape = shape or draw(st.sampled_from(SHAPES))
    half = dtype in _HALVES  # few digits and, in float16, a short range
    offset = draw(st.sampled_from([0.0, 1.0, -30.0] if half else [0.0, 1.0, -1e2, 1e4, -1e6]))
    scale = draw(st.sampled_from([0.25, 1.0, 4.0] if half else [1e-3, 1.0, 1e3]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = offset + scale * pattern(draw(st.sampled_from(PATTERNS)), shape, generator)
    return Batch(laid_out(values.astype(dtype), draw(st.sampled_from(LAYOUTS))), dtype, layer_dtype(dtype))


def pattern(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return values of one of the ``PATTERNS``, most of a size of about 1."""
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
