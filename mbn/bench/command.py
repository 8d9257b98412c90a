"""The command: options to a workload, a workload to a report, and an exit code.

Everything that can be refused is refused before any work is done.
"""

import argparse
import io

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mbn import usage
from mbn.bench import measurement, record, report
from mbn.bench.measurement import Measurement
from mbn.bench.workloads import MODES, PULLBACK, Workload
from mbn.console import console
from mbn.isolation import NotRun
from mbn.usage import UsageError

_MEASURED, _FAILED, _NOTHING_RAN = 0, 1, 2


def run(options: argparse.Namespace) -> int:
    """Measure as the options say, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured.
        BackendNotFoundError: a backend has an unknown name.
    """
    backends = usage.backends(options.backends)
    usage.check_files({"--json": options.json, "--plot": options.plot})
    usage.check_plot(options.plot)
    workload = _workload(options)
    modes = tuple(mode for mode in (*MODES, PULLBACK) if mode in (options.modes or MODES))
    if options.device:
        backends = _on_device(options.device, backends)
    else:
        usage.check_runnable(backends)
    result = _measure(workload, measurement.subjects(backends, options.device), modes)
    outputs = {}
    if options.json:
        outputs[options.json] = record.to_json(result).encode()
    if options.plot and result.timed:
        from mbn.bench import plot  # noqa: PLC0415 - matplotlib is an extra

        picture = io.BytesIO()
        plot.save(result, picture)
        outputs[options.plot] = picture.getvalue()
    try:
        report.show(console(), result)
    finally:  # that nobody reads is no reason to lose it
        usage.write(outputs)
    if not any(spec in result.timed for spec in backends):
        return _NOTHING_RAN
    return _FAILED if any(isinstance(s, NotRun) and s.broken for s in result.subjects.values()) else _MEASURED


def _on_device(device: str, backends: list[str]) -> list[str]:
    """Return those of the backends that have a device, there, and say who is left out."""
    specs = [usage.on_device(spec, device) for spec in backends]
    found = measurement.placed(specs)
    if not found:
        message = f"no backend here has a device {device!r}. `mbn backends` says which devices there are."
        raise UsageError(message)
    left_out = [spec.partition(":")[0] for spec in specs if spec not in found]
    if left_out:
        console().print(f"Not on {device}, and so left out: {', '.join(left_out)}.\n", highlight=False)
    return found


def _measure(workload: Workload, specs: list[str], modes: tuple[str, ...]) -> Measurement:
    columns = TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=len(specs) * (measurement.ROUNDS + 1))

        def advance(spec: str) -> None:
            bar.update(task, advance=1, description=spec)

        return measurement.measure(workload, specs, modes, advance)


def _workload(options: argparse.Namespace) -> Workload:
    workload = Workload(options.shape, options.dtype, options.axis, options.masked)
    usage.check_memory(workload.shape, usage.numpy_dtype(workload.dtype))
    if workload.size <= workload.num_features:
        message = f"shape {workload.shape} has one value per channel; training takes more."
        raise UsageError(message)
    return workload
