"""The JAX backend of mbn."""
