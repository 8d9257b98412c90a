"""A backend in a process of its own; an answer comes back even if the process dies."""

from mbn.commands.compare.messages import Job, Outcome
from mbn.commands.processes import NotRun, Process


def run(spec: str, jobs: list[Job]) -> list[Outcome]:
    """Return the outcome of each job on a backend, ``NAME`` or ``NAME:DEVICE``."""
    with Process("mbn.commands.compare.worker") as process:
        answer = process.ask((spec, jobs))
    return [answer] * len(jobs) if isinstance(answer, NotRun) else list(answer)
