"""From ``kernels.cu`` to functions, compiled when they are first called; CuPy keeps what was compiled on disk."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy

SOURCE = Path(__file__).with_name("kernels.cu")


class Variant(NamedTuple):
    """What the compiler is told; see the source."""

    value: str
    statistic: str
    channels: int
    places: int
    weighted: bool

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        told = self._replace(weighted=int(self.weighted))._asdict()
        return "--std=c++17", *(f"-D{name.upper()}={value}" for name, value in told.items())
        return "--std=c++17", *(
            f"-D{name.upper()}={int(v) if isinstance(v, int) else v}" for name, v in self._asdict().items()
        )


@cache
def kernel(name: str, variant: Variant) -> Any:
    """Return a kernel: a function of grid, block and arguments, on the current device and stream."""
    return _module(variant).get_function(name)


@cache
def _module(variant: Variant) -> cupy.RawModule:
    return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=variant.options)
