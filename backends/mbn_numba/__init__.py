"""The Numba backend of mbn."""
