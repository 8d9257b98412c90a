"""The parts of a benchmark, each on its own; no test depends on how fast anything is."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mbn.commands.bench import measurement, memory, record, report
from mbn.commands.bench.clocks import HostClock
from mbn.commands.bench.measurement import Measurement, Timed
from mbn.commands.bench.messages import Preparation, Prepared, Turn
from mbn.commands.bench.worker import Worker
from mbn.commands.bench.workloads import MODES, Workload
from mbn.commands.output import console
from mbn.commands.processes import NotRun

MEBIBYTE = 2**20


def timed(*seconds):
    return Timed(Prepared("1.0", "cpu", {"train": 1.0}, {"train": MEBIBYTE}), {"train": list(seconds)})


@pytest.fixture
def measured():
    """Return a measurement on a machine that gets slower, so that only ratios within a round tell which is faster."""
    subjects = {
        "numpy": timed(1.0, 2.0, 4.0),
        "nowhere": NotRun("backend 'nowhere' is known but nowhere is not installed.", broken=False),
        "torch.nn": timed(2.0, 4.0, 8.0),
        "formula": timed(4.0, 8.0, 16.0),
        "copy": timed(0.5, 1.0, 2.0),
    }
    return Measurement(Workload((4, 3)), ("train",), subjects)


def test_ratios_are_taken_within_rounds(measured):
    numpy, peer = measured.timed["numpy"], measured.timed["torch.nn"]
    assert numpy.ratio("train", peer) == 0.5
    assert numpy.median("train") == 2.0
    assert timed(1.0, 9.0, 1.0).ratio("train", timed(2.0, 3.0, 2.0)) == 0.5


def test_fastest_peer_is_neither_a_backend_nor_the_limit(measured):
    assert measured.fastest_peer("train") == "torch.nn"
    assert measured.peers == ["torch.nn", "formula", "copy"]
    alone = measured._replace(subjects={"numpy": timed(1.0), "copy": timed(1.0)})
    assert alone.fastest_peer("train") is None


def test_peers_are_measured_on_the_devices_of_their_framework():
    assert measurement.subjects(["numpy"]) == ["numpy", "torch.nn", "flax.nnx", "formula", "copy"]
    assert measurement.subjects(["torch:cuda", "torch", "jax:cpu"])[3:] == [
        "torch.nn:cuda",
        "torch.nn",
        "flax.nnx:cpu",
        "formula",
        "copy",
    ]


def test_all_subjects_that_can_are_measured_on_the_given_device():
    assert measurement.subjects(["torch:cuda"], "cuda") == [
        *("torch:cuda", "torch.nn:cuda", "flax.nnx:cuda", "copy:cuda")
    ]
    assert measurement.subjects(["numpy:cpu"], "cpu")[1:] == [
        *("torch.nn:cpu", "flax.nnx:cpu", "formula:cpu", "copy:cpu")
    ]


def test_limit_on_a_device_is_the_copy_on_that_device(measured):
    subjects = {"torch:cuda": timed(1.0), "torch.nn:cuda": timed(2.0), "copy:cuda": timed(0.5)}
    on_device = measured._replace(subjects=subjects)
    assert (on_device.limit, on_device.fastest_peer("train")) == ("copy:cuda", "torch.nn:cuda")
    assert json.loads(record.to_json(on_device))["limit"] == "copy:cuda"


def test_json_holds_workload_ratios_and_memory(measured):
    written = json.loads(record.to_json(measured), parse_constant=pytest.fail)
    subjects = {row["subject"]: row for row in written["subjects"]}
    assert written["workload"]["shape"] == [4, 3]
    assert written["fastest_peer"] == {"train": "torch.nn"}
    assert subjects["numpy"]["ratio"]["train"] == {"torch.nn": 0.5, "formula": 0.25, "copy": 2.0}
    assert subjects["numpy"]["peak_bytes_beyond_arrays"] == {"train": MEBIBYTE}
    assert subjects["nowhere"]["status"] == "cannot run"


def test_report_fits_80_columns_and_shows_times_and_ratios(measured):
    out = io.StringIO()
    target = console()
    target.file, target.width = out, 80
    report.show(target, measured)
    text = out.getvalue()
    row = next(line for line in text.splitlines() if line.startswith("numpy") and "2000" in line)
    assert row.split() == ["numpy", "2000", "0.50", "2.00", "1.0", "1000"]
    assert "x torch.nn" in text
    assert "nowhere is not installed." in text
    assert max(map(len, text.splitlines())) <= 80


def test_unknown_memory_is_shown_as_a_dash(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # a directory cannot be written to
    assert memory.beyond_arrays(lambda: None) is None
    unknown = timed(1.0)._replace(prepared=Prepared("1.0", "cpu", {"train": 1.0}, {"train": None}))
    out = io.StringIO()
    target = console()
    target.file = out
    report.show(target, measured._replace(subjects={"numpy": unknown}))
    assert "-" in out.getvalue().splitlines()[-2].split()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_memory_counts_temporaries_but_not_outputs():
    def call():
        temporary = np.ones(64 * MEBIBYTE, np.uint8)
        return temporary[: 32 * MEBIBYTE].copy(), (None, np.ones(MEBIBYTE, np.uint8))

    assert 60 * MEBIBYTE < memory.beyond_arrays(call) < 72 * MEBIBYTE
    assert memory.beyond_arrays(lambda: np.ones(64 * MEBIBYTE, np.uint8)) < 8 * MEBIBYTE


def test_host_clock_repeats_a_short_call():
    calls = []
    assert HostClock().seconds([lambda: calls.append(1)]) > 0
    assert len(calls) > 3


def test_worker_prepares_a_subject_and_then_times_it():
    worker = Worker()
    prepared = worker.answer(Preparation("numpy", Workload((64, 8)), MODES))
    assert prepared.version == np.__version__
    assert prepared.first_call.keys() == prepared.memory.keys() == set(MODES)
    assert all(worker.answer(Turn(mode)) > 0 for mode in MODES)


@pytest.mark.parametrize(
    ("spec", "workload", "broken", "words"),
    [
        ("numpy", Workload((4, 3), dtype="float8"), False, "takes no float8"),
        ("numpy:cuda", Workload((4, 3)), False, "only device is 'cpu'"),
        ("numpy", Workload((1, 3)), True, "ValueError"),
    ],
)
def test_worker_says_why_it_cannot_measure(spec, workload, broken, words):
    answer = Worker().answer(Preparation(spec, workload, ("train",)))
    assert (answer.broken, words in answer.why) == (broken, True)


def test_worker_names_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mbn.commands.bench.peers.formula", None)
    answer = Worker().answer(Preparation("formula", Workload((4, 3)), ("train",)))
    assert not answer.broken
    assert "is not installed" in answer.why


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4)])
def test_mask_has_the_shape_of_x_without_channels(axis, shape):
    workload = Workload(shape, axis=axis, masked=True)
    without_channels = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    assert workload.mask().shape == tuple(without_channels)
    assert 0.6 < workload.mask().mean() < 0.7
    assert Workload(shape).mask() is None


def test_transposed_workload_is_not_contiguous():
    x = Workload((6, 3, 4), transposed=True).x()
    assert x.shape == (6, 3, 4)
    assert not x.flags.c_contiguous
    assert Workload((6, 3)).x().flags.c_contiguous


@pytest.mark.parametrize(("rows", "fewer"), [(1, 1), (2, 2), (40, 2), (65536, 4096)])
def test_smaller_workload_keeps_enough_rows_for_training(rows, fewer):
    assert Workload((rows, 3, 5)).smaller().shape == (fewer, 3, 5)
