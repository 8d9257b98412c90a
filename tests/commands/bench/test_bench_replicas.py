"""``mbn bench --replicas``: steps in several processes that share their statistics."""

import json
import sys

import pytest

from mbn.commands import cli
from mbn.commands.bench import replicas
from mbn.commands.bench.replicas import Measurement, Shared
from mbn.commands.bench.workloads import Workload
from mbn.commands.processes import NotRun


def bench(*arguments):
    return cli.main(["bench", "--shape", "32,4", "--replicas", "2", *arguments])


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.mpi4py
@pytest.mark.torch
def test_backends_share_statistics_in_real_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(replicas, "ROUNDS", 2)
    assert bench("--backends", "numpy,torch,jax", "--json", str(tmp_path / "r.json")) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["replicas"] == 2
    numpy, torch, jax = record["subjects"]
    for found in (numpy, torch):
        assert found["status"] == "ran"
        for mode in ("train", "backward"):
            assert found["seconds_per_call"][mode].keys() == {"alone", "shared", "gather"}
            assert len(found["seconds_by_round"][mode]["shared"]) == 2
    assert jax["status"] == "cannot run"
    shown = capsys.readouterr().out
    assert "2 processes, each with x of (32, 4) float32" in shown
    assert "gloo" in shown


def test_time_that_sharing_takes_is_the_median_of_differences_within_rounds(capsys):
    seconds = {"train": {"shared": [5e-5, 9e-5, 4e-5], "alone": [1e-5, 2e-5, 3e-5]}}
    found = Shared("1.0", seconds, [2e-6, 3e-6, 4e-6])
    assert found.more("train") == pytest.approx(4e-5)
    assert found.median("train", "gather") == 3e-6
    workload = Workload((32, 4))
    replicas.show(
        replicas.Console(), Measurement(workload, 2, ("train",), {"numpy": found, "torch": NotRun("no", False)})
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("numpy"))
    assert row.split() == ["numpy", "MPI", "1.0", "0.02", "0.05", "40.0", "3.0"]


def test_missing_mpi_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(replicas, "launcher", lambda size: None)
    assert bench("--backends", "numpy") == 2
    assert "pip install 'mbn-batchnorm[mpi]' mpich" in " ".join(capsys.readouterr().out.split())


@pytest.mark.processes
def test_failing_process_is_reported_with_its_last_words(capsys, monkeypatch):
    monkeypatch.setattr(replicas, "launcher", lambda size: [sys.executable, "-c", "raise ValueError('broke')"])
    monkeypatch.setattr(replicas, "find_spec", lambda name: True)
    assert bench("--backends", "numpy") == 2
    assert "ValueError: broke" in " ".join(capsys.readouterr().out.split())


@pytest.mark.processes
def test_processes_that_take_too_long_are_ended(monkeypatch):
    monkeypatch.setattr(replicas, "_PATIENCE", 0.1)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert "took more than 0.1 s" in replicas._answer([command, command], 2).why


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "cpu"),
        ("--modes", "eval"),
        ("--backends", "numpy:cpu"),
        pytest.param(("--plot", "x.png"), marks=pytest.mark.matplotlib),
    ],
)
def test_options_that_do_not_go_with_replicas_are_refused(arguments, capsys):
    assert bench(*arguments) == 2
    assert "its modes are train and backward" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1", "-2", "x"])
def test_number_of_replicas_is_at_least_two(number, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--shape", "32,4", "--replicas", number])
    assert "is no number of processes: give 2 or more" in capsys.readouterr().err
