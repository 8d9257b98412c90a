"""The command: options to examples, examples to a report, and an exit code.

Everything that can be refused is refused before any work is done.
"""

import argparse
import io

from mbn import usage
from mbn.compare import examples, process, record, report
from mbn.compare.comparison import Comparison, compare, verdict
from mbn.compare.examples import Example
from mbn.compare.messages import Job
from mbn.compare.reference import reference
from mbn.console import console


def run(options: argparse.Namespace) -> int:
    """Compare as the options say, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured.
        BackendNotFoundError: a backend has an unknown name.
    """
    backends = usage.backends(options.backends)
    usage.check_files({"--json": options.json, "--plot": options.plot}, given=options.input)
    usage.check_plot(options.plot)
    chosen = _examples(options)
    usage.check_runnable(backends)
    comparisons = _compare(chosen, backends)
    result = verdict(comparisons)
    outputs = {}
    if options.json:
        outputs[options.json] = record.to_json(comparisons, result).encode()
    if options.plot and any(comparison.errors for comparison in comparisons):
        from mbn.compare import plot  # noqa: PLC0415 - matplotlib is an extra

        picture = io.BytesIO()
        plot.save(comparisons, picture)
        outputs[options.plot] = picture.getvalue()
    try:
        report.show(console(), comparisons, result)
    finally:  # that nobody reads is no reason to lose it
        usage.write(outputs)
    return result.exit_code


def _compare(chosen: list[Example], backends: list[str]) -> list[Comparison]:
    with console(stderr=True).status("the exact reference") as status:
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
