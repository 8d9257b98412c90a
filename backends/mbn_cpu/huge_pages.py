"""Memory that a framework allocates, in huge pages.

Most of the time that a large new array takes is for the faults of its pages, which are 512 times fewer when these are
huge. NumPy asks for them itself; whoever else allocates does it here, after the allocation and before the first write.
"""

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

_LARGE = 1 << 22
"""Bytes from which on it pays, as NumPy has it."""


def advise(address: int, size: int) -> None:
    """Ask for huge pages where the system has them and ``size`` bytes at ``address`` are worth it."""
    if size < _LARGE or (madvise := _madvise()) is None:
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    madvise(start, (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the call of the system, None where there is none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
