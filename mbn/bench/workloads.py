"""What is measured, defined once for ``mbn bench`` and for asv: arrays, and what is done with them.

The numbers are the same on every run.
"""

import math
from typing import NamedTuple

import numpy as np

from mbn.usage import numpy_dtype

MODES = ("train", "eval", "backward")
"""A training step's forward pass, evaluation, and a training step forward and backward."""

SHAPES = ((32, 64), (1024, 256), (65536, 256), (1048576, 16), (4096, 64, 16), (256, 128, 1024))
"""What the project's own figures are taken on: what fits a core's caches, all caches, and neither; narrow and wide."""

_SMALLER = 16


class Workload(NamedTuple):
    """An input of batch normalisation."""

    shape: tuple[int, ...]
    """Of x: (N, C), (N, C, L), or with an axis of -1 (N, L, C)."""
    dtype: str = "float32"
    axis: int = 1
    """Where the channels are: 1 or -1."""
    masked: bool = False
    """Every third place holds no value."""
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

    def x(self) -> np.ndarray:
        """Return the input: N(0, 1)."""
        return self._array(0)

    def dy(self) -> np.ndarray:
        """Return a gradient of the output: N(0, 1) too, and laid out as x is."""
        return self._array(1)

    def mask(self) -> np.ndarray | None:
        """Return which places hold a value, (N,) or (N, L); None where all do."""
        if not self.masked:
            return None
        places = [size for axis, size in enumerate(self.shape) if axis != self.axis % len(self.shape)]
        return np.arange(np.prod(places)).reshape(places) % 3 > 0

    def smaller(self) -> "Workload":
        """Return the same with fewer rows: enough to do all that is done once, such as compiling."""
        rows = self.shape[0]
        return self._replace(shape=(max(rows // _SMALLER, min(rows, 2)), *self.shape[1:]))

    def _array(self, seed: int) -> np.ndarray:
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        x: np.ndarray = drawn.astype(numpy_dtype(self.dtype), copy=False)
        return x.swapaxes(-1, -2) if self.transposed else x
