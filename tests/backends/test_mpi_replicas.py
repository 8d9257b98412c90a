"""Replicas over MPI: on_mpi.py in 2 to 4 processes on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mbn
from mbn.commands.bench.replicas import LOCAL, launcher
from mbn_cpu import group

HERE = Path(__file__).parent
PATIENCE = 300
"""Seconds that the ranks may take on busy cores."""


def mpiexec(size, *command, **environment):
    """Return the exit status and the output of a command in each of several ranks."""
    found = launcher(size)
    assert found, "mpi4py is installed, and no mpiexec: pip install mpich"
    paths = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [*found, sys.executable, *command],
        env=os.environ | LOCAL | {"PYTHONPATH": paths, "MBN_NUM_THREADS": "1", "MBN_GROUP_TIMEOUT": "30"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            process.terminate()  # which mpiexec passes on to the ranks
            process.wait(PATIENCE)
    return process.returncode, output


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.mpi4py
@pytest.mark.parametrize(("backend", "size"), [("numpy", 2), ("numba", 3), ("numpy", 4)])
def test_ranks_pass_their_tests(backend, size):
    status, output = mpiexec(size, HERE / "on_mpi.py", "-k", backend)
    assert status == 0, output
    assert output.count(" passed") == size


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_world_without_mpi4py_is_an_error_that_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'mbn-batchnorm[mpi]'")):
        mbn.BatchNorm1d(3, backend=name, group=True)(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon"])
def test_timeout_is_a_number_of_seconds_above_0(text, monkeypatch):
    monkeypatch.setenv("MBN_GROUP_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"MBN_GROUP_TIMEOUT is a number of seconds above 0, not {text!r}"):
        group.timeout()
    monkeypatch.setenv("MBN_GROUP_TIMEOUT", "1.5")
    assert group.timeout() == 1.5
