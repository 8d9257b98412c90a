"""What ``import mbn`` costs a program, beyond NumPy's own import."""


def timeraw_import() -> tuple[str, str]:
    """Time the import in new processes."""
    return "import mbn", "import numpy"


timeraw_import.number = 1
timeraw_import.repeat = 10
timeraw_import.rounds = 1
timeraw_import.version = "1"
