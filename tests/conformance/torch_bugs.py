"""Bugs planted in the operators of Torch's backend, which compiled code calls for large batches.

``python torch_bugs.py FOLDER BUG...`` tries for each bug the test of the suite that must fail.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from planted import Bug, conform

from mbn.contract import Stats
from mbn_torch import operators


def statistics_as_constants() -> None:
    def unpacked(packed: torch.Tensor, _: Any) -> Stats:
        mean, *_, var = packed[:3] if len(packed) > 2 else packed
        return Stats(mean.float(), var.float(), None)  # in the form of running statistics

    operators._unpacked_values = unpacked


def changed_step(change: Any) -> None:
    """Plant a function from a batch and the results of its step in an operator to other results."""
    step = operators._step
    operators._step = lambda kernels, batch, *rest, **options: change(batch, *step(kernels, batch, *rest, **options))


def input_written_to(batch: Any, y: torch.Tensor, *rest: Any) -> Any:
    batch.x.copy_(y)
    return y, *rest


def first_state_forever() -> None:
    states: list[Any] = []

    def change(_: Any, y: torch.Tensor, state: Any, stats: Stats) -> Any:
        states.append(state)
        return y, states[0], stats

    changed_step(change)


_NAMED_BY = "test_compiled_steps_of_large_batches_are_accurate"

BUGS = {
    "constants": Bug(statistics_as_constants, _NAMED_BY),
    "input written to": Bug(partial(changed_step, input_written_to), _NAMED_BY),
    "first state": Bug(first_state_forever, _NAMED_BY),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("torch", {name: BUGS[name] for name in names}, Path(folder))
