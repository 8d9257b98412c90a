"""A layer on each backend: how fast it is, what a call costs, what memory it takes, and how far it is from the truth.

One process per backend takes all figures, once, before asv asks for the single ones.
"""

import json
import os
import subprocess
import sys

from . import _worker
from ._worker import COPY, MODES, QUANTITIES, SHAPES, TINY, Figures, key

BACKENDS = ["numpy", "numba", "torch", "jax"]
_SECONDS = 300
"""The most seconds that a backend may take."""

All = dict[str, tuple[Figures, dict[str, str]]]
"""By backend: its figures, and the reasons of those that are missing."""


class _Layer:
    param_names = ("backend", "mode")
    timeout = len(BACKENDS) * _SECONDS
    kind = "seconds"
    version = "1"

    def setup_cache(self) -> All:
        return {name: _measured(name) for name in (*BACKENDS, COPY)}

    def setup(self, found: All, name: str, *parameters: str) -> None:
        figures, missing = found[name]
        wanted = key(self.kind, *parameters)
        if wanted not in figures:
            raise NotImplementedError(missing.get(wanted) or missing.get("", f"{name} has not measured {wanted}"))
        self._figure = figures[wanted]


def _measured(name: str) -> tuple[Figures, dict[str, str]]:
    command = [sys.executable, _worker.__file__, name]
    # asv tells this process alone where the commit's mbn lies.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        worker = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS, env=environment)
    except subprocess.SubprocessError as error:
        return {}, {"": f"{error}: {error.stderr}"}
    return tuple(json.loads(worker.stdout))


class Step(_Layer):
    """The least seconds of a step, forward, or forward and backward; and of a copy of x, which tells of the machine."""

    params = ([*BACKENDS, COPY], list(MODES), [str(shape) for shape in SHAPES])
    param_names = ("backend", "mode", "shape")

    def track_seconds(self, *_: object) -> float:
        return self._figure

    track_seconds.unit = "seconds"


class Overhead(_Layer):
    """The same for an input so small that all of it is the cost of a call."""

    params = (BACKENDS, list(MODES), [str(TINY)])
    param_names = ("backend", "mode", "shape")

    def track_seconds(self, *_: object) -> float:
        return self._figure

    track_seconds.unit = "seconds"


class Memory(_Layer):
    """By how much the process grows during a step on the first of the large inputs."""

    params = (BACKENDS, list(MODES))
    kind = "bytes"

    def track_peak(self, *_: object) -> float:
        return self._figure

    track_peak.unit = "bytes"


class Agreement(_Layer):
    """The largest errors of a training step and an evaluation at an offset of 10⁴."""

    params = (BACKENDS, list(QUANTITIES))
    param_names = ("backend", "quantity")
    kind = "ulp"

    def track_error(self, *_: object) -> float:
        return self._figure

    track_error.unit = "ulp"
