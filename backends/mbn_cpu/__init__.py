"""Arithmetic on host memory, for every backend whose arrays lie there. No backend."""
