"""JAX with several devices: shard_map and sharded arrays."""

import os
import subprocess
import sys
from pathlib import Path

import jax_samples  # noqa: F401 - without JAX there is nothing to test
import pytest


@pytest.mark.jax
def test_cases_on_two_devices_pass():
    # In another process, since the number of devices is fixed for a process.
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        Path(__file__).with_name("on_two_devices.py"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
