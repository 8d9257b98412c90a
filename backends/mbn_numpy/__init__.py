"""The NumPy backend of mbn."""
