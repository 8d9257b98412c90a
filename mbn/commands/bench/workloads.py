"""The workloads of ``mbn bench`` and of asv: the arrays, and the modes in which a layer is called on them.

The values are the same in every process.
"""

import math
from typing import NamedTuple

import numpy as np

from mbn.commands.options import numpy_dtype

MODES = ("train", "eval", "backward")
"""A training step's forward pass, evaluation, and a training step forward and backward."""
FORWARD = ("train", "eval")
PULLBACK = "pullback"
"""The backward pass of a training step alone, which is measured only if the user names it."""
PASSES = {"train": 3, "eval": 2, "backward": 8, PULLBACK: 5}
"""The passes of each mode over memory of x's size, where that is larger than any cache.

Training reads x twice and writes y once; evaluation does each once; a backward pass reads dy and x twice and writes dx.
"""

SHAPES = ((32, 64), (1024, 256), (65536, 256), (1048576, 16), (4096, 64, 16), (256, 128, 1024))
"""The shapes of the project's own figures: within a core's caches, within all caches, and beyond; narrow and wide."""

_SMALLER = 16
_DRAWN = 2**25
"""The most random values; they repeat after these, since more would take longer than the measurement."""


class Workload(NamedTuple):
    """An input of batch normalisation."""

    shape: tuple[int, ...]
    """Of x: (N, C), (N, C, L), or with an axis of -1 (N, L, C)."""
    dtype: str = "float32"
    axis: int = 1
    """The axis of the channels: 1 or -1."""
    masked: bool = False
    """Every third position holds no value."""
    transposed: bool = False
    """x is not contiguous in memory: its last two axes are stored the other way round."""

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.shape[self.axis]

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of x in bytes."""
        return self.size * numpy_dtype(self.dtype).itemsize

    def x(self) -> np.ndarray:
        """Return the input: N(0, 1)."""
        return self._array(0)

    def dy(self) -> np.ndarray:
        """Return a gradient of the output: N(0, 1) too, in the memory order of x."""
        return self._array(1)

    def mask(self) -> np.ndarray | None:
        """Return the mask, (N,) or (N, L), or None."""
        if not self.masked:
            return None
        shape = [size for axis, size in enumerate(self.shape) if axis != self.axis % len(self.shape)]
        return np.arange(np.prod(shape)).reshape(shape) % 3 > 0

    def smaller(self) -> "Workload":
        """Return the same with fewer rows, on which work that happens once, compilation say, can be done."""
        rows = self.shape[0]
        return self._replace(shape=(max(rows // _SMALLER, min(rows, 2)), *self.shape[1:]))

    def _array(self, seed: int) -> np.ndarray:
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        size = min(self.size, _DRAWN)
        drawn = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
        values: np.ndarray = drawn.astype(numpy_dtype(self.dtype), copy=False)
        x = values.reshape(shape) if size == self.size else np.resize(values, shape)
        return x.swapaxes(-1, -2) if self.transposed else x
