"""The programs of docs/devices.md print the output that the page shows."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PAGE = (Path(__file__).parents[1] / "docs" / "devices.md").read_text()
ON_TWO_DEVICES = "".join(
    block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    if "jax.jit" in block and "sys.argv" not in block
)
SECONDS = 300
"""A limit, which a program that waits for another would reach."""


def program(name: str, folder: Path) -> tuple[str, list[str]]:
    """Write a program of the page to a file; return its path, and the lines that the page shows."""
    found = re.search(rf"`{name}`:\n\n```python\n(.*?)^```$.*?^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no {name}"
    (folder / name).write_text(found[1])
    return str(folder / name), found[2].splitlines()[1:]


def started(*command: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def output(*commands: tuple[str, ...]) -> list[str]:
    """Return the lines that commands print, which run at the same time."""
    children = [started(*command) for command in commands]
    try:
        lines = [line for child in children for line in child.communicate(timeout=SECONDS)[0].splitlines()]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children)
    return lines


def test_two_devices_of_jax() -> None:
    pytest.importorskip("jax")
    shown = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert output((sys.executable, "-c", ON_TWO_DEVICES)) == "".join(shown).splitlines()


def test_two_processes_of_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    path, shown = program("hosts.py", tmp_path)
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = str(chosen.getsockname()[1])
    lines = output(*((sys.executable, path, rank, port) for rank in "01"))
    assert [line for line in lines if "Gloo" not in line] == shown


def test_two_processes_of_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    path, shown = program("ddp.py", tmp_path)
    rendezvous = "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"
    run = sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *rendezvous
    assert output((*run, path)) == shown


def test_two_processes_of_mpi(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert mpiexec, "there is no mpiexec: pip install mpich"
    path, shown = program("replicas.py", tmp_path)
    assert output((mpiexec, "-n", "2", sys.executable, path)) == shown
