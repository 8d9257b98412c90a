"""Every backend passes the conformance suite, each in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpus
import pytest
from nested import Nested

from mbn.conformance.plugin import AREAS

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent


def _before(folder: Path) -> str:
    """Return a PYTHONPATH that begins with a folder."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


SUMS = "(test_accuracy or test_gradients or test_masks or test_population) and not (any_eps or any_size) or 5x3"
"""The tests that JAX's lowering for GPUs can fail, since it adds in another order."""
PASSES = "test_accuracy or test_gradients or test_masks"
"""The tests of the passes over x, which JAX's programs on the CPU may leave to compiled loops for float32."""
LOOPS = {"PYTEST_PLUGINS": "jax_compiled_loops", "PYTHONPATH": _before(HERE)}
GPU_LAYOUT = {"PYTEST_PLUGINS": "jax_gpu_layout", "PYTHONPATH": _before(HERE)}
OPERATORS = {"PYTEST_PLUGINS": "torch_operators", "PYTHONPATH": _before(HERE)}
MLX_ON_GPU = {"PYTEST_PLUGINS": "mlx_gpu_numbers", "PYTHONPATH": _before(HERE)}
NARROW = "float32 or float16 or bfloat16"
"""The tests of one narrow dtype: a run in 32 bits has them."""
WIDE = "float64 or hypothesis or test_dtypes or test_agreement"
"""The tests to which 64 bits make a difference: those of float64, and those that choose the dtype themselves."""
IN_64_BITS = {"JAX_ENABLE_X64": "1"}


@pytest.mark.parametrize(
    ("backend", "environment", "chosen"),
    [
        ("numpy", {}, None),
        ("torch", {}, None),
        ("torch", OPERATORS, "compiled or traced"),
        ("jax", {}, None),
        ("jax", IN_64_BITS, WIDE),
        ("jax", LOOPS, f"({PASSES}) and float32 or test_transforms"),
        ("jax", LOOPS | IN_64_BITS, f"({PASSES}) and float32"),
        ("jax", GPU_LAYOUT, f"({SUMS}) and ({NARROW})"),
        ("jax", GPU_LAYOUT | IN_64_BITS, f"({SUMS}) and not ({NARROW})"),
        ("cupy", {"PYTHONPATH": _before(gpus.STANDINS)}, None),
        ("numba", {}, None),
        ("mlx", {}, None),
        (
            "mlx",
            MLX_ON_GPU,
            "test_accuracy or test_masks or test_gradients or test_transforms or test_population or test_chunked",
        ),
        ("strict", {}, None),
    ],
    ids=[
        *(
            "numpy",
            "torch",
            "torch's operators",
            "jax",
            "jax in 64 bits",
            "jax's loops",
            "the loops in 64 bits",
            "jax's layout for GPUs",
            "the same in 64 bits",
        ),
        *("cupy's stand-in", "numba", "mlx", "mlx without float64", "the plug-in"),
    ],
)
@pytest.mark.slow
def test_backend_conforms(
    backend: str, environment: dict[str, str], chosen: str | None, tmp_path: Path, nested: Nested
) -> None:
    report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
    command = [sys.executable, "-m", "mbn", "conform", backend, "--json", report, "--junit-xml", junit]
    options = ["--hypothesis-profile", "compiled"] * (backend == "jax") + ["-k", chosen or ""]
    run = nested([*command, *options], **environment)
    assert run.returncode == 0, run.stdout
    written = json.loads(report.read_text())
    areas, capabilities = written["areas"], written["backends"][backend]["capabilities"]
    assert tuple(areas) == AREAS
    asked = {name for name in areas if chosen is None or f"test_{name}" in chosen}
    passed = {name for name, area in areas.items() if area["passed"] > 0}
    if not any(capabilities[name] for name in ("autograd", "vmap", "jit", "compile")):
        asked.discard("transforms")
        assert "transforms" not in passed
    assert passed >= asked
    assert all(f"{backend} declares" in skip["reason"] for skip in written["skipped"])
    assert junit.read_text().startswith("<?xml")


@pytest.mark.parametrize("target", ["cupy", "torch:cuda", "jax:cuda"])
def test_gpu_conforms(target: str) -> None:
    if reason := gpus.missing(target.partition(":")[0]):
        pytest.skip(reason)
    run = subprocess.run([sys.executable, "-m", "mbn", "conform", target], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_runs_as_plain_pytest() -> None:
    command = [sys.executable, "-m", "pytest", "--pyargs", "mbn.conformance", "-p", "mbn.conformance.plugin"]
    options = ["--backend", "numpy", "-k", "rows_example", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "semantics  passed     1 passed" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "numpi"], "Did you mean 'numpy'"),
        (["--backend", "numpy:cuda"], "only device is 'cpu'"),
        ([], "needs --backend NAME; known backends: numpy"),
    ],
)
def test_wrong_backend_names_are_one_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "pytest", "--pyargs", "mbn.conformance", "-p", "mbn.conformance.plugin"]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert words in run.stderr
    assert "Traceback" not in run.stderr
