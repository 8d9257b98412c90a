"""The command: from options to a workload, to a report and an exit code.

Bad options are refused before any work begins.
"""

import argparse
import io

from mbn.commands import options
from mbn.commands.bench import measurement, record, replicas, report
from mbn.commands.bench.measurement import Measurement
from mbn.commands.bench.workloads import MODES, PULLBACK, Workload
from mbn.commands.options import UsageError
from mbn.commands.output import console
from mbn.commands.processes import NotRun
from mbn.commands.progress import Steps, progress
from mbn.state import outputs

_MEASURED, _FAILED, _NOTHING_RAN = 0, 1, 2


def run(args: argparse.Namespace) -> int:
    """Measure the backends by the options, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured.
        BackendNotFoundError: a backend has an unknown name.
    """
    backends = options.backends(args.backends)
    outputs.check_files({"--json": args.json, "--plot": args.plot})
    options.check_plot(args.plot)
    workload = _workload(args)
    if args.replicas:
        return _share(args, workload, backends)
    modes = tuple(mode for mode in (*MODES, PULLBACK) if mode in (args.modes or MODES))
    if args.device:
        backends = _on_device(args.device, backends)
    else:
        options.check_runnable(backends)
    written = {}
    with progress() as steps:
        result = _measure(workload, measurement.subjects(backends, args.device), modes, steps)
        if args.json:
            written[args.json] = record.to_json(result).encode()
        if args.plot and result.timed:
            steps.begin("the picture")
            from mbn.commands.bench import plot

            picture = io.BytesIO()
            plot.save(result, picture)
            written[args.plot] = picture.getvalue()
    try:
        report.show(console(), result)
    finally:  # the files are written even where standard output is closed
        outputs.write(written)
    if not any(spec in result.timed for spec in backends):
        return _NOTHING_RAN
    return _FAILED if any(isinstance(s, NotRun) and s.broken for s in result.subjects.values()) else _MEASURED


def _share(args: argparse.Namespace, workload: Workload, backends: list[str]) -> int:
    """Measure what it costs to share statistics, and return the exit code."""
    modes = tuple(mode for mode in replicas.MODES if mode in (args.modes or replicas.MODES))
    if args.device or args.plot or not set(args.modes or modes) <= set(modes) or any(":" in spec for spec in backends):
        raise UsageError(
            "--replicas measures training on the CPU and draws nothing: it goes without --device, --plot and devices "
            "of --backends, and its modes are train and backward."
        )
    with progress() as steps:
        steps.plan(len(backends))

        def begin(name: str) -> None:
            steps.begin(name)
            steps.advance(1)

        result = replicas.measure(workload, args.replicas, backends, modes, begin)
    try:
        replicas.show(console(), result)
    finally:
        outputs.write({args.json: replicas.to_json(result).encode()} if args.json else {})
    if not result.shared:
        return _NOTHING_RAN
    return _FAILED if any(isinstance(s, NotRun) and s.broken for s in result.subjects.values()) else _MEASURED


def _on_device(device: str, backends: list[str]) -> list[str]:
    """Return the backends that have a device, each on it, and print the names of the others."""
    specs = [options.on_device(spec, device) for spec in backends]
    found = measurement.placed(specs)
    if not found:
        raise UsageError(f"no backend here has a device {device!r}. `mbn backends` lists the devices of each.")
    left_out = [spec.partition(":")[0] for spec in specs if spec not in found]
    if left_out:
        console().print(f"Not on {device}, and so left out: {', '.join(left_out)}.\n", highlight=False)
    return found


def _measure(workload: Workload, specs: list[str], modes: tuple[str, ...], steps: Steps) -> Measurement:
    rounds = measurement.ROUNDS + 1  # the first one prepares the subjects
    steps.plan(rounds * len(specs))
    measured = -1

    def begin(spec: str) -> None:
        nonlocal measured
        measured += 1
        steps.begin(spec)
        if measured:
            steps.advance(1)

    return measurement.measure(workload, specs, modes, begin)


def _workload(args: argparse.Namespace) -> Workload:
    workload = Workload(args.shape, args.dtype, args.axis, args.masked)
    options.check_memory(workload.shape, options.numpy_dtype(workload.dtype))
    if workload.size <= workload.num_features:
        raise UsageError(f"shape {workload.shape} has one value per channel; training takes more.")
    return workload
