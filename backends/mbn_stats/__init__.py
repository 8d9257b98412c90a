"""No backend: what those of NumPy, CuPy and Torch share of the arithmetic on statistics of channels."""
