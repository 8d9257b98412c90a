"""A subject of a benchmark has a process of its own and may change global settings; in these tests it has not."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _gradients_are_enabled_again() -> Iterator[None]:
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)
