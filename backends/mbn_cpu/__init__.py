"""Arithmetic on host memory, for every backend whose arrays lie there; no backend itself.

Fresh outputs should not mean fresh pages. The C library of Linux hands blocks above a threshold back to the system as
they are freed, and the system clears every page of the next one, which takes several times as long as to normalise it.
The threshold follows the largest block freed so far, up to 32 MiB. So a block below that is freed here, once; nobody
has touched it, so it never had a page.
"""

import numpy as np

np.empty(24 << 20, np.uint8)
