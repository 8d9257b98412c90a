"""Measurements as strict JSON, with the versions and the machine."""

import json
import os
import platform
from typing import Any

import numpy as np

import mbn
from mbn.commands.processes import NotRun


def to_json(record: dict[str, Any]) -> str:
    """Return a record as a JSON document, with the versions and the machine."""
    environment = {
        "versions": {"mbn": mbn.__version__, "python": platform.python_version(), "numpy": np.__version__},
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
    }
    return json.dumps(environment | record, indent=2, allow_nan=False) + "\n"


def not_run(outcome: NotRun) -> dict[str, str]:
    """Return the record of a backend or peer that did not run."""
    return {"status": "failed" if outcome.broken else "cannot run", "why": outcome.why}
