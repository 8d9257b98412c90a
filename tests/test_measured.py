"""The tables of docs/performance.md show the results of asv."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
TIMES = " \N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("measured")


@pytest.fixture
def measured_history(measured):
    return importlib.import_module("measured_history")


def asv(values, *axes):
    return [values, [[repr(name) for name in axis] for axis in axes], "1"]


@pytest.fixture
def run(measured):
    subjects, modes = ("numpy", "numba", "torch.nn", "copy"), ("train", "eval", "backward")
    nan = float("nan")
    results = {
        "side_by_side.Time.track_step": asv(
            [0.001, 0.002, 0.003, nan, nan, nan, 0.002, 0.002, 0.002, 0.0005, 0.0005, 0.0005],
            subjects,
            modes,
            ("(32, 64)",),
        ),
        "side_by_side.Memory.track_peak": asv([2**20, nan, 3 * 2**20], ("numpy",), modes, ("(65536, 256)",)),
        "speed.Step.time_step": asv(
            [0.016, 0.002, 0.016, nan, 0.004, 0.002], ("numpy",), modes, ("(65536, 256)", "(16384, 256) float16")
        ),
        "overhead.Call.track_overhead": asv([2e-6, 1e-6], ("numpy",), ("train", "eval")),
        "imports.track_import_beyond_numpy": [[0.0125], [], "1"],
        **{
            f"agreement.Float32.track_{name}": asv([0.5], ("numpy",), (1e4,))
            for name in ("train", "eval", "running_mean", "running_var")
        },
    }
    params = {"machine": "some-2core", "cpu": "a processor", "python": "3.13"}
    return measured.Run(
        {"commit_hash": "0123456789", "date": 1, "params": params, "requirements": {"numpy": "2.4"}, "results": results}
    )


def test_tables_show_measured_subjects_and_leave_out_the_others(measured, run, tmp_path):
    shown = asv(
        [3e-5, 8e-5, 5.2e-5, 6e-6], ("numpy",), ("train",), ("alone", "shared", "more", "gather"), ("(32, 64)",)
    )
    replicas = measured.Run({"results": {"replicas.Replicas.track_step": shown}})
    measured.generate(tmp_path / "made", run, replicas)
    tables = {path.stem: path.read_text().splitlines() for path in (tmp_path / "made").glob("*.md")}
    assert tables["train"] == [
        f"| time / torch.nn | 32{TIMES}64 |",
        "| --- | ---: |",
        "| **numpy** | 0.50 |",
        "| copy | 0.25 |",
        "| torch.nn, ms | 2 |",
    ]
    assert tables["memory"][2] == "| **numpy** | 1.0 | - | 3.0 |"
    float16 = f"| 16384{TIMES}256 float16 |"
    assert tables["inputs"][0] == "```{table} Training, forward"
    assert [line for line in tables["inputs"] if line.startswith(float16)] == [
        f"{float16} {ratio} |" for ratio in ("0.50", "-", "2.00")
    ]
    assert tables["overhead"][2] == "| **numpy** | 2.0 | 1.0 |"
    assert tables["overhead"][-1].startswith("`import mbn` takes 12.5 ms")
    assert tables["agreement"][2] == "| **numpy** | 0.50 | 0.50 | 0.50 | 0.50 |"
    assert tables["replicas"][2] == f"| **numpy** | Training, forward | 32{TIMES}64 | 30 | 80 | 52 | 6.0 |"
    assert "| mbn | 01234567 |" in tables["machine"]
    for mode in ("train", "eval", "backward"):
        assert "<svg" in (tmp_path / "made" / f"{mode}.svg").read_text()


def test_newest_results_are_shown(measured, run, tmp_path):
    for machine, date in (("a", 1), ("b", 2)):
        (tmp_path / machine).mkdir()
        (tmp_path / machine / "machine.json").write_text("{}")
        record = {**run.record, "date": date, "params": {"machine": machine}}
        (tmp_path / machine / "01234567-existing-py3.13.json").write_text(json.dumps(record))
    assert measured.newest(tmp_path).record["params"]["machine"] == "b"


def test_results_that_lack_a_figure_do_not_count(measured, run, tmp_path):
    (tmp_path / "a").mkdir()
    failed = {"imports.track_import_beyond_numpy": None}, {"overhead.Call.track_overhead": [None]}, {}
    for date, changes in enumerate(reversed(failed)):
        record = {**run.record, "date": date, "results": run.record["results"] | changes}
        (tmp_path / "a" / f"{date}-existing-py3.13.json").write_text(json.dumps(record))
    assert measured.newest(tmp_path).record["date"] == 0


def test_missing_results_are_an_error(measured, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"measure\.py"):
        measured.newest(tmp_path)


@pytest.fixture
def history(measured):
    """Return six commits, in which Torch comes second, and NumPy gets faster, slower for a moment, and less exact."""
    torch, numpy, errors = [None, 5, 5, 5, 5, 5], [9, 9, 3, 6, 3, 3], [0.5, 0.5, 0.5, 0.5, 1.2, 1.2]

    def record(number):
        times = asv(
            [1e-3 * numpy[number], torch[number] and 1e-3 * torch[number]],
            ("numpy", "torch"),
            ("train",),
            ("(1024, 256)",),
        )
        results = {
            "layer.Step.track_seconds": times,
            "layer.Agreement.track_error": asv([errors[number]], ("numpy",), ("y, training",)),
            "imports.timeraw_import": [[0.02 if number > 3 else 0.01], [], "1"],
            "layer.Memory.track_peak": asv([2**20], ("numpy",), ("train",)),
        }
        return measured.Run({"commit_hash": f"{number}" * 40, "date": number, "results": results})

    return [record(number) for number in range(6)]


def test_steps_of_the_history_are_changes_that_last(measured_history, history, tmp_path):
    measured_history.generate(tmp_path, history)
    assert (tmp_path / "history.md").read_text().splitlines() == [
        "- `1111111` to `2222222`",
        "  - numpy: train, (1024, 256) 9 → 3 ms",
        "- `3333333` to `4444444`",
        "  - `import mbn`: 10 → 20 ms",
        "  - numpy: y, training 0.50 → 1.20 ulp",
    ]
    assert "<svg" in (tmp_path / "history.svg").read_text()


def test_committed_history_is_long_and_of_one_machine(measured, measured_history):
    history = measured.runs(measured_history.HISTORY, measured_history.TIMES)
    assert len(history) >= 12
    assert len({(run.record["params"]["machine"], run.record["env_name"]) for run in history}) == 1
    assert len({str(run.record["requirements"]) for run in history}) == 1
