"""The cost of ``import mbn``, which is almost nothing beyond NumPy, since it imports no framework."""

import subprocess
import sys

IMPORTS = 10

_BEYOND_NUMPY = """
import sys
from time import perf_counter

import numpy

start = perf_counter()
import mbn

elapsed = perf_counter() - start
frameworks = {"torch", "jax", "cupy", "numba"} & sys.modules.keys()
if frameworks:
    sys.exit(f"import mbn imported {', '.join(frameworks)}")
print(elapsed)
"""


def timeraw_import() -> str:
    """Time the import in a new process, NumPy's part included."""
    return "import mbn"


def track_import_beyond_numpy() -> float:
    """Return the shortest time of several processes, in seconds; fail where a framework was imported."""
    return min(_beyond_numpy() for _ in range(IMPORTS))


track_import_beyond_numpy.unit = "seconds"


def _beyond_numpy() -> float:
    child = subprocess.run([sys.executable, "-c", _BEYOND_NUMPY], capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr)
    return float(child.stdout)
