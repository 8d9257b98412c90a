"""The formulas on the statistics of channels, for CuPy arrays. No formula waits for the GPU."""

import cupy

from mbn_common.channel_stats import Formulas

FORMULAS = Formulas(cupy, cupy.ndarray)
