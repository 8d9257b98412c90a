"""The peak of a process's memory, beyond what it holds before a call and the arrays that the call returns."""

import ctypes
import gc
import re
from pathlib import Path

from mbn.commands.bench.calls import Call, output_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def beyond_arrays(call: Call) -> int | None:
    """Make a call, and return by how many bytes the memory of this process grew meanwhile, less the call's outputs.

    What is counted are resident pages: the highest number of them during the call (``VmHWM``, which is reset before),
    less that before the call (``VmRSS``), less the bytes (``nbytes``) of all arrays that it returns. So temporaries
    count, and so does what is kept for later calls and was not there before; inputs and outputs don't. What earlier
    calls have freed is given back to the system first where the C library can do that (glibc), or a call could take it
    unnoticed. Where outputs still take memory that was there, they take less than their size; 0 is the least result.

    Returns:
        Bytes; None where the system does not say, which is everywhere but on Linux.
    """
    _give_back()
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    before = _bytes("VmRSS")
    outputs = output_bytes(call())
    return int(max(0, _bytes("VmHWM") - before - outputs))


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
