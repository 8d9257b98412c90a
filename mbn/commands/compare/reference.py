"""The exact results of an example, by the conformance suite's oracle.

The oracle takes its own training steps, and rounds its running statistics to the layer's dtype after each step as any
layer does. Evaluation starts from the same statistics in the reference and on every backend: otherwise one ulp of a
large running mean, a harmless error, would count as thousands of ulp in the output.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mbn.commands.compare.examples import Example
from mbn.commands.compare.messages import QUANTITIES
from mbn.conformance import oracle
from mbn.conformance.ulp import Exact

_VALUES = 2**20
"""Values of x between two reports of progress, about half a second of work."""


class Reference(NamedTuple):
    """The exact results of an example."""

    exact: dict[str, Exact]
    """By quantity."""
    statistics: tuple[np.ndarray, np.ndarray]
    """The running mean and variance to evaluate with."""


def reference(example: Example, advance: Callable[[int], object] = lambda _: None) -> Reference:
    """Return the exact results of a layer on an example.

    Args:
        example: the layer and its input.
        advance: called after each group of channels with the number of its values.
    """
    c, size = example.x.shape[1], example.x.size
    shapes = example.x.shape, example.x.shape, (c,), (c,)
    exact = {
        quantity: Exact(*(np.empty(shape) for _ in Exact._fields))
        for quantity, shape in zip(QUANTITIES, shapes, strict=True)
    }
    mean, var = np.zeros_like(example.weight), np.ones_like(example.weight)
    group = max(1, _VALUES * c // size)
    for channels in (slice(start, start + group) for start in range(0, c, group)):
        x, weight, bias = example.x[:, channels], example.weight[channels], example.bias[channels]
        start = mean[channels], var[channels]
        step = oracle.train_often(example.steps, x, *start, weight, bias, example.momentum, example.eps)
        mean[channels], var[channels] = step.running_mean.hi, step.running_var.hi
        if example.statistics is not None:
            mean[channels], var[channels] = example.statistics
        evaluated = oracle.evaluate(x, mean[channels], var[channels], weight, bias, eps=example.eps)
        for whole, part in zip(exact.values(), (step.y, evaluated, *step[1:]), strict=True):
            index = (slice(None), channels) if part.hi.ndim > 1 else channels
            for target, values in zip(whole, part, strict=True):
                target[index] = values
        advance(x.size)
    return Reference(exact, (mean, var))
