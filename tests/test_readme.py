"""The README's table of backends agrees with the capabilities that the backends declare."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpus
import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
DECLARED = "import json, sys, mbn; print(json.dumps(sorted(mbn.get_backend(sys.argv[1]).capabilities.dtypes)))"


def dtypes_in_the_table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `(\w+)` \|.*\|.*\|(.*)\|.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {name: sorted(re.findall(r"b?float\d+", dtypes)) for name, dtypes in rows}


def test_table_has_every_built_in_backend() -> None:
    assert list(dtypes_in_the_table()) == ["numpy", "torch", "jax", "cupy", "numba", "mlx"]


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "cupy", "mlx"])
def test_table_has_the_declared_dtypes(name: str) -> None:
    environment = {
        "JAX_ENABLE_X64": "1",  # the footnote on float64
        "PYTHONPATH": os.pathsep.join([str(gpus.STANDINS), *filter(None, sys.path)]),  # CuPy without a GPU
    }
    command = [sys.executable, "-c", DECLARED, name]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    assert dtypes_in_the_table()[name] == json.loads(run.stdout)
