"""The programs of docs/devices.md print the output that the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PAGE = (Path(__file__).parents[1] / "docs" / "devices.md").read_text()
TORCHRUN = "-m torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def output(*arguments: str) -> str:
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300, env=environment).stdout


def test_two_devices_of_jax() -> None:
    pytest.importorskip("jax")
    assert output("-c", "".join(blocks("python")[:2])) == "".join(blocks("text"))


def test_two_processes_of_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    script = tmp_path / "ddp.py"
    script.write_text(blocks("python")[2])
    _, *shown = blocks("console")[0].splitlines()
    assert output(*TORCHRUN.split(), str(script)).splitlines() == shown
