"""Wrong derivatives, planted in Torch's backend: outputs and statistics stay as they are.

``python derivative_bugs.py FOLDER BUG...`` runs for each bug the test of the suite that has to name it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from planted import Bug, conform

from mbn_torch.backend import TorchBackend


def added(power: int) -> Callable[[], None]:
    """Return what plants a term of which only the derivative of this order is not 0."""

    def plant() -> None:
        whole = TorchBackend.batch_norm

        def batch_norm(self: TorchBackend, x: torch.Tensor, *args: Any, **settings: Any) -> Any:
            y, state = whole(self, x, *args, **settings)
            return y + (x - x.detach()) ** power, state

        TorchBackend.batch_norm = batch_norm

    return plant


def masked_values_differentiated() -> None:
    whole = TorchBackend.batch_norm

    def batch_norm(self: TorchBackend, x: torch.Tensor, *args: Any, **settings: Any) -> Any:
        y, state = whole(self, x, *args, **settings)
        if settings["weights"] is not None:
            # Nothing of a masked value is left, but for the 0 * NaN in the derivative of its square.
            y = y + 0 * torch.where(settings["weights"][:, None] > 0, x**2, 0)
        return y, state

    TorchBackend.batch_norm = batch_norm


def statistics_differentiated() -> None:
    whole = TorchBackend.batch_norm

    def batch_norm(self: TorchBackend, x: torch.Tensor, *args: Any, **settings: Any) -> Any:
        y, state = whole(self, x, *args, **settings)
        return y, state._replace(running_mean=state.running_mean + (x - x.detach()).mean((0, 2)))

    TorchBackend.batch_norm = batch_norm


BUGS = {
    "first": Bug(added(1), "test_gradient_is_that_of_the_pullback"),
    "second": Bug(added(2), "test_both_modes_at_once"),
    "third in reverse": Bug(added(3), "test_third_derivatives_in_reverse"),
    "third forwards": Bug(added(3), "test_third_derivatives_forwards"),
    "masked": Bug(masked_values_differentiated, "test_gradient_is_that_of_the_pullback"),
    "statistics": Bug(statistics_differentiated, "test_running_statistics_are_constants"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    torch.func.jvp(torch.func.grad(torch.sin), (torch.ones(()),), (torch.ones(()),))  # imports the rest of Torch
    conform("torch", {name: BUGS[name] for name in names}, Path(folder))
