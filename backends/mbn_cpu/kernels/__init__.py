"""Kernels on host memory: the passes over x and whole steps, in NumPy and in loops that Numba compiles."""
