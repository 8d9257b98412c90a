"""Fixtures for the tests of every backend."""

import importlib
import sys

import numpy as np
import pytest
from gpus import STANDINS

from mbn import registry


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a random generator, with the same seed for each test."""
    return np.random.default_rng(0)


@pytest.fixture
def cupy(monkeypatch):
    """Replace CuPy by its stand-in, and restore the modules after the test."""

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupyx", "cuda_on_host", "mbn_cupy")]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(STANDINS)
    registry._forget("cupy")
    yield importlib.import_module("cupy")
    registry._forget("cupy")
    for name in ours():
        del sys.modules[name]
