"""A check that a backend can run here, in a process of its own: no other process has to start the framework."""

import numpy as np

from mbn.commands.processes import NotRun, Process, broken, serve
from mbn.registry import BackendUnavailableError, get_backend


def refusal(spec: str) -> NotRun | None:
    """Return the reason why a backend, ``NAME`` or ``NAME:DEVICE``, cannot have arrays here; None if it can."""
    with Process("mbn.commands.availability") as process:
        refused: NotRun | None = process.ask(spec)
        return refused


def refusal_in_this_process(spec: str) -> NotRun | None:
    """Return the same, and start the framework in this process."""
    name, _, device = spec.partition(":")
    try:
        get_backend(name).asarray(np.zeros(1, np.float32), device=device or None)
    except (BackendUnavailableError, ValueError) as error:
        return NotRun(str(error), broken=False)
    except Exception as error:  # noqa: BLE001 - a framework may raise anything; the user reads it
        return broken(error)
    return None


if __name__ == "__main__":
    serve(refusal_in_this_process)
