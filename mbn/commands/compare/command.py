"""The command: from options to examples, to a report and an exit code.

Bad options are refused before any work begins.
"""

import argparse
import io
from functools import partial

from mbn.commands import options
from mbn.commands.compare import examples, process, record, report
from mbn.commands.compare.comparison import Comparison, compare, verdict
from mbn.commands.compare.examples import Example
from mbn.commands.compare.messages import Job
from mbn.commands.compare.reference import reference
from mbn.commands.options import UsageError
from mbn.commands.output import console
from mbn.commands.processes import NotRun
from mbn.commands.progress import Steps, progress
from mbn.state import outputs

_START, _PICTURE = 2.0, 2.0
"""About how many seconds a backend takes to start, and a picture: for estimates of the time left."""
_REFERENCE, _STEPS, _MEASURING = 6e-7, 2e-7, 5e-8
"""About how many seconds the reference, a backend and a measurement of errors take for each value of x."""


def run(args: argparse.Namespace) -> int:
    """Compare the backends by the options, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured.
        BackendNotFoundError: a backend has an unknown name.
    """
    if args.rows is not None and not args.input:
        raise UsageError("--rows is about the rows of a file: give --input FILE, or leave it out.")
    backends = options.backends(args.backends)
    outputs.check_files({"--json": args.json, "--plot": args.plot}, given=args.input)
    options.check_plot(args.plot)
    written = {}
    with progress() as steps:
        steps.begin("the examples")
        chosen = _examples(args)
        options.check_runnable(backends)
        comparisons = _compare(chosen, backends, steps, picture=args.plot is not None)
        result = verdict(comparisons)
        if args.json:
            written[args.json] = record.to_json(comparisons, result).encode()
        if args.plot and any(comparison.errors for comparison in comparisons):
            steps.begin("the picture")
            from mbn.commands.compare import plot

            picture = io.BytesIO()
            plot.save(comparisons, picture)
            written[args.plot] = picture.getvalue()
    try:
        report.show(console(), comparisons, result)
    finally:  # the files are written even where standard output is closed
        outputs.write(written)
    return result.exit_code


def _compare(chosen: list[Example], backends: list[str], steps: Steps, *, picture: bool) -> list[Comparison]:
    values = sum(example.x.size for example in chosen)
    of_backend = _START + values * _STEPS
    of_pairs = values * _MEASURING * len(backends) * (len(backends) + 1) / 2
    steps.plan(values * _REFERENCE + len(backends) * of_backend + of_pairs + _PICTURE * picture)
    steps.begin("the exact reference")
    references = [reference(example, lambda size: steps.advance(size * _REFERENCE)) for example in chosen]
    jobs = [Job(example, ref.statistics) for example, ref in zip(chosen, references, strict=True)]
    outcomes = {}
    for backend in backends:  # one after another, since each would slow down the others
        steps.begin(backend)
        outcomes[backend] = process.run(backend, jobs)
        does_not_run = all(isinstance(outcome, NotRun) for outcome in outcomes[backend])
        (steps.drop if does_not_run else steps.advance)(of_backend)
    steps.begin("errors and distances")
    return [
        compare(
            example,
            ref,
            {backend: outcomes[backend][i] for backend in backends},
            partial(steps.advance, example.x.size * _MEASURING),
        )
        for i, (example, ref) in enumerate(zip(chosen, references, strict=True))
    ]


def _examples(args: argparse.Namespace) -> list[Example]:
    if args.input:
        return examples.read(args.input, args.dtype, args.rows)
    dtype = args.dtype or "float32"
    return [examples.seeded(args.shape, dtype)] if args.shape else examples.built_in(dtype)
