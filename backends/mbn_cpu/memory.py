"""The allocation of large arrays with few page faults.

A large new array takes most of its time for page faults: the system clears its pages one by one. Two measures help:

- The C library of Linux returns blocks above a threshold to the system when they are freed, so the next block has new
  pages again. The threshold rises with the largest block freed so far, up to 32 MiB. So a block below that limit is
  allocated and freed once, before the first output above the threshold; it is never written to, so it takes no pages.
- Huge pages are 512 times fewer. NumPy requests them itself; for memory that a framework allocates, this module
  requests them, after the allocation and before the first write.
"""

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import numpy as np

_THRESHOLD = 1 << 17
"""The initial threshold, in bytes, above which freed blocks are returned to the system."""
_FREED = 24 << 20
"""Bytes of the block that is freed to raise the threshold."""
LARGE = 1 << 22
"""Bytes from which on huge pages are faster: NumPy's own limit."""


def empty_like(x: np.ndarray) -> np.ndarray:
    """Return a new array in the shape, dtype and memory order of x."""
    if x.nbytes > _THRESHOLD:
        _raise_threshold()
    return np.empty_like(x)


@cache
def _raise_threshold() -> None:
    np.empty(_FREED, np.uint8)


def advise(address: int, size: int) -> None:
    """Request huge pages for ``size`` bytes at ``address``, if these are many and the system has huge pages."""
    if size > _THRESHOLD:
        _raise_threshold()
    if size < LARGE or (madvise := _madvise()) is None:
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    madvise(start, (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's ``madvise``, or None where there is none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
