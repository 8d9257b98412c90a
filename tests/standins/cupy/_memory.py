"""Pretended device memory: it lies as CuPy's does, and shows who reads what nobody wrote or writes outside of it."""

import itertools

import numpy as np

_ALIGNMENT = 512
_GUARD = 1 << 14
_NAN = 0xFFFF
_made = itertools.count()


class Memory:
    """A new allocation: NaN, between two guards which have to stay as they are.

    Two bytes at a time are NaN in each precision, alone and with others. The NaN of the guards are not those of other
    allocations: one that is read past the end of one array and is written past the end of another shows.
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

    def is_whole(self):
        """Return whether nobody has written to the guards."""
        return all(part[: len(expected)].tobytes() == expected for part, expected in self._guards)


class Borrowed:
    """Memory of somebody else, which has no guards."""

    def is_whole(self):
        return True


def allocated(shape, dtype, strides=None):
    """Return a NumPy array of NaN in memory of its own, and that memory."""
    memory = Memory(int(np.prod(shape)) * dtype.itemsize)
    return memory.array(shape, dtype, strides), memory
