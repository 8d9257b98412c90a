"""MLX's backend: its arrays and hooks. The arithmetic is that of ``mbn.array_api``."""
