"""The programs of docs/larger.md print the output that the page shows."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mbn

pytestmark = pytest.mark.processes

PAGE = (Path(__file__).parents[1] / "docs" / "larger.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"`(\S+\.py)`:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SHOWN = {
    command: lines.splitlines()
    for command, lines in re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
SECONDS = 120
"""A limit, which a program that waits for another would reach."""


@pytest.fixture
def in_folder(tmp_path):
    """Return a function that checks what commands print, in a folder with the programs of the page."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def check(commands):
        lines = []
        for command in commands.split("; "):
            python, *arguments = command.split()
            assert python == "python"
            lines += output([sys.executable, *arguments], cwd=tmp_path, env=environment)
        assert lines == SHOWN[commands]

    return check


def output(command, **options):
    """Return the lines that a command prints; end it, and all processes that it has started, after a time."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)
    try:
        lines = child.communicate(timeout=SECONDS)[0].splitlines()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.returncode == 0
    return lines


def test_population_by_concurrent_futures(in_folder):
    in_folder("python parts.py; python with_futures.py")


def test_population_by_joblib(in_folder):
    pytest.importorskip("joblib")
    in_folder("python parts.py; python with_joblib.py")


@pytest.mark.slow
def test_population_by_ray(in_folder):
    pytest.importorskip("ray")
    in_folder("python parts.py; python with_ray.py")


def test_layer_over_xarray(in_folder):
    pytest.importorskip("xarray")
    pytest.importorskip("dask")
    in_folder("python with_xarray.py")


def test_layer_over_small_blocks_of_xarray_has_the_bits_of_the_whole_call_and_of_this_moment():
    pytest.importorskip("dask.array")
    xarray = pytest.importorskip("xarray")
    x = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    bn = mbn.BatchNorm1d(64).fit(x, progress=False).eval()
    blocks = xarray.DataArray(x, dims=("time", "band")).chunk({"time": 100})
    dims = {"input_core_dims": [["band"]], "output_core_dims": [["band"]]}
    whole, y = bn(x), xarray.apply_ufunc(bn, blocks, dask="allowed", **dims)
    assert y.chunks == blocks.chunks
    bn.reset_running_stats()
    np.testing.assert_array_equal(y.values, whole)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_program_of_the_page_is_executed(name):
    assert any(name in command for command in SHOWN), f"the page shows no command with {name}"
