"""A function in a process of its own, for any number of questions; an answer comes back even if the process dies.

Each framework has a process of its own: in one process their thread pools slow each other down by orders of magnitude,
and a crash of one framework would end the others too.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any, NamedTuple, Self

_PATIENCE = 10
"""Seconds that a process may take to end."""


class NotRun(NamedTuple):
    """The answer of a subject that cannot run here, or that is ``broken``: it claimed that it can run, and failed."""

    why: str
    broken: bool


class Process:
    """A module that calls ``serve``, as a process of its own, which sleeps between two questions.

    It inherits the environment, and so imports the same mbn and the same backends.
    """

    def __init__(self, module: str) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115 - a pipe without a reader would fill up
        self._child = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # after an interrupt, say, the answer is not needed
            self._child.kill()
        self.close()

    def ask(self, question: object) -> Any:
        """Return the answer to a question, or NotRun where the process has died."""
        questions, answers = self._child.stdin, self._child.stdout
        try:
            pickle.dump(question, questions)  # type: ignore[arg-type] # it is a pipe
            questions.flush()  # type: ignore[union-attr]
            return pickle.load(answers)  # type: ignore[arg-type] # noqa: S301 - written by serve
        except (OSError, EOFError, pickle.UnpicklingError):
            return NotRun(self._death(), broken=True)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):  # a dead process has left its question unread
                pipe.close()  # type: ignore[union-attr]
        self._wait()
        self._errors.close()

    def _wait(self) -> int:
        try:
            return self._child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def _death(self) -> str:
        code = self._wait()
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
        self._errors.seek(0)
        last_words = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"its process ended {how}{': ' if last_words else ''}{last_words}"


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer the questions of the parent process until it asks no more."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a framework may print to standard output, which carries the answers
    while True:
        try:
            question = pickle.load(questions)  # noqa: S301 - written by Process
        except EOFError:
            return
        pickle.dump(answer(question), answers)
        answers.flush()


def broken(error: Exception) -> NotRun:
    """Return the answer of a subject that raised an unexpected error."""
    return NotRun(f"{type(error).__name__}: {error}", broken=True)
