"""New arrays whose memory costs less than the arithmetic on it.

Most of the time that a large new array takes is for the faults of its pages, which the system clears one by one.

- The C library of Linux hands blocks above a threshold back to the system as they are freed, and the pages of the next
  one are new again. The threshold follows the largest block freed so far, up to 32 MiB. So a block below that is freed
  once, before the first output above the threshold; nobody has touched it, so it never had a page.
- Huge pages are 512 times fewer. NumPy asks for them itself; for memory that a framework allocates they are asked for
  here, after the allocation and before the first write.
"""

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import numpy as np

_THRESHOLD = 1 << 17
"""Bytes above which blocks go back to the system in the beginning."""
_FREED = 24 << 20
_LARGE = 1 << 22
"""Bytes from which on huge pages pay, as NumPy has it."""


def empty_like(x: np.ndarray) -> np.ndarray:
    """Return a new array in the shape, dtype and memory order of x."""
    if x.nbytes > _THRESHOLD:
        _raise_threshold()
    return np.empty_like(x)


@cache
def _raise_threshold() -> None:
    np.empty(_FREED, np.uint8)


def advise(address: int, size: int) -> None:
    """Ask for huge pages where the system has them and ``size`` bytes at ``address`` are worth it."""
    if size > _THRESHOLD:
        _raise_threshold()
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
