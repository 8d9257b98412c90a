"""The time that ``import mbn`` takes in a new process, beyond NumPy's own import."""

import sys


def timeraw_import() -> tuple[str, str]:
    """Time the import in new processes."""
    # asv tells this process alone where the commit's mbn lies.
    return "import mbn", f"import sys; sys.path[:] = {sys.path}; import numpy"


timeraw_import.number = 1
timeraw_import.repeat = 10
timeraw_import.rounds = 1
timeraw_import.version = "1"
