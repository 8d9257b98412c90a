"""The CuPy backend of mbn."""
