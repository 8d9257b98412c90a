"""Bugs planted in Numba's fused steps: what they do with sample weights, and what they allocate.

``python numba_bugs.py FOLDER BUG...`` tries for each bug the test of the suite that must fail.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from planted import Bug, conform

from mbn.contract import Stats
from mbn_cpu.channel_stats import Pair
from mbn_cpu.kernels import numba_loops, numba_steps

_WEIGHTS = {"train": 1, "normalize_by": 1, "pull_back": 2}
"""The index of the weights among the arguments of a loop."""


def unweighted(loop: str) -> Callable[[], None]:
    """Return a function that makes a loop count every value once."""
    found, index = getattr(numba_loops, loop), _WEIGHTS[loop]

    def called(*arguments: Any) -> Any:
        return found(*arguments[:index], numba_steps.NO_VECTOR, *arguments[index + 1 :])

    return lambda: setattr(numba_loops, loop, called)


def counted_as_values() -> None:
    """Take the number of values for the sum of the weights."""

    def statistics_of(found: np.ndarray, weights: Any, count: float) -> Stats:
        return Stats(Pair(found[0], found[1]), found[2], int(count) if weights is None else weights.size)

    numba_steps.statistics_of = statistics_of


def learnt_from_nothing() -> None:
    """Move the running statistics by a batch without a variance too."""
    train = numba_loops.train

    def called(*arguments: Any) -> Any:
        count, (*_, share, _, _, new, found) = train(*arguments), arguments
        for row, running, value in zip(new, arguments[9:11], (found[0] + found[1], found[2]), strict=True):
            row[:] = (1 - share) * running + share * value if count == 0 else row
        return count

    numba_loops.train = called


def kept_for_the_next_step() -> None:
    """Write the statistics of every step to the same memory."""
    kept: dict[Any, np.ndarray] = {}
    empty = np.empty

    class Numpy:
        """NumPy, with memory that lasts from call to call."""

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
            return kept.setdefault((shape, dtype), empty(shape, dtype))

    numba_steps.np = Numpy()


BUGS = {
    "weights ignored in training": Bug(unweighted("train"), "test_masked_values_reach_no_output_or_statistic"),
    "weights ignored in evaluation": Bug(unweighted("normalize_by"), "test_masked_outputs_are_zero"),
    "weights ignored in gradients": Bug(unweighted("pull_back"), "test_pullback_with_masks"),
    "masked values counted": Bug(counted_as_values, "test_pullback_with_masks"),
    "statistics of nothing": Bug(learnt_from_nothing, "test_fully_masked_batch_gives_zeros_and_keeps_the_statistics"),
    "memory of two steps": Bug(kept_for_the_next_step, "test_pullback_gives_the_same_after_changes_of_the_layer"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("numba", {name: BUGS[name] for name in names}, Path(folder))
