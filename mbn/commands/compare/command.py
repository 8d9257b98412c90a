"""The command: options to examples, examples to a report, and an exit code.

Everything that can be refused is refused before any work is done.
"""

import argparse
import io

from mbn.commands import options
from mbn.commands.compare import examples, process, record, report
from mbn.commands.compare.comparison import Comparison, compare, verdict
from mbn.commands.compare.examples import Example
from mbn.commands.compare.messages import Job
from mbn.commands.compare.reference import reference
from mbn.commands.output import console
from mbn.state import outputs


def run(args: argparse.Namespace) -> int:
    """Compare as the options say, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured.
        BackendNotFoundError: a backend has an unknown name.
    """
    backends = options.backends(args.backends)
    outputs.check_files({"--json": args.json, "--plot": args.plot}, given=args.input)
    options.check_plot(args.plot)
    chosen = _examples(args)
    options.check_runnable(backends)
    comparisons = _compare(chosen, backends)
    result = verdict(comparisons)
    written = {}
    if args.json:
        written[args.json] = record.to_json(comparisons, result).encode()
    if args.plot and any(comparison.errors for comparison in comparisons):
        from mbn.commands.compare import plot

        picture = io.BytesIO()
        plot.save(comparisons, picture)
        written[args.plot] = picture.getvalue()
    try:
        report.show(console(), comparisons, result)
    finally:  # that nobody reads is no reason to lose it
        outputs.write(written)
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


def _examples(args: argparse.Namespace) -> list[Example]:
    if args.input:
        return examples.read(args.input, args.dtype)
    dtype = args.dtype or "float32"
    return [examples.seeded(args.shape, dtype)] if args.shape else examples.built_in(dtype)
