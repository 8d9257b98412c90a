"""From ``cuda/`` to functions, compiled when they are first called; CuPy keeps what was compiled on disk."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy

_FILES = (
    *("values.cuh", "threads.cuh", "merging.cuh", "channels.cuh"),
    *("moments.cu", "normalization.cu", "gradients.cu"),
)


class Variant(NamedTuple):
    """What the compiler is told; see ``values.cuh`` and ``threads.cuh``."""

    value: str
    statistic: str
    channels: int
    positions: int
    weighted: bool

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        told = self._asdict() | {"weighted": int(self.weighted)}
        return "--std=c++17", *(f"-D{name.upper()}={value}" for name, value in told.items())


def source() -> str:
    """Return the source of all kernels, in one piece: then no compiler has to find a file."""
    folder = Path(__file__).with_name("cuda")
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in _FILES)


@cache
def kernel(name: str, variant: Variant) -> Any:
    """Return a kernel: a function of grid, block and arguments, on the current device and stream."""
    return _module(variant).get_function(name)


@cache
def _module(variant: Variant) -> cupy.RawModule:
    return cupy.RawModule(code=source(), options=variant.options)
