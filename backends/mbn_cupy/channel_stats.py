"""The formulas on statistics of channels, of CuPy's arrays. Nothing waits for the GPU."""

import cupy

from mbn_common.channel_stats import Formulas

FORMULAS = Formulas(cupy, cupy.ndarray)
