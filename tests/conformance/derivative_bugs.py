"""Wrong derivatives, planted in Torch's backend, which leave outputs and statistics right.

``python derivative_bugs.py FOLDER BUG...`` tries for each bug the test of the suite that must fail.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from planted import Bug, conform

import mbn
from mbn.contract import Batch, Kernels, State


def change(changed: Callable[..., Any]) -> None:
    """Plant ``changed``, a function from a batch and the result of its step to another result."""
    backend = mbn.get_backend("torch")
    forward = backend.forward

    def step(kernels: Kernels, batch: Batch, *args: Any) -> Any:
        return changed(batch, *forward(kernels, batch, *args))

    backend.forward = step


def added(power: int) -> Callable[[], None]:
    """Return a function that plants a term whose derivatives are 0 except that of the order ``power``."""

    def changed(batch: Batch, y: torch.Tensor, *rest: Any) -> Any:
        return y + (batch.x - batch.x.detach()) ** power, *rest

    return partial(change, changed)


def masked_values_differentiated(batch: Batch, y: torch.Tensor, *rest: Any) -> Any:
    if batch.sample_weight is not None:
        # The term is 0, but the derivative of a masked value's square contains 0 * NaN.
        y = y + 0 * torch.where(batch.sample_weight[:, None] > 0, batch.x**2, 0)
    return y, *rest


def statistics_differentiated(batch: Batch, y: torch.Tensor, state: State, stats: Any) -> Any:
    mean = state.running_mean + (batch.x - batch.x.detach()).mean((0, 2))
    return y, state._replace(running_mean=mean), stats


BUGS = {
    "first": Bug(added(1), "test_grad_and_pullback_are_accurate"),
    "second": Bug(added(2), "test_mixed_mode_derivatives_are_accurate"),
    "third in reverse": Bug(added(3), "test_third_derivatives_in_reverse_mode_are_accurate"),
    "third forwards": Bug(added(3), "test_third_derivatives_in_forward_mode_are_accurate"),
    "masked": Bug(partial(change, masked_values_differentiated), "test_grad_and_pullback_are_accurate"),
    "statistics": Bug(partial(change, statistics_differentiated), "test_running_statistics_have_no_derivative"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    torch.func.jvp(torch.func.grad(torch.sin), (torch.ones(()),), (torch.ones(()),))  # imports the rest of Torch
    conform("torch", {name: BUGS[name] for name in names}, Path(folder))
