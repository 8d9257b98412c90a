"""The peak of a process's memory during a call, beyond its memory before and the arrays that the call returns."""

import ctypes
import gc
import re
from pathlib import Path

from mbn.commands.bench.calls import Call, output_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def beyond_arrays(call: Call) -> int | None:
    """Make a call, and return the growth of this process's memory during it in bytes, less the call's outputs.

    Resident pages are counted: their highest number during the call (``VmHWM``, which is reset before), less their
    number before the call (``VmRSS``), less the bytes (``nbytes``) of all arrays that it returns. So temporaries count,
    and so do new buffers that are kept for later calls; inputs and outputs do not. Memory that earlier calls have freed
    is returned to the system first, where the C library can do that (glibc): otherwise a call could use it uncounted.
    Outputs may still lie in memory that was there before, so a result below 0 is taken as 0.

    Returns:
        Bytes; None on systems other than Linux, which do not tell.
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
