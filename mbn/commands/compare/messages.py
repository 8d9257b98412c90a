"""The messages between the processes of a comparison: plain data."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from mbn.commands.compare.examples import Example
from mbn.commands.processes import NotRun

QUANTITIES = ("train_output", "eval_output", "running_mean", "running_var")
"""The results that are compared."""


class Job(NamedTuple):
    """The question to a backend: to run an example."""

    example: Example
    statistics: tuple[np.ndarray, np.ndarray]
    """The running mean and variance to evaluate with."""


class Measured(NamedTuple):
    """The answer of a backend that ran."""

    version: str
    device: str
    arrays: Mapping[str, np.ndarray]
    """By quantity."""
    seconds: Mapping[str, float]
    """The time of a call, by mode: train, eval."""


Outcome: TypeAlias = Measured | NotRun
