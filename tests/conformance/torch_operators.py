"""A plugin of pytest with which compiled Torch calls operators for batches of every size."""

import mbn
from mbn_torch import operators

mbn.get_backend("torch")
operators.FEW = 0
