"""A plugin of pytest: MLX on the CPU computes as on a GPU, where it has no float64."""

from mbn import array_api

array_api.has_float64 = lambda _xp, _device: False
