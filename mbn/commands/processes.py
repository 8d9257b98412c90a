"""A function in a process of its own, asked again and again: whatever happens there, an answer comes back.

Frameworks in one process are not to be trusted with each other: their thread pools slow each other down by orders of
magnitude, and one that crashes would take the others along.
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
"""Seconds that a process has to end in."""


class NotRun(NamedTuple):
    """What stands for an answer: who was asked cannot run here, or is ``broken``, having claimed that it can."""

    why: str
    broken: bool


class Process:
    """A module that calls ``serve``, run as a process of its own. Between two questions it sleeps.

    It inherits the environment, and so finds mbn and its backends where this one found them.
    """

    def __init__(self, module: str) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads fills up
        self._child = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # an interrupt, say: nobody waits for the answer
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
            with suppress(OSError):  # a question that a dead process has not read
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
    """Answer the questions of the process that started this one, until there are no more."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a framework prints is no answer
    while True:
        try:
            question = pickle.load(questions)  # noqa: S301 - written by Process
        except EOFError:
            return
        pickle.dump(answer(question), answers)
        answers.flush()


def broken(error: Exception) -> NotRun:
    """Return what stands for the answer of someone who raised what nobody expected."""
    return NotRun(f"{type(error).__name__}: {error}", broken=True)
