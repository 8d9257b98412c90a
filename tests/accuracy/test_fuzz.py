"""A few cases of the fuzz, on backends where a case takes milliseconds. ``fuzz.py`` tries more, and compiles on JAX."""

import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest

import mbn

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_fuzz_finds_no_violation_of_the_bounds(backend: str) -> None:
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), backend, "--cases", "400"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == f"{backend}: 400 cases, 0 with violations"


def test_seed_always_gives_the_same_case() -> None:
    first, again = (fuzz.drawn(7, ["float16", "float32"]) for _ in range(2))
    assert str(first) == str(again)
    np.testing.assert_array_equal(first.x, again.x)


@pytest.mark.parametrize(("name", "factor"), [("normalize", 1 + 1e-6), ("grad_input", 1 + 1e-5)])
def test_fuzz_finds_a_small_error_in_a_pass(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    backend = mbn.get_backend("numpy")
    # Every step is composed of passes, so that it calls the wrong one.
    monkeypatch.setattr(type(backend), "kernels_for", lambda self, _, batch, *others: (self.kernels, batch))
    right = getattr(type(backend.kernels), name)

    def wrong(*arguments: object, **options: object) -> np.ndarray:
        result = right(*arguments, **options)
        return (result.astype(np.float64) * factor).astype(result.dtype)

    def count() -> int:
        with np.errstate(all="ignore"):
            return sum(bool(fuzz.violations(backend, fuzz.drawn(seed, ["float32"]))) for seed in range(30))

    assert count() == 0
    monkeypatch.setattr(type(backend.kernels), name, wrong)
    assert count() > 0
