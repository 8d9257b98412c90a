"""The benchmark script for GPU machines, without a GPU: its figures from given times, its result files, its calls."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mbn.commands.bench.measurement import Timed
from mbn.commands.bench.messages import Preparation, Prepared
from mbn.commands.processes import NotRun

pytestmark = pytest.mark.processes

ASV_BENCH = Path(__file__).parents[1] / "asv_bench"
LARGE, SMALL = "(1048576, 256) float32", "(32, 64) float32"
GIBIBYTE = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """Return asv's benchmark of GPUs, as a module."""
    monkeypatch.syspath_prepend(ASV_BENCH)
    return importlib.import_module("benchmarks.gpu")


@pytest.fixture
def script(gpu, monkeypatch):
    """Return the script asv_bench/gpu.py, as a module."""
    for name in ("gpu", "measure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("gpu")


def timed(memory=None, **seconds):
    prepared = Prepared("1.0", "cuda:0", {}, dict.fromkeys(seconds, memory))
    return Timed(prepared, {mode: list(turns) for mode, turns in seconds.items()})


@pytest.fixture
def found():
    """Return the outcomes on a card that copies 1 GiB in a second."""
    return {
        ("cupy", LARGE): timed(train=(2.0, 2.2, 1.8), pullback=(5.0,), memory=7),
        ("torch", LARGE): NotRun("out of memory", broken=True),
        ("copy", LARGE): timed(eval=(1.0,)),
        ("copy", SMALL): timed(eval=(1e-6,)),
    }


def test_ideal_time_is_that_of_the_passes_at_the_speed_of_a_large_copy(gpu, found):
    seconds = gpu.medians(found)
    assert gpu.bandwidth(seconds) == 2 * GIBIBYTE
    ideal = gpu.times_ideal(seconds)
    assert ideal["cupy", "train", LARGE] == pytest.approx(2.0 / 1.5)
    assert ideal["cupy", "pullback", LARGE] == pytest.approx(5.0 / 2.5)
    assert ideal["copy", "eval", LARGE] == 1
    assert gpu.peaks(found) == {("cupy", "train", LARGE): 7, ("cupy", "pullback", LARGE): 7}


def test_ideal_time_is_unknown_without_a_large_copy(gpu, found):
    del found["copy", LARGE]
    assert gpu.times_ideal(gpu.medians(found)) == {}


def test_inputs_fit_in_memory_and_their_names_are_parameters(gpu):
    assert max(given.workload.nbytes for given in gpu.INPUTS.values()) == 4 * GIBIBYTE
    assert gpu.Step.params[2] == list(gpu.INPUTS)
    assert {LARGE, SMALL} < gpu.INPUTS.keys()
    assert {given.workload.shape for given in gpu.INPUTS.values() if given.captured} == {(1024, 256), (32, 64)}


def test_broken_subject_gets_a_new_process(gpu, monkeypatch):
    started = []

    class Process:
        def __init__(self, _):
            started.append([])

        def ask(self, question):
            if not isinstance(question, Preparation):
                return 0.5
            started[-1].append(question)
            if len(started) == 1:
                return NotRun("CUDA error", broken=True)
            return Prepared("1.0", "cuda:0", {}, {})

        def close(self):
            pass

    monkeypatch.setattr(gpu, "Process", Process)
    inputs = {name: gpu.INPUTS[name] for name in (LARGE, SMALL)}
    *_, outcomes = gpu.measure(["cupy", "copy"], inputs, "cuda")
    assert [len(questions) for questions in started] == [1, 1, 2]
    assert started[0][0].spec == "cupy:cuda"
    assert outcomes["cupy", LARGE].broken
    assert outcomes["cupy", SMALL].seconds == {mode: [0.5, 0.5] for mode in gpu.MODES}
    assert outcomes["copy", SMALL].seconds == {"eval": [0.5, 0.5]}


def options(script, tmp_path, *arguments):
    return script._parser().parse_args(["--device", "cpu", "--out", str(tmp_path), "--commit", "a" * 40, *arguments])


def test_later_results_are_added_to_the_file_and_replace_older_ones(script, found, tmp_path):
    file = script.ResultFile(options(script, tmp_path))
    file.add(found)
    again = script.ResultFile(options(script, tmp_path))
    assert again.values == file.values
    again.add({("torch", LARGE): timed(train=(4.0,)), ("cupy", LARGE): NotRun("broke", broken=True)})
    record = json.loads(file.path.read_text())
    seconds = script.ResultFile(options(script, tmp_path)).values["gpu.Step.track_seconds"]
    assert seconds == {("torch", "train", LARGE): 4.0, ("copy", "eval", LARGE): 1.0, ("copy", "eval", SMALL): 1e-6}
    assert record["gpu"]["not_run"] == {"cupy": {LARGE: {"why": "broke", "broken": True}}, "torch": {}, "copy": {}}
    assert record["gpu"]["seconds_by_round"]["torch"] == {LARGE: {"train": [4.0]}}


@pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed")
def test_asv_reads_the_result_file(script, found, tmp_path):
    from asv.results import Results, iter_results

    script.ResultFile(options(script, tmp_path)).add(found)
    (read,) = iter_results(str(tmp_path))
    assert isinstance(read, Results)
    committed = json.loads((ASV_BENCH / "results" / "benchmarks.json").read_text())
    for name in ("gpu.Step.track_seconds", "gpu.Step.track_times_ideal", "gpu.Step.track_peak"):
        benchmark = committed[name]
        assert read.benchmark_version[name] == benchmark["version"]
        assert read.get_result_params(name) == benchmark["params"]
    values = read.get_result_value("gpu.Step.track_seconds", committed["gpu.Step.track_seconds"]["params"])
    assert {value for value in values if value == value} == {2.0, 5.0, 1.0, 1e-6}  # noqa: PLR0124 - NaN is n/a


def test_machine_is_named_by_its_card(script, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo "NVIDIA H0 80GB, 81559 MiB, 580.1";; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    described = script.describe_machine("cuda:1")
    assert re.search(r"\dcore.*-nvidia-h0-80gb$", described["machine"])
    assert (described["gpu_memory"], described["driver"]) == ("81559 MiB", "580.1")
    assert "gpu" not in script.describe_machine("cpu")


def run_script(tmp_path, *arguments):
    command = [str(ASV_BENCH / "gpu.sh"), *arguments]
    return subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_script_conforms_and_measures_on_the_cpu(tmp_path):
    common = ("--device", "cpu", "--out", str(tmp_path), "--commit", "b" * 40)
    conformed = run_script(tmp_path, "conform", *common, "--subjects", "numpy", "--", "-k", "test_dtypes")
    assert conformed.returncode == 0, conformed.stdout + conformed.stderr
    assert "numpy on cpu: conforms" in conformed.stdout
    measured = run_script(tmp_path, "measure", *common, "--subjects", "copy", "--inputs", "(32, 64)")
    assert measured.returncode == 0, measured.stdout + measured.stderr
    assert re.search(r"\(32, 64\) float32 +eval +copy", measured.stdout)
    (path,) = tmp_path.glob("*/bbbbbbbb-*.json")
    record = json.loads(path.read_text())
    assert record["gpu"]["conformance"]["numpy"]["areas"]["dtypes"]["failed"] == 0
    assert record["gpu"]["seconds_by_round"]["copy"].keys() == {SMALL}
    assert "captures no calls" in record["gpu"]["not_run"]["copy"][f"{SMALL}, CUDA graph"]["why"]


def test_subject_that_cannot_run_gives_exit_code_1(tmp_path):
    common = ("--device", "nowhere", "--out", str(tmp_path), "--commit", "c" * 40)
    assert run_script(tmp_path, "conform", *common, "--subjects", "numpy").returncode == 1
    assert run_script(tmp_path, "measure", *common, "--subjects", "numpy", "--inputs", SMALL).returncode == 1
