"""Check the backends on a GPU and measure them there, with nothing but what they need themselves: no asv, no network.

``python asv_bench/gpu.py conform`` runs the conformance suite on each backend, all at once; ``measure`` measures one
after another; without either, both are done. Everything goes into one file, which asv reads as results of its own: the
machine, a report of each conformance run, and times, kept after each subject. Clocks are left as they are.

A later call adds to the file of the same commit. What comes after ``--`` goes to pytest. The exit code is 1 where a
backend did not conform, broke or, all of them, did not run.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measure
from benchmarks import gpu

from mbn.commands.bench.measurement import Timed
from mbn.commands.bench.peers import ENVIRONMENT
from mbn.commands.output import console, milliseconds, not_run, print_filled, table
from mbn.commands.processes import NotRun
from mbn.registry import known_backends

_PARALLEL_FROM = 8
"""Cores, from which on each conformance run gets several."""
_COLUMNS = ("result", "params", "version", "started_at", "duration")
_PARAMS = [[repr(value) for value in values] for values in gpu.Step.params]


def main(arguments: list[str]) -> int:
    """Do what is asked for and return the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:cut])
    file = ResultFile(options)
    codes = []
    if options.what != "measure":
        codes.append(conform(file, options, arguments[cut + 1 :]))
    if options.what != "conform":
        codes.append(run(file, options))
    console().print(file.path)
    return max(codes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("what", nargs="?", choices=("conform", "measure"), help="a part (default: both)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; or cpu, to see the script work (default: cuda)")
    parser.add_argument("--subjects", default=",".join(gpu.SUBJECTS), help="some of %(default)s")
    parser.add_argument("--inputs", default="", help="some inputs: those whose name has this in it")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="where the results go, by machine")
    parser.add_argument(
        "--commit", default=os.environ.get("MBN_COMMIT"), help="what is measured, where there is no git"
    )
    return parser


class ResultFile:
    """What is known of a commit on this machine, in asv's form, with a part of our own under "gpu"."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._machine = describe_machine(options.device)
        commit = options.commit or (measure.head() if (measure.HERE.parent / ".git").exists() else "unknown")
        environment = f"existing-py{measure.PYTHON}"
        self._folder = options.out / self._machine["machine"]
        self.path = self._folder / f"{commit[:8]}-{environment}.json"
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.record: dict[str, Any] = {
            "results": {},
            "gpu": {"conformance": {}, "not_run": {}, "seconds_by_round": {}},
            **known,
            "commit_hash": commit,
            "env_name": environment,
            "date": round(1e3 * time.time()),
            "python": measure.PYTHON,
            "env_vars": {},
            "result_columns": _COLUMNS,
            "durations": {},
            "version": 2,
            **measure.environment_of(self._machine),
        }

    @property
    def values(self) -> dict[str, gpu.Values]:
        """What is known by benchmark."""
        keys = list(itertools.product(*gpu.Step.params))
        return {
            name: {key: value for key, value in zip(keys, found[0], strict=True) if not math.isnan(value)}
            for name, found in self.record["results"].items()
            if name.startswith("gpu.") and found[1] == _PARAMS
        }

    def add(self, found: gpu.Outcomes) -> None:
        """Add what was measured, and save."""
        keys = list(itertools.product(*gpu.Step.params))
        for name, values in gpu.results(found, self.values).items():
            column = [values.get(key, math.nan) for key in keys]  # asv's n/a
            self.record["results"][name] = [column, _PARAMS, gpu.Step.version, self.record["date"], None]
        for (subject, given), outcome in found.items():
            kept = self.record["gpu"]
            for part in ("not_run", "seconds_by_round"):
                kept[part].setdefault(subject, {}).pop(given, None)
            if isinstance(outcome, Timed):
                kept["seconds_by_round"][subject][given] = outcome.seconds
            else:
                kept["not_run"][subject][given] = outcome._asdict()
        self.save()

    def save(self) -> None:
        """Write the file, and asv's description of the machine beside it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record) + "\n", encoding="utf-8")
        machine = json.dumps({**self._machine, "version": 1}, indent=4)
        (self._folder / "machine.json").write_text(machine + "\n", encoding="utf-8")


