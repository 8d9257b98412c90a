"""A subject of a benchmark has a process of its own, and sets there what it likes; in these tests it has not."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _autograd_is_back() -> Iterator[None]:
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)
