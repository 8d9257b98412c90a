"""Kernels on host memory: the passes over x and fused steps, in NumPy and in loops that Numba compiles."""
