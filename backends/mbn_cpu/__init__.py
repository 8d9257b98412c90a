"""Arithmetic on host memory, for every backend whose arrays lie there; no backend itself."""
