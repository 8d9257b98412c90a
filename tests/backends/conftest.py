"""What the tests of every backend draw from."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator of the same numbers for each test."""
    return np.random.default_rng(0)
