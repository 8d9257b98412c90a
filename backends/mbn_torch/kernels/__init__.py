"""Kernels of Torch tensors: traceable formulas, eager operations, NumPy arrays on the CPU, and Triton on GPUs."""
