"""The command: options to examples, examples to a report, and an exit code.

Everything that can be refused is refused before any work is done.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from rich.console import Console

from mbn.compare import examples, process, record, report
from mbn.compare.comparison import Comparison, compare, verdict
from mbn.compare.errors import UsageError
from mbn.compare.examples import Example
from mbn.compare.messages import Job
from mbn.compare.reference import reference
from mbn.registry import get_backend, known_backends


def run(options: argparse.Namespace) -> int:
    """Compare as the options say, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured.
        BackendNotFoundError: a backend has an unknown name.
    """
    backends = options.backends or list(known_backends())
    for backend in backends:
        _check_name(backend.partition(":")[0])
    for path in (options.json, options.plot):
        _check_writable(path)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        message = "--plot needs matplotlib, which is not installed: pip install matplotlib."
        raise UsageError(message)
    comparisons = _compare(_examples(options), backends)
    result = verdict(comparisons)
    report.show(Console(markup=False, highlight=False), comparisons, result)
    if options.json:
        options.json.write_text(record.to_json(comparisons, result), encoding="utf-8")
    if options.plot and any(comparison.errors for comparison in comparisons):
        from mbn.compare import plot  # noqa: PLC0415 - matplotlib is an extra

        plot.save(comparisons, options.plot)
    return result.exit_code


def _compare(chosen: list[Example], backends: list[str]) -> list[Comparison]:
    with Console(stderr=True).status("the exact reference") as status:
        references = [reference(example) for example in chosen]
        jobs = [Job(example, ref.statistics) for example, ref in zip(chosen, references, strict=True)]
        outcomes = {}
        for backend in backends:  # one after another, or they would spoil each other's timings
            status.update(backend)
            outcomes[backend] = process.run(backend, jobs)
    return [
        compare(example, ref, {backend: outcomes[backend][i] for backend in backends})
        for i, (example, ref) in enumerate(zip(chosen, references, strict=True))
    ]


def _examples(options: argparse.Namespace) -> list[Example]:
    if options.input:
        return examples.read(options.input, options.dtype)
    dtype = options.dtype or "float32"
    return [examples.seeded(options.shape, dtype)] if options.shape else examples.built_in(dtype)


def _check_name(name: str) -> None:
    if name not in known_backends():
        get_backend(name)  # which says so, and what the name may have been meant to be


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        message = f"{path} cannot be written: it is a directory, or in none that exists and may be written to."
        raise UsageError(message)
