"""Simulated device memory: aligned as CuPy's; it shows uninitialised reads and writes outside of an allocation."""

import itertools

import numpy as np

_ALIGNMENT = 512
_GUARD = 1 << 14
_NAN = 0xFFFF
_made = itertools.count()


class Memory:
    """A new allocation, full of NaN, between two guards that must not change.

    The pattern of two bytes is NaN in every precision, alone and repeated. Each allocation has another NaN in its
    guards, so that a NaN read past the end of one array is noticed when it is written past the end of another.
    """

    def __init__(self, size):
        guard = np.uint16(_NAN - 1 - next(_made) % 61).tobytes()
        self._bytes = np.empty(size + 2 * _GUARD + _ALIGNMENT, np.uint8)
        self._start = _GUARD + -(self._bytes.ctypes.data + _GUARD) % _ALIGNMENT
        stop = self._start + size
        self._bytes[self._start : stop] = _NAN & 0xFF
        self._guards = [(part, guard * (part.size // 2)) for part in (self._bytes[: self._start], self._bytes[stop:])]
        for part, expected in self._guards:
            part[: len(expected)] = np.frombuffer(expected, np.uint8)

    def array(self, shape, dtype, strides):
        return np.ndarray(shape, dtype, self._bytes, self._start, strides)

    def is_intact(self):
        """Return whether the guards are unchanged."""
        return all(part[: len(expected)].tobytes() == expected for part, expected in self._guards)


class Borrowed:
    """Memory of another owner, without guards."""

    def is_intact(self):
        return True


def allocated(shape, dtype, strides=None):
    """Return a NumPy array of NaN in a new allocation, and the allocation."""
    memory = Memory(int(np.prod(shape)) * dtype.itemsize)
    return memory.array(shape, dtype, strides), memory
