"""The compilation of the kernels in ``cuda/`` at their first call; CuPy keeps the compiled code on disk.

The files of ``cuda/`` are one source. For each combination of dtypes, items and weights it is compiled to a module with
all kernels, with these macros::

    Variant(value="float32", statistic="float32", channels=4, positions=1, weighted=False)
        -> -DVALUE=float32 -DSTATISTIC=float32 -DCHANNELS=4 -DPOSITIONS=1 -DWEIGHTED=0
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy

# In the order of their dependencies.
_FILES = (
    *("values.cuh", "threads.cuh", "merging.cuh", "channels.cuh"),
    *("moments.cu", "normalization.cu", "gradients.cu"),
)


class Variant(NamedTuple):
    """The macros of a compilation; see ``values.cuh`` and ``threads.cuh``."""

    value: str
    """The dtype of x, y and their gradients."""
    statistic: str
    """The dtype of weights, parameters and running statistics: float32 or float64."""
    channels: int
    positions: int
    """Channels and positions of the item that a thread reads at once; one of them is 1."""
    weighted: bool
    """Whether there are sample weights."""

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        macros = self._asdict() | {"weighted": int(self.weighted)}
        return "--std=c++17", *(f"-D{name.upper()}={value}" for name, value in macros.items())


def source() -> str:
    """Return the source of all kernels as one text, so that the compiler does not have to find files.

    The compiler's messages have the lines and names of the files.
    """
    folder = Path(__file__).with_name("cuda")
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in _FILES)


@cache
def kernel(name: str, variant: Variant) -> Any:
    """Return a kernel: a function of grid, block and arguments that launches it on the current device and stream."""
    return _module(variant).get_function(name)


@cache
def _module(variant: Variant) -> cupy.RawModule:
    return cupy.RawModule(code=source(), options=variant.options)
