"""Bugs planted in the fused steps that take Torch's tensors by their addresses: absent weights and vectors.

``python address_bugs.py FOLDER BUG...`` tries for each bug the test of the suite that must fail.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planted import Bug, conform

from mbn_cpu.kernels import numba_loops


def without(loop: str, index: int) -> Callable[[], None]:
    """Return a function that gives a loop the address 0 as an argument."""
    found = getattr(numba_loops, loop)

    def called(*arguments: Any) -> Any:
        return found(*arguments[:index], 0, *arguments[index + 1 :])

    return lambda: setattr(numba_loops, loop, called)


BUGS = {
    "weights absent in training": Bug(without("train_at", 2), "test_masked_values_reach_no_output_or_statistic"),
    "weights absent in evaluation": Bug(without("normalize_at", 2), "test_masked_outputs_are_zero"),
    "weights absent in gradients": Bug(without("pull_back_at", 3), "test_pullback_with_masks_is_accurate"),
    "bias absent in training": Bug(without("train_at", 9), "test_training_is_accurate"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("torch", {name: BUGS[name] for name in names}, Path(folder))
