"""What the parts of a benchmark must get right on their own; nothing here depends on how fast anything is."""

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
    """A machine that gets slower: only ratios within a round say who is fast."""
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


def test_the_fastest_peer_is_no_backend_and_not_the_limit(measured):
    assert measured.fastest_peer("train") == "torch.nn"
    assert measured.peers == ["torch.nn", "formula", "copy"]
    alone = measured._replace(subjects={"numpy": timed(1.0), "copy": timed(1.0)})
    assert alone.fastest_peer("train") is None


def test_peers_stand_on_the_devices_of_their_framework():
    assert measurement.subjects(["numpy"]) == ["numpy", "torch.nn", "flax.nnx", "formula", "copy"]
    assert measurement.subjects(["torch:cuda", "torch", "jax:cpu"])[3:] == [
        "torch.nn:cuda",
        "torch.nn",
        "flax.nnx:cpu",
        "formula",
        "copy",
    ]


def test_on_a_device_all_stand_there_that_can():
    assert measurement.subjects(["torch:cuda"], "cuda") == [
        *("torch:cuda", "torch.nn:cuda", "flax.nnx:cuda", "copy:cuda")
    ]
    assert measurement.subjects(["numpy:cpu"], "cpu")[1:] == [
        *("torch.nn:cpu", "flax.nnx:cpu", "formula:cpu", "copy:cpu")
    ]


def test_the_limit_is_the_limit_on_a_device_too(measured):
    subjects = {"torch:cuda": timed(1.0), "torch.nn:cuda": timed(2.0), "copy:cuda": timed(0.5)}
    there = measured._replace(subjects=subjects)
    assert (there.limit, there.fastest_peer("train")) == ("copy:cuda", "torch.nn:cuda")
    assert json.loads(record.to_json(there))["limit"] == "copy:cuda"


def test_record(measured):
    written = json.loads(record.to_json(measured), parse_constant=pytest.fail)
    subjects = {row["subject"]: row for row in written["subjects"]}
    assert written["workload"]["shape"] == [4, 3]
    assert written["fastest_peer"] == {"train": "torch.nn"}
    assert subjects["numpy"]["ratio"]["train"] == {"torch.nn": 0.5, "formula": 0.25, "copy": 2.0}
    assert subjects["numpy"]["peak_bytes_beyond_arrays"] == {"train": MEBIBYTE}
    assert subjects["nowhere"]["status"] == "cannot run"


def test_report(measured):
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


def test_where_memory_is_not_known_there_is_no_number(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # a directory, which takes no text
    assert memory.beyond_arrays(lambda: None) is None
    unknown = timed(1.0)._replace(prepared=Prepared("1.0", "cpu", {"train": 1.0}, {"train": None}))
    out = io.StringIO()
    target = console()
    target.file = out
    report.show(target, measured._replace(subjects={"numpy": unknown}))
    assert "-" in out.getvalue().splitlines()[-2].split()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_memory_counts_temporaries_and_no_outputs():
    def call():
        temporary = np.ones(64 * MEBIBYTE, np.uint8)
        return temporary[: 32 * MEBIBYTE].copy(), (None, np.ones(MEBIBYTE, np.uint8))

    assert 60 * MEBIBYTE < memory.beyond_arrays(call) < 72 * MEBIBYTE
    assert memory.beyond_arrays(lambda: np.ones(64 * MEBIBYTE, np.uint8)) < 8 * MEBIBYTE


def test_a_turn_calls_often_enough():
    calls = []
    assert HostClock().seconds([lambda: calls.append(1)]) > 0
    assert len(calls) > 3


def test_a_worker_is_made_ready_and_then_timed():
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
def test_what_a_worker_can_not_do(spec, workload, broken, words):
    answer = Worker().answer(Preparation(spec, workload, ("train",)))
    assert (answer.broken, words in answer.why) == (broken, True)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mbn.commands.bench.peers.formula", None)
    answer = Worker().answer(Preparation("formula", Workload((4, 3)), ("train",)))
    assert not answer.broken
    assert "is not installed" in answer.why


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4)])
def test_masks_have_the_shape_of_places(axis, shape):
    workload = Workload(shape, axis=axis, masked=True)
    places = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    assert workload.mask().shape == tuple(places)
    assert 0.6 < workload.mask().mean() < 0.7
    assert Workload(shape).mask() is None


def test_layouts():
    x = Workload((6, 3, 4), transposed=True).x()
    assert x.shape == (6, 3, 4)
    assert not x.flags.c_contiguous
    assert Workload((6, 3)).x().flags.c_contiguous


@pytest.mark.parametrize(("rows", "fewer"), [(1, 1), (2, 2), (40, 2), (65536, 4096)])
def test_a_smaller_workload_can_be_trained_on(rows, fewer):
    assert Workload((rows, 3, 5)).smaller().shape == (fewer, 3, 5)
