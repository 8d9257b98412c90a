"""Shared by all tests: the registry is restored after each test, and unexpected skips fail where CI asks for it."""

import os
import re
from collections.abc import Generator, Iterator
from typing import Any

import frameworks
import pytest
from nested import nested  # noqa: F401 - a fixture

import mbn
from mbn import registry

NO_OTHERS = "MBN_NO_UNEXPECTED_SKIPS"
"""The environment variable with which unexpected skips fail; CI sets it where everything is installed."""
EXPECTED_SKIPS = {
    r"(cupy|torch|jax) finds no GPU": "CI has none; who has one runs these tests with it",
    r"there is a GPU": "the counterpart of these tests",
    r"the GPU has too little memory free": "it may be in use",
    r"this processor rounds differently": "the recorded bits are those of processors with FMA3 and AVX2",
    r"compiled for one card": "the others differ in nothing that the test looks at",
    r"ray is not installed": "it has no package for some versions of Python",
    r"this is no repository": "the tests of a wheel run away from the source",
    r"(jax|mlx|strict) has no arrays that are not contiguous": "a workload of mbn bench that is none for them",
    r"(jax takes no float64|strict takes no float16) here": "the same",
    r"(torch\.nn\.BatchNorm1d|the formula) takes no masks": "the same, for the peers",
    r"no step of nnx\.BatchNorm with a mask or float64 is measured": "the same",
}
"""Regular expressions that match the start of a reason, and why such a skip is right."""


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers, and keep what JAX compiles from one run and process to the next: it takes most of the time."""
    config.addinivalue_line("markers", "slow: takes more than a second or two")
    config.addinivalue_line("markers", "processes: starts processes of its own")
    for framework in frameworks.FRAMEWORKS:
        config.addinivalue_line("markers", f"{framework}: needs {framework}")
    # JAX adds a note to errors, which doctest compares instead of the message before Python 3.11.4.
    os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")
    if hasattr(config, "cache") and not hasattr(config, "workerinput"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a framework; begin with those that take minutes, so that none of them ends alone."""
    for item in items:
        frameworks.mark(item)
    items.sort(key=lambda item: "nested" not in getattr(item, "fixturenames", ()))


def unexpected(report: Any) -> str | None:
    """Return the reason of an unexpected skip of a test or a file, or None."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    return None if any(re.match(expected, reason) for expected in EXPECTED_SKIPS) else reason


def _refuse(report: Any) -> Any:
    reason = unexpected(report) if os.environ.get(NO_OTHERS) else None
    if reason is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped, which tests/conftest.py does not expect: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Let a test fail that is skipped unexpectedly."""
    return _refuse((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Let a file fail that is skipped unexpectedly."""
    return _refuse((yield))


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MBN_BACKEND", raising=False)
    for table in ("_registered", "_loaded", "_owners"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    yield
    mbn.set_default_backend(None)
