"""A second framework beside NumPy, for the frontend's tests: array_api_strict, which needs NumPy alone."""

import array_api_strict
import numpy as np

from mbn import registry

Array = type(array_api_strict.asarray(np.ones(1)))
asarray = array_api_strict.asarray
float64 = array_api_strict.float64
CPU = asarray(np.ones(1)).device
NAME = registry.owner_of(asarray(np.ones(1))).name
