"""The truth for an example, by the conformance suite's oracle.

The oracle follows its own training steps, rounding its running statistics to the layer's dtype after each step as any
layer must. Evaluation starts from the same statistics on the reference and on every backend: otherwise one ulp of a
large running mean, which is no error to speak of, would pass for thousands in the output.
"""

from typing import NamedTuple

import numpy as np

from mbn.commands.compare.examples import Example
from mbn.conformance import oracle
from mbn.conformance.ulp import Exact


class Reference(NamedTuple):
    """What an example gives, exactly."""

    exact: dict[str, Exact]
    """By quantity."""
    statistics: tuple[np.ndarray, np.ndarray]
    """The running mean and variance to evaluate with."""


def reference(example: Example) -> Reference:
    """Return what a layer must give on an example."""
    x, weight, bias, eps = example.x, example.weight, example.bias, example.eps
    mean, var = np.zeros_like(weight), np.ones_like(weight)
    for _ in range(example.steps):
        step = oracle.train(x, mean, var, weight, bias, momentum=example.momentum, eps=eps)
        mean, var = (exact.hi.astype(weight.dtype) for exact in (step.running_mean, step.running_var))
    if example.statistics is not None:
        mean, var = (np.full_like(weight, value) for value in example.statistics)
    exact = {
        "train_output": step.y,
        "eval_output": oracle.evaluate(x, mean, var, weight, bias, eps=eps),
        "running_mean": step.running_mean,
        "running_var": step.running_var,
    }
    return Reference(exact, (mean, var))
