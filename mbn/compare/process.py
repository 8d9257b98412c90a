"""A backend in a process of its own: whatever happens there, an answer comes back."""

from mbn.compare.messages import Job, Outcome
from mbn.isolation import NotRun, Process


def run(spec: str, jobs: list[Job]) -> list[Outcome]:
    """Return what a backend, ``NAME`` or ``NAME:DEVICE``, makes of each job."""
    with Process("mbn.compare.worker") as process:
        answer = process.ask((spec, jobs))
    return [answer] * len(jobs) if isinstance(answer, NotRun) else list(answer)
