"""What every test file shares: a registry that is as it was before each test."""

from collections.abc import Iterator

import pytest

import mbn
from mbn import registry


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MBN_BACKEND", raising=False)
    for table in ("_registered", "_loaded", "_owners"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    yield
    mbn.set_default_backend(None)
