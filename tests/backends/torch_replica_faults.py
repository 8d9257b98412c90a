"""Faults and random steps of replicas in processes, many of them: ``python tests/backends/torch_replica_faults.py``."""

import argparse
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch_replica_steps as steps
from torch_world import Died, World

GRACE = 6.0
"""Seconds beyond the timeout of the group: two in which the missing rank is found, and four for a busy machine."""


def flaws(kind: str, number: int) -> list[str]:
    """Return what is wrong after a fault in one of 2 or 3 ranks: hangs, torn states, and errors that say nothing."""
    size, culprit = 2 + number % 2, number % (2 + number % 2)
    with World(size) as world:
        results = world.attempt(steps.fault, *([value] * size for value in (kind, culprit, number, number % 3 == 0)))
    found = []
    fails = {"refuse", "channels", "dtype", "too late"}  # others may come after the step
    for rank, result in enumerate(results):
        who = f"{kind} {number}, rank {rank} of {size}, culprit {culprit}"
        if isinstance(result, Died) and not (kind == "killed" and rank == culprit):
            found.append(f"{who}: {result}")
        if isinstance(result, BaseException):
            continue
        error, took, before, after, local = result
        if took > steps.SHORT + GRACE + 2 * steps.SHORT * (rank == culprit):
            found.append(f"{who}: took {took:.1f} s: {error}")
        if rank == culprit and "channels" in kind:
            before = after = local  # another number of channels, of which there is no local step
        is_old, is_new = (all(_near(after[key], other[key]) for key in after) for other in (before, local))
        if not (is_old or is_new):
            found.append(f"{who}: a torn state after {error}")
        if (error is None and kind in fails) or (error is not None and kind == "late"):
            found.append(f"{who}: {error}")
        if kind in fails and error is not None and not is_old:
            found.append(f"{who}: the state has changed: {error}")
    return found


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(found, expected, 1e-5, 1e-6))


def main() -> int:
    """Print the flaws after faults, and the differences after random steps; return the number of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for number in range(arguments.faults):
        kind = steps.FAULTS[number % len(steps.FAULTS)]
        counts[kind] += 1
        found = flaws(kind, number // len(steps.FAULTS))
        print(*found, sep="\n", end="\n" * bool(found), flush=True)
        wrong += found
    print(f"{dict(counts)}: {len(wrong)} flaws")
    differing = 0
    for size in (2, 3, 4):
        with World(size) as world:
            for seed in range(10):
                own: Any = [seed] * size, [-(-arguments.steps // 30)] * size
                bits = world.run(steps.random_steps, *own)
                differing += sum(other != bits[0] for other in bits)
    print(f"{arguments.steps} random steps on 2 to 4 ranks: {differing} ranks differ")
    return len(wrong) + differing


if __name__ == "__main__":
    sys.exit(main())