def describe_machine(device: str) -> dict[str, str]:
    """Return what asv keeps of a machine, its GPU included: named by what it is, as nvidia-smi tells."""
    machine = measure.describe_machine()
    program = shutil.which("nvidia-smi")
    if device.startswith("cpu") or program is None:
        return machine
    index = device.partition(":")[2] or "0"
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", f"--id={index}")
    told = subprocess.run([program, *query], capture_output=True, text=True, check=True).stdout
    name, memory, driver = (part.strip() for part in told.splitlines()[0].split(","))
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return machine | {"machine": f"{machine['machine']}-{slug}", "gpu": name, "gpu_memory": memory, "driver": driver}


def conform(file: ResultFile, options: argparse.Namespace, pytest_args: list[str]) -> int:
    """Run the suite on all backends at once, keep their reports, and return 1 where one failed."""
    names = [name for name in options.subjects.split(",") if name in known_backends()]
    codes = {}
    with TemporaryDirectory() as folder:
        reports, logs = ({name: Path(folder, f"{name}.{end}") for name in names} for end in ("json", "txt"))
        running = {name: _start(name, options.device, reports[name], logs[name], pytest_args) for name in names}
        for name, process in running.items():
            codes[name] = process.wait()
            print(logs[name].read_text(encoding="utf-8", errors="replace"))  # noqa: T201 - pytest's own words
            report = json.loads(reports[name].read_text(encoding="utf-8")) if reports[name].exists() else {}
            report.pop("skipped", None)
            file.record["gpu"]["conformance"][name] = {**report, "exit_status": codes[name]}
            file.save()
    for name, code in codes.items():
        console().print(f"{name} on {options.device}: {'conforms' if code == 0 else f'FAILED, exit code {code}'}")
    return int(any(codes.values()))


def _start(name: str, device: str, report: Path, log: Path, pytest_args: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "mbn", "conform", name, "--device", device, "--json", str(report), *pytest_args]
    cores = os.cpu_count() or 1
    if find_spec("xdist") and cores >= _PARALLEL_FROM:
        command += ["-n", str(cores // 4)]
    with log.open("w", encoding="utf-8") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT | os.environ)


def run(file: ResultFile, options: argparse.Namespace) -> int:
    """Measure, keep what is known after each subject, print it, and return 1 where one broke or none ran."""
    subjects = options.subjects.split(",")
    inputs = {name: given for name, given in gpu.INPUTS.items() if options.inputs in name}
    found: gpu.Outcomes = {}
    start = time.monotonic()
    for found in gpu.measure(subjects, inputs, options.device):
        file.add(found)
        console(stderr=True).print(f"{list(found)[-1][0]} is done after {time.monotonic() - start:.0f} s")
    _show(file.values, found)
    broke = any(isinstance(outcome, NotRun) and outcome.broken for outcome in found.values())
    return int(broke or not any(isinstance(outcome, Timed) for outcome in found.values()))


def _show(values: dict[str, gpu.Values], found: gpu.Outcomes) -> None:
    seconds, ideal = values["gpu.Step.track_seconds"], values["gpu.Step.track_times_ideal"]
    reasons: dict[str, list[NotRun]] = {}
    for (subject, _), outcome in found.items():
        if isinstance(outcome, NotRun):
            reasons.setdefault(subject, []).append(outcome)
    print_filled(console(), not_run("subject", reasons))
    made = table("x", "mode", "subject", numbers=("ms", "x ideal", "x torch.nn", "x flax.nnx"))
    for name, mode, subject in itertools.product(gpu.INPUTS, gpu.MODES, gpu.SUBJECTS):
        key = subject, mode, name
        if key in seconds:
            peers = (seconds.get((peer, mode, name)) for peer in ("torch.nn", "flax.nnx"))
            ratios = [f"{seconds[key] / peer:.2f}" if peer else "-" for peer in peers]
            times = f"{ideal[key]:.2f}" if key in ideal else "-"
            made.add_row(name, mode, subject, milliseconds(seconds[key]), times, *ratios)
    out = console()
    out.width = 120
    out.print(made)
    speed = gpu.bandwidth(seconds)
    if speed:
        out.print(f"\nIdeal: the passes over memory that a mode must make, at the {speed / 1e9:.0f} GB/s of the copy.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
