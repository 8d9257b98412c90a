"""A backend in a process of its own: whatever happens there, an answer comes back."""

from mbn.commands.compare.messages import Job, Outcome
from mbn.commands.processes import NotRun, Process


def run(spec: str, jobs: list[Job]) -> list[Outcome]:
    """Return what a backend, ``NAME`` or ``NAME:DEVICE``, makes of each job."""
    with Process("mbn.commands.compare.worker") as process:
        answer = process.ask((spec, jobs))
    return [answer] * len(jobs) if isinstance(answer, NotRun) else list(answer)
