"""A backend in a process of its own: whatever happens there, an answer comes back."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mbn.compare.messages import Job, NotRun, Outcome


def run(spec: str, jobs: list[Job]) -> list[Outcome]:
    """Return what a backend, ``NAME`` or ``NAME:DEVICE``, makes of each job.

    The process inherits the environment, and so finds mbn and its backends where this one found them.
    """
    with TemporaryDirectory(prefix="mbn-compare-") as directory:
        question, answer = Path(directory, "jobs"), Path(directory, "outcomes")
        question.write_bytes(pickle.dumps(jobs))
        command = [sys.executable, "-m", "mbn.compare.worker", spec, str(question), str(answer)]
        ended = subprocess.run(  # noqa: S603 - Python, on our own module
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if ended.returncode == 0 and answer.exists():
            return list(pickle.loads(answer.read_bytes()))  # noqa: S301 - written by worker.py
    return [NotRun(_death(ended), broken=True)] * len(jobs)


def _death(ended: subprocess.CompletedProcess[str]) -> str:
    code = ended.returncode
    how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
    last_words = ended.stderr.strip().rpartition("\n")[2]
    return f"its process ended {how}{': ' if last_words else ''}{last_words}"
